"""Does the blocked logprob head equal a softmax over the whole vocabulary, and does it compute only what is asked for?

The reference is numpy in float64, its gradients written out by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_client.losses import logprob_head
from jax_client.losses.logprob_head import Blocks, Order, head_backward, head_forward

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
B, T, D, V, R = 2, 20, 7, 62, 4
# Five chunks of a row; several blocks of the vocabulary and a narrower last one, in each shard of it.
SMALL = Blocks(4, 12)
ALPHA = 32.0


class Case(NamedTuple):
    """Random hidden states, head, adapter, targets and cotangents; which positions are scored and have a gradient."""

    h_BTD: np.ndarray
    w_VD: np.ndarray
    lora: dict[str, np.ndarray]
    targets_BTC: np.ndarray
    g_BTC: np.ndarray
    scored_BT: np.ndarray
    gradient_BT: np.ndarray

    def order(self) -> Order:
        order = np.argsort(2 - self.scored_BT.astype(int) - self.gradient_BT, axis=-1, kind="stable")
        counts = (jnp.int32(a.sum(axis=-1).max()) for a in (self.gradient_BT, self.scored_BT))
        return Order(jnp.asarray(order), jnp.asarray(np.argsort(order, axis=-1)), *counts)


def case(rows: int = B, targets: int = 1, with_lora: bool = True, scale: float = 1.0, length: int = T) -> Case:
    rng = np.random.default_rng(3)
    scored = rng.random((rows, length)) < 0.8
    gradient = scored & (rng.random((rows, length)) < 0.5)
    lora = {"A": rng.normal(size=(R, D)), "B": rng.normal(size=(R, V))} if with_lora else {}
    return Case(
        h_BTD=(rng.normal(size=(rows, length, D)) * scale).astype(np.float32),
        w_VD=rng.normal(size=(V, D)).astype(np.float32),
        lora={name: value.astype(np.float32) for name, value in lora.items()},
        targets_BTC=rng.integers(0, V, (rows, length, targets)).astype(np.int32),
        g_BTC=(rng.normal(size=(rows, length, targets)) * gradient[..., None]).astype(np.float32),
        scored_BT=scored,
        gradient_BT=gradient,
    )


def expected(c: Case) -> dict[str, np.ndarray]:
    """Logprobs, dh and the adapter's gradients, with all logits in memory."""
    h, w, g = (np.asarray(x, np.float64) for x in (c.h_BTD, c.w_VD, c.g_BTC))
    logits = h @ w.T
    if c.lora:
        a, b = (np.asarray(c.lora[name], np.float64) for name in "AB")
        u = ALPHA / R * h @ a.T
        logits = logits + u @ b
    logits -= logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    hits = np.zeros_like(logits)
    for position in np.ndindex(c.targets_BTC.shape):
        hits[*position[:2], c.targets_BTC[position]] += g[position]
    d_logits = hits - g.sum(axis=-1, keepdims=True) * np.exp(logprobs)
    out = {"logprobs": np.take_along_axis(logprobs, c.targets_BTC, axis=-1), "h": d_logits @ w}
    if c.lora:
        du = ALPHA / R * d_logits @ b.T
        out["h"] += du @ a
        out["A"], out["B"] = (np.einsum("BTR,BTX->RX", x, y) for x, y in ((du, h), (u, d_logits)))
    return out


def computed(
    c: Case, shards: int = 1, dtype: jnp.dtype = F32, wide: bool = False, blocks: Blocks = SMALL
) -> dict[str, Any]:
    """What the package makes of it; `only` are the logprobs of a pass that no backward pass follows."""
    w_VD, lora, order = jnp.asarray(c.w_VD, dtype), {k: jnp.asarray(v) for k, v in c.lora.items()}, c.order()
    if wide:  # every position counts as scored, as in a batch whose last row is full
        order = order._replace(scored=jnp.int32(c.h_BTD.shape[1]))

    @jax.jit
    def run(h_BTD: jax.Array, targets_BTC: jax.Array, g_BTC: jax.Array) -> dict[str, Any]:
        forward: dict[str, Any] = {"dtype": dtype, "shards": shards, "blocks": blocks}
        logprobs, saved = head_forward(h_BTD, w_VD, lora, targets_BTC, order, with_backward=True, **forward)
        only, nothing = head_forward(h_BTD, w_VD, lora, targets_BTC, order, with_backward=False, **forward)
        dh, grads = head_backward(saved, w_VD, lora, targets_BTC, g_BTC, order, **forward)
        return {"logprobs": logprobs, "only": only, "nothing": nothing, "h": dh, **grads}

    return run(c.h_BTD, c.targets_BTC, c.g_BTC)


@pytest.mark.parametrize(
    ("shards", "with_lora", "targets", "rows"), [(2, True, 3, 2), (1, True, 1, 1), (1, False, 1, 2), (2, False, 3, 1)]
)
def test_logprobs_and_gradients_equal_the_formula(shards: int, with_lora: bool, targets: int, rows: int) -> None:
    c = case(rows, targets, with_lora)
    got, want = computed(c, shards), expected(c)
    np.testing.assert_allclose(got["logprobs"][c.scored_BT], want["logprobs"][c.scored_BT], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(got["only"][c.scored_BT], want["logprobs"][c.scored_BT], rtol=1e-5, atol=2e-5)
    assert got["nothing"] == {}
    for name in want.keys() - {"logprobs"}:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert got.keys() == want.keys() | {"only", "nothing"}
    assert all(value.dtype == F32 for value in jax.tree.leaves(got))


def test_the_largest_block_of_an_accelerator_takes_a_row_and_the_vocabulary_at_once() -> None:
    """One chunk, one block of the vocabulary: both are no loops."""
    c = case(targets=2)
    got, want = computed(c, blocks=Blocks(64, 62)), expected(c)
    np.testing.assert_allclose(got["logprobs"][c.scored_BT], want["logprobs"][c.scored_BT], rtol=1e-5, atol=2e-5)
    for name in ("h", "A", "B"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_vocabulary_smaller_than_a_block() -> None:
    c = case(with_lora=False)
    got, want = computed(c, blocks=Blocks(4, 100)), expected(c)
    np.testing.assert_allclose(got["h"], want["h"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_scores_that_exp_cannot_hold(shards: int) -> None:
    """Logits of thousands, the largest of each block larger or smaller than those before."""
    c = case(scale=300.0)
    got, want = computed(c, shards, wide=True), expected(c)
    assert np.abs(want["logprobs"]).max() > 2000
    np.testing.assert_allclose(got["logprobs"], want["logprobs"], rtol=1e-4, atol=1e-2)
    for name in ("h", "A", "B"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=np.abs(want[name]).max() * 1e-4)


def test_bfloat16_operands_give_float32_results() -> None:
    c = case(targets=2)
    c = c._replace(w_VD=np.asarray(jnp.asarray(c.w_VD, BF16), np.float32))
    got, want = computed(c, dtype=BF16), expected(c)
    assert all(value.dtype == F32 for value in jax.tree.leaves(got))
    for name in ("logprobs", "h", "A", "B"):
        bound = np.abs(want[name]).max() * 0.03
        rows = c.scored_BT if name == "logprobs" else slice(None)
        np.testing.assert_allclose(got[name][rows], want[name][rows], rtol=0, atol=bound, err_msg=name)


@pytest.fixture(scope="module")
def traced() -> Any:
    """One row through all of the head, compiled once for every order."""
    c = case(rows=1)
    h_BTD, w_VD, targets_BTC = jnp.asarray(c.h_BTD), jnp.asarray(c.w_VD), jnp.asarray(c.targets_BTC)
    lora = {name: jnp.asarray(value) for name, value in c.lora.items()}

    @jax.jit
    def run(order: Order) -> tuple[Any, Any, Any, Any]:
        options: dict[str, Any] = {"dtype": F32, "shards": 1, "blocks": SMALL}
        logprobs, saved = head_forward(h_BTD, w_VD, lora, targets_BTC, order, with_backward=True, **options)
        only, _ = head_forward(h_BTD, w_VD, lora, targets_BTC, order, with_backward=False, **options)
        _, grads = head_backward(saved, w_VD, lora, targets_BTC, jnp.ones(targets_BTC.shape), order, **options)
        return logprobs[0], only[0], saved["e"][0], grads["B"]

    return c, run


@pytest.mark.parametrize(("with_gradient", "scored"), [(0, 0), (1, 1), (4, 8), (5, 8), (4, 9), (20, 20), (0, 20)])
def test_chunks_are_computed_as_far_as_they_are_needed(traced: Any, with_gradient: int, scored: int) -> None:
    """A chunk without a gradient carries no e; one beyond the scored positions is not looked at and stays zero."""
    c, run = traced
    place = jnp.arange(T, dtype=jnp.int32)[None]
    logprobs, only, e, b_grad = map(np.asarray, run(Order(place, place, jnp.int32(with_gradient), jnp.int32(scored))))
    with_e, with_score = -(-with_gradient // 4) * 4, -(-scored // 4) * 4
    for values, end in ((logprobs, with_score), (only, with_score), (e, with_e)):
        assert values[:end].any(axis=-1).all() and not values[end:].any()
    # The part of the targets is summed over all positions, that of the probabilities over the chunks with a gradient.
    everywhere = c._replace(g_BTC=np.ones_like(c.g_BTC))
    beyond = case(rows=1)._replace(g_BTC=np.ones_like(c.g_BTC) * (np.arange(T) >= with_e)[:, None])
    want = expected(everywhere)["B"] - expected(beyond)["B"]
    u = ALPHA / R * c.h_BTD[0, with_e:] @ c.lora["A"].T
    np.add.at(want.T, c.targets_BTC[0, with_e:, 0], u)
    np.testing.assert_allclose(b_grad, want, rtol=1e-4, atol=1e-3)


def test_no_chunk_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[bool] = []

    def counted(h_MD: jax.Array, *args: Any, with_backward: bool, **options: Any) -> Any:
        kinds.append(with_backward)
        extra = {"lse": jnp.zeros(4), "e": jnp.zeros((4, D))} if with_backward else {}
        return {"logprobs": jnp.zeros((4, 1))} | extra

    monkeypatch.setattr(logprob_head, "_chunk_forward", counted)
    c, place = case(rows=1, with_lora=False), jnp.arange(T, dtype=jnp.int32)[None]
    order = Order(place, place, jnp.int32(5), jnp.int32(13))
    arrays: Any = (jnp.asarray(c.h_BTD), jnp.asarray(c.w_VD), {}, jnp.asarray(c.targets_BTC), order)
    for with_backward, chunks in ((True, [True, True, False, False]), (False, [False] * 4)):
        kinds.clear()
        with jax.disable_jit():
            head_forward(*arrays, dtype=F32, shards=1, blocks=SMALL, with_backward=with_backward)
        assert kinds == chunks


def test_positions_are_taken_in_the_order_given_and_put_back() -> None:
    c = case(rows=1, with_lora=False)
    order = c.order()
    backwards = Order(order.token_BT[:, ::-1], T - 1 - order.place_BT, jnp.int32(T), jnp.int32(T))
    arrays = jnp.asarray(c.h_BTD), jnp.asarray(c.w_VD), {}, jnp.asarray(c.targets_BTC), backwards
    logprobs, saved = head_forward(*arrays, dtype=F32, shards=1, blocks=SMALL, with_backward=True)
    np.testing.assert_allclose(logprobs, expected(c)["logprobs"], rtol=1e-5, atol=2e-5)
    assert saved["e"].shape == c.h_BTD.shape


def test_one_row_and_one_shard_have_no_batch_axis() -> None:
    """XLA's CPU backend has no fast path for a bfloat16 product with one."""

    def products(rows: int, shards: int) -> set[int]:
        c = case(rows, with_lora=False)
        arrays = jnp.asarray(c.h_BTD), jnp.asarray(c.w_VD), {}, jnp.asarray(c.targets_BTC), c.order()
        options: dict[str, Any] = {"dtype": F32, "shards": shards, "blocks": SMALL, "with_backward": True}
        traced = jax.make_jaxpr(lambda: head_forward(*arrays, **options))()
        return {len(axes[1][0]) for axes in dot_axes(traced.jaxpr, width=12)}

    assert products(rows=1, shards=1) == {0}
    assert 1 in products(rows=1, shards=2)


def dot_axes(jaxpr: Any, width: int) -> list[Any]:
    """The dimension numbers of every matmul that reads a block of the vocabulary of this width, loops included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and any(width in v.aval.shape for v in equation.invars):
            found.append(equation.params["dimension_numbers"])
        for inner in jaxprs_in_params(equation.params):
            found += dot_axes(inner, width)
    return found


def test_a_chunk_that_is_a_whole_row_does_nothing_without_work() -> None:
    """XLA must not move its sweeps over the vocabulary to where they run whether or not any position needs them."""
    h, w, targets = jnp.ones((1, 16, 8)), jnp.ones((4096, 8)), jnp.ones((1, 16, 1), jnp.int32)
    place = jnp.arange(16, dtype=jnp.int32)[None]
    options: dict[str, Any] = {"dtype": F32, "shards": 1, "blocks": Blocks.of("cpu"), "with_backward": True}

    def head(with_gradient: jax.Array, scored: jax.Array) -> Any:
        order = Order(place, place, with_gradient, scored)
        return head_forward(h, w, {}, targets, order, **options)

    compiled = jax.jit(head).lower(jnp.int32(0), jnp.int32(0)).compile()
    sweeps = [line for line in (compiled.as_text() or "").splitlines() if " while(" in line]
    assert sweeps and all("cond/branch" in line for line in sweeps)
    for values in jax.tree.leaves(compiled(jnp.int32(0), jnp.int32(0))):
        assert not values.any()


def test_the_gradient_of_b_in_one_chunk_does_nothing_without_work() -> None:
    w, targets, place = jnp.ones((4096, 8)), jnp.ones((1, 16, 1), jnp.int32), jnp.arange(16, dtype=jnp.int32)[None]
    lora = {"A": jnp.ones((2, 8)), "B": jnp.ones((2, 4096))}
    saved = {"h": jnp.ones((1, 16, 8)), "lse": jnp.zeros((1, 16)), "e": jnp.ones((1, 16, 8)), "b": jnp.ones((1, 16, 2))}

    def head(with_gradient: jax.Array) -> Any:
        order = Order(place, place, with_gradient, jnp.int32(16))
        g_BTC = jnp.ones((1, 16, 1))
        options: dict[str, Any] = {"dtype": F32, "shards": 1, "blocks": Blocks.of("cpu")}
        return head_backward(saved, w, lora, targets, g_BTC, order, **options)[1]["B"]

    compiled = jax.jit(head).lower(jnp.int32(0)).compile()
    sweeps = [line for line in (compiled.as_text() or "").splitlines() if " while(" in line and "Mv" in line]
    assert all("cond/branch" in line for line in sweeps)
    others = np.delete(np.asarray(compiled(jnp.int32(0))), 1, axis=1)
    assert not others.any(), "only the targets' own entries have a part that needs no sweep"


def test_blocks_divide_the_row_and_suit_the_platform() -> None:
    lengths = {1: 1, 2: 2, 20: 20, 512: 512, 513: 171, 769: 1, 1024: 512, 1026: 342, 3072: 512}
    assert {length: Blocks.of("cpu").tokens(length) for length in lengths} == lengths
    lengths = {20: 20, 4096: 4096, 6144: 3072, 8192: 4096}
    assert {length: Blocks.of("tpu").tokens(length) for length in lengths} == lengths
    assert Blocks.of("gpu").entries == 4 * Blocks.of("cpu").entries
