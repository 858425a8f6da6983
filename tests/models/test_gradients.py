"""Do the hand-written backward passes equal automatic differentiation of the forward passes?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.losses import logprob_head
from jax_client.models.config import GatedDelta, ModelConfig, Rope, SwigluClamp, Windows
from jax_client.models.decoder import param_specs
from jax_client.models.kernels import blockwise
from jax_client.models.lora_arrays import LoraArray, lora_arrays
from jax_client.models.parts import attention
from jax_client.models.parts.gated_delta import mixing
from jax_client.models.transformer import backward_pass, context, forward_pass
from jax_client.values import LoraSpec
from support.models.plain_attention import PLAIN
from support.models.recurrence import by_token

F32 = jnp.dtype("float32")


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "family": "llama", "vocab_size": 61, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 8, "norm_eps": 1e-5, "rope_theta": 1e4, "tied_embeddings": True, "max_context": 64,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


# All that Gemma 3 has beside a Llama, with layers that differ in their window and their rotation.
GEMMA: dict[str, Any] = {
    "qk_norm": True, "activation": "geglu", "post_norms": True, "embedding_scale": 4.0, "query_scale": 0.2,
    "n_layers": 3, "windows": Windows(size=5, layers=(0, 2), rope=Rope(theta=100.0)),
}  # fmt: skip


# All that Qwen3.5 has beside a Llama, with a layer of attention between two with the rule.
HYBRID: dict[str, Any] = {
    "qk_norm": True, "output_gate": True, "rope_dim": 4, "n_layers": 3,
    "delta": GatedDelta(layers=(0, 2), key_heads=2, value_heads=4, key_dim=6, value_dim=5, taps=4),
}  # fmt: skip


def random_tree(specs: Any, seed: int, scale: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale, s.dtype), specs)


def random_lora(c: ModelConfig, rank: int, seed: int) -> Any:
    arrays = lora_arrays(c, LoraSpec(rank=rank, seed=0))["layers"]
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, F32)  # noqa: E731
    return jax.tree.map(draw, arrays, is_leaf=lambda leaf: isinstance(leaf, LoraArray))


@pytest.mark.parametrize(
    ("changes", "remat", "one_cpu"),
    [
        ({}, "none", True),
        pytest.param({}, "none", False, marks=pytest.mark.full),
        ({}, "selective", True),
        ({}, "full", True),
        ({"family": "qwen2", "qkv_bias": True}, "none", True),
        ({"family": "qwen3", "qk_norm": True}, "selective", True),
        pytest.param(GEMMA, "none", True, marks=pytest.mark.full),
        pytest.param(GEMMA, "selective", False, marks=pytest.mark.full),
        (GEMMA, "full", True),
        ({"o_bias": True, "sinks": True, "windows": Windows(size=3, layers=(1,))}, "selective", True),
        ({"windows": Windows(size=3, layers=(0, 1)), "clamp": SwigluClamp(limit=0.5, alpha=1.7)}, "none", False),
        pytest.param(HYBRID, "none", True, marks=pytest.mark.full),
        (HYBRID, "selective", False),
        pytest.param(HYBRID, "full", True, marks=pytest.mark.full),
    ],
)
def test_layers_backward(changes: dict[str, Any], remat: Any, one_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "SMALL_BLOCK", 4)
    monkeypatch.setattr(blockwise, "LARGE_BLOCK", 5)
    config = tiny(**changes)
    params, lora = random_tree(param_specs(config, F32), 0), random_lora(config, 3, 1)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 61, (2, 20)))
    segments = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 4, [1] * 20])
    positions = jnp.asarray([list(range(7)) + list(range(9)) + [0] * 4, list(range(20))])
    g = jnp.asarray(rng.normal(size=(2, 20, 16)), F32)

    @jax.jit
    def expected(lora: Any) -> Any:
        c = context(positions, config, F32, PLAIN)
        h, pullback = jax.vjp(lambda lora: forward_pass(params, lora, tokens, segments, c, None)[0], lora)
        return h, pullback(g)[0]

    @jax.jit
    def ours(lora: Any) -> Any:
        c = context(positions, config, F32, attention.blockwise(one_cpu), on_cpu=True, one_cpu=one_cpu)
        h, saved = forward_pass(params, lora, tokens, segments, c, remat)
        return h, backward_pass(params, lora, segments, saved, g, c, jax.tree.map(jnp.zeros_like, lora))

    (h, grads), (expected_h, expected_grads) = ours(lora), expected(lora)
    np.testing.assert_allclose(h, expected_h, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), grads, expected_grads)


def test_chunks_are_the_rule_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model, with segments that begin within chunks, padding, and one token repeated through several chunks."""
    config = tiny(**HYBRID)
    # The norm behind the rule makes much of what is left of small outputs, in either form: with this seed none are.
    params, lora = random_tree(param_specs(config, F32), 5), random_lora(config, 3, 1)
    params["layers"]["delta"]["delta_out_LPYD"] *= 0.1
    lora["delta_out"]["B"] *= 0.1
    tokens = jnp.asarray([[7] * 150, list(np.random.default_rng(2).integers(0, 61, 150))])
    segments = jnp.asarray([[1] * 150, [1] * 70 + [2] * 3 + [3] * 67 + [0] * 10])
    c = context(jnp.tile(jnp.arange(150), (2, 1)), config, F32, attention.blockwise(True), on_cpu=True, one_cpu=True)
    run = lambda lora: forward_pass(params, lora, tokens, segments, c, None)[0]  # noqa: E731
    chunks = jax.jit(run)(lora)
    monkeypatch.setattr(mixing, "delta_forward", by_token)
    np.testing.assert_allclose(chunks, jax.jit(lambda lora: run(lora))(lora), atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("targets_per_position", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_head(shards: int, with_lora: bool, targets_per_position: int, rows: int) -> None:
    """Every position is scored up to the padding; those without a gradient carry nothing for the backward pass."""
    rng = np.random.default_rng(3)
    B, T, D, V, C = rows, 20, 8, 62, targets_per_position
    h, w = jnp.asarray(rng.normal(size=(B, T, D)), F32), jnp.asarray(rng.normal(size=(V, D)), F32)
    lora = {"A": jnp.asarray(rng.normal(size=(4, D)), F32), "B": jnp.asarray(rng.normal(size=(4, V)), F32)}
    lora = lora if with_lora else {}
    targets = jnp.asarray(rng.integers(0, V, (B, T, C)))
    scored, with_gradient = rng.random((B, T)) < 0.8, rng.random((B, T)) < 0.5
    with_gradient &= scored
    g = jnp.asarray(rng.normal(size=targets.shape) * with_gradient[..., None], F32)
    order = np.argsort(2 - scored.astype(int) - with_gradient, axis=-1, kind="stable")
    counts = [jnp.int32(a.sum(axis=-1).max()) for a in (with_gradient, scored)]
    how = logprob_head.Order(jnp.asarray(order), jnp.asarray(np.argsort(order, axis=-1)), *counts)

    def plain(h: jax.Array, lora: Any) -> jax.Array:
        logits = h @ w.T + ((h @ lora["A"].T) @ lora["B"] * 32 / 4 if lora else 0)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)

    @jax.jit
    def expected(h: jax.Array, lora: Any) -> Any:
        logprobs, pullback = jax.vjp(plain, h, lora)
        return logprobs, *pullback(g)

    @jax.jit
    def ours(h: jax.Array, lora: Any) -> Any:
        options: dict[str, Any] = {"dtype": F32, "shards": shards, "blocks": logprob_head.Blocks(4, 12)}
        logprobs, saved = logprob_head.head_forward(h, w, lora, targets, how, with_backward=True, **options)
        only, nothing = logprob_head.head_forward(h, w, lora, targets, how, with_backward=False, **options)
        return logprobs, *logprob_head.head_backward(saved, w, lora, targets, g, how, **options), only, nothing

    logprobs, dh, grads, only, nothing = ours(h, lora)
    expected_logprobs, expected_dh, expected_grads = expected(h, lora)
    np.testing.assert_allclose(logprobs[scored], expected_logprobs[scored], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(only[scored], logprobs[scored], rtol=1e-6, atol=1e-6)
    assert not nothing
    np.testing.assert_allclose(dh, expected_dh, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), grads, dict(expected_grads))
