"""How do target logprobs come from hidden states without a [T, V] array, forwards and backwards?

`head_forward` scans the vocabulary in blocks with an online logsumexp. Beside the running sum it carries
e = sum_v p_v W_v, so that d logprob / dh = W_target - e needs no second pass over the vocabulary: two matmuls, where
recomputing the probabilities takes three. Only an adapter on the head needs the probabilities again, for its B.

It takes the tokens in chunks, too, in the order that `Order` gives: first those that can get a gradient, then those
that are only scored and carry no e. Padding is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract, from_bits
from jax_client.models.parts.lora import lora_scale

_FLOAT32 = jnp.dtype(jnp.float32)
Unembed = Mapping[str, jax.Array]  # {"A": (R, D), "B": (R, V)}, or empty


class Blocks(NamedTuple):
    """How large a block of scores may be: its tokens at most, and its entries of the vocabulary."""

    most_tokens: int
    entries: int

    @classmethod
    def of(cls, platform: str) -> Blocks:
        """Return those of a device's platform: 4 MB stay in a CPU's cache; an accelerator wants large matmuls."""
        return cls(512, 2048) if platform == "cpu" else cls(4096, 8192)

    def tokens(self, length: int) -> int:
        """Return the tokens of a block of rows of this length: its largest divisor up to the limit."""
        return next(size for size in range(min(self.most_tokens, length), 0, -1) if length % size == 0)


class Order(NamedTuple):
    """The order in which the positions of a row are computed.

    Attributes:
        token_BT: int32; each row's positions: those that can get a gradient first, then those that are only scored,
            then padding.
        place_BT: int32; the inverse, each position's place in that order.
        with_gradient, scored: int32 scalars; the number of positions, counted from the front, that have a gradient, and
            a score. Each is the largest of any row, so that the rows of a mesh take equally many turns.
    """

    token_BT: jax.Array
    place_BT: jax.Array
    with_gradient: jax.Array
    scored: jax.Array


def _each_row(row: Callable[..., Any], *arrays: Any) -> Any:
    """Apply `row(*arrays) -> results` to each row of the arrays.

    One row goes without a batch axis: XLA's CPU backend has no bfloat16 path for a matmul with one.
    """
    if len(jax.tree.leaves(arrays)[0]) > 1:
        return jax.vmap(row)(*arrays)
    return jax.tree.map(lambda a: a[None], row(*jax.tree.map(lambda a: a[0], arrays)))


@jax.named_scope("lora")
def _scaled_u(h_MD: jax.Array, lora: Unembed, dtype: jnp.dtype) -> jax.Array:
    """Return u (..., R) = s h A."""
    return contract("...D,RD->...R", h_MD, lora["A"], dtype) * lora_scale(lora["A"])


def _block_scores(
    h_MD: jax.Array, u_MR: jax.Array | None, w_vD: jax.Array, b_Rv: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    s_Mv = contract("MD,vD->Mv", h_MD, w_vD, dtype)
    return s_Mv if u_MR is None or b_Rv is None else s_Mv + contract("MR,Rv->Mv", u_MR, b_Rv, dtype)


def _over_blocks(
    step: Any, carry: Any, head_VD: jax.Array, b_RV: jax.Array | None, width: int
) -> tuple[Any, list[Any]]:
    """Run `step(carry, w_vD, b_Rv) -> (carry, y)` over blocks of one vocabulary shard; the last may be narrower."""
    size = len(head_VD)

    def block(carry: Any, start: Any, width: int) -> tuple[Any, Any]:
        w_vD = from_bits(jax.lax.dynamic_slice_in_dim(head_VD, start, width))
        b_Rv = None if b_RV is None else jax.lax.dynamic_slice_in_dim(b_RV, start, width, axis=1)
        return step(carry, w_vD, b_Rv)

    whole, outs = size // width, []
    if whole:
        carry, ys = jax.lax.scan(lambda c, i: block(c, i * width, width), carry, jnp.arange(whole))
        outs.append(ys)
    if tail := size - whole * width:
        carry, y = block(carry, whole * width, tail)
        outs.append(jax.tree.map(lambda a: a[None], y))
    return carry, outs


def _over_chunks(chunks: int, start: Any, stop: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Run step(i, carry) for the chunks from start to stop, of the `chunks` that a row has.

    A single one is no loop: XLA would move all of its work out of the loop, and do it even where there are no turns.
    """
    if chunks == 1:
        return jax.lax.cond(start < stop, lambda carry: step(0, carry), lambda carry: carry, carry)
    return jax.lax.fori_loop(start, stop, step, carry)


def _each_shard(sweep: Any, shards: int, head_VD: jax.Array, b_RV: jax.Array | None) -> Any:
    """Return sweep(head, b) of each vocabulary shard, stacked on a leading axis that the mesh splits.

    One shard goes without that axis: XLA's CPU backend has no bfloat16 path for a matmul with a batch axis.
    """
    if shards == 1:
        return jax.tree.map(lambda a: a[None], sweep(head_VD, b_RV))
    head_SVD = head_VD.reshape(shards, -1, head_VD.shape[1])
    b_SRV = None if b_RV is None else jnp.moveaxis(b_RV.reshape(len(b_RV), shards, -1), 1, 0)
    return jax.vmap(sweep, in_axes=(0, None if b_SRV is None else 0))(head_SVD, b_SRV)


@jax.named_scope("head")
def head_forward(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    lora: Unembed,
    targets_BTC: jax.Array,
    order: Order,
    *,
    dtype: jnp.dtype,
    shards: int,
    blocks: Blocks,
    with_backward: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return log p(targets | h), and what `head_backward` needs.

    Args:
        h_BTD: float32 hidden states after the final norm, one per position.
        head_VD: output projection in the matmul type, or its bits.
        lora: the adapter on the head, or {}.
        targets_BTC: int32 token ids, C per position.
        order: the positions' order; those beyond `order.scored` get 0.
        shards: ways that V is split over the mesh; each shard keeps its own running sums, merged at the end.
        blocks: how large a block of scores may be.
        with_backward: also carry e, for the first `order.with_gradient` positions. Without it the second result is
            empty.

    Returns:
        logprobs_BTC float32, in nats. Largest temporary: (shards, tokens, vocabulary entries) of one block, float32.

    Source: online softmax, arXiv 1805.02867.
    """
    size = blocks.tokens(h_BTD.shape[1])

    def row(h_TD: jax.Array, targets_TC: jax.Array, token_T: jax.Array, place_T: jax.Array) -> dict[str, jax.Array]:
        def chunk(i: jax.Array, out: dict[str, jax.Array], with_backward: bool) -> dict[str, jax.Array]:
            at_M = jax.lax.dynamic_slice_in_dim(token_T, i * size, size)
            options: Any = {"dtype": dtype, "shards": shards, "width": blocks.entries, "with_backward": with_backward}
            new = _chunk_forward(h_TD[at_M], head_VD, lora, targets_TC[at_M], **options)
            # Written in the order of work and put back below: a CPU is slow at writing to scattered places.
            put = jax.lax.dynamic_update_slice_in_dim
            return out | {name: put(out[name], value, i * size, 0) for name, value in new.items()}

        (T, D), out = h_TD.shape, {"logprobs": jnp.zeros(targets_TC.shape)}
        done = jnp.int32(0)
        if with_backward:
            out |= {"lse": jnp.zeros(T), "e": jnp.zeros((T, D))} | (
                {"b": jnp.zeros((T, len(lora["A"])))} if lora else {}
            )
            done = -(-order.with_gradient // size)
            out = _over_chunks(T // size, 0, done, lambda i, out: chunk(i, out, True), out)
        out = _over_chunks(T // size, done, -(-order.scored // size), lambda i, out: chunk(i, out, False), out)
        return {name: value[place_T] for name, value in out.items()}

    saved = _each_row(row, h_BTD, targets_BTC, order.token_BT, order.place_BT)
    if lora and with_backward:
        saved["h"] = h_BTD.astype(dtype)
    return saved.pop("logprobs"), saved


def _chunk_forward(
    h_MD: jax.Array,
    head_VD: jax.Array,
    lora: Unembed,
    targets_MC: jax.Array,
    *,
    dtype: jnp.dtype,
    shards: int,
    width: int,
    with_backward: bool,
) -> dict[str, jax.Array]:
    """Return `logprobs` (M, C) and, for the backward pass, `lse` (M,), `e` (M, D) and, with an adapter, `b` (M, R)."""
    M, D = h_MD.shape
    u_MR = _scaled_u(h_MD, lora, dtype) if lora else None

    def step(carry: dict[str, jax.Array], w_vD: jax.Array, b_Rv: jax.Array | None) -> tuple[dict[str, jax.Array], None]:
        s_Mv = _block_scores(h_MD, u_MR, w_vD, b_Rv, dtype)
        m_M = jnp.maximum(carry["m"], jnp.max(s_Mv, axis=-1))
        p_Mv = jnp.exp(s_Mv - m_M[:, None])
        decay_M = jnp.exp(carry["m"] - m_M)
        new = {"m": m_M, "l": carry["l"] * decay_M + jnp.sum(p_Mv, axis=-1)}
        if with_backward:
            new["e"] = carry["e"] * decay_M[:, None] + contract("Mv,vD->MD", p_Mv, w_vD, dtype)
        if with_backward and b_Rv is not None:
            new["b"] = carry["b"] * decay_M[:, None] + contract("Mv,Rv->MR", p_Mv, b_Rv, dtype)
        return new, None

    def sweep(head_VD: jax.Array, b_RV: jax.Array | None) -> dict[str, jax.Array]:
        carry = {"m": jnp.full(M, -jnp.inf), "l": jnp.zeros(M)}
        if with_backward:
            carry["e"] = jnp.zeros((M, D))
        if with_backward and b_RV is not None:
            carry["b"] = jnp.zeros((M, len(b_RV)))
        return _over_blocks(step, carry, head_VD, b_RV, width)[0]

    carry = _each_shard(sweep, shards, head_VD, lora["B"] if lora else None)
    m_M = jnp.max(carry["m"], axis=0)
    weight_SM = jnp.exp(carry["m"] - m_M)
    l_M = jnp.sum(carry["l"] * weight_SM, axis=0)
    lse_M = m_M + jnp.log(l_M)
    logits_MC = _target_logits(h_MD, u_MR, head_VD, lora, targets_MC, dtype)
    out = {"logprobs": logits_MC - lse_M[:, None]}
    if with_backward:
        weight_SM = weight_SM / l_M
        out |= {"lse": lse_M, "e": contract("SMD,SM->MD", carry["e"], weight_SM, _FLOAT32)}
        if lora:
            out["b"] = contract("SMR,SM->MR", carry["b"], weight_SM, _FLOAT32)
    return out


def _target_logits(
    h_MD: jax.Array,
    u_MR: jax.Array | None,
    head_VD: jax.Array,
    lora: Unembed,
    targets_MC: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    w_MCD = from_bits(jnp.take(head_VD, targets_MC, axis=0))
    logits_MC = contract("MD,MCD->MC", h_MD, w_MCD, dtype)
    if u_MR is not None:
        logits_MC += contract("MR,RMC->MC", u_MR, jnp.take(lora["B"], targets_MC, axis=1), dtype)
    return logits_MC


@jax.named_scope("head")
def head_backward(
    saved: dict[str, jax.Array],
    head_VD: jax.Array,
    lora: Unembed,
    targets_BTC: jax.Array,
    g_BTC: jax.Array,
    order: Order,
    *,
    dtype: jnp.dtype,
    shards: int,
    blocks: Blocks,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return dh (B, T, D) float32 and the gradients of the head's adapter, for the cotangents g of the logprobs.

    g must be zero beyond the positions that the forward pass was told can get a gradient. The frozen head gets none.
    """
    g_BT = jnp.sum(g_BTC, axis=-1)
    w_BTCD = from_bits(jnp.take(head_VD, targets_BTC, axis=0))
    dh_BTD = contract("BTC,BTCD->BTD", g_BTC, w_BTCD, _FLOAT32) - g_BT[..., None] * saved["e"]
    if not lora:
        return dh_BTD, {}
    a_RD, b_RV = lora["A"], lora["B"]
    h_MD, u_MR = saved["h"].reshape(-1, dh_BTD.shape[-1]), _scaled_u(saved["h"], lora, dtype)
    targets_b_BTR = contract("BTC,RBTC->BTR", g_BTC, jnp.take(b_RV, targets_BTC, axis=1), _FLOAT32)
    du_BTR = (targets_b_BTR - g_BT[..., None] * saved["b"]) * lora_scale(a_RD)
    dh_BTD += contract("BTR,RD->BTD", du_BTR, a_RD, dtype)
    grads = {
        "A": contract("MR,MD->RD", du_BTR.reshape(-1, len(a_RD)), h_MD, dtype),
        "B": _unembed_b_grad(saved, u_MR, head_VD, b_RV, targets_BTC, g_BTC, order, dtype, shards, blocks),
    }
    return dh_BTD, grads


@jax.named_scope("lora")
def _unembed_b_grad(
    saved: dict[str, jax.Array],
    u_BTR: jax.Array,
    head_VD: jax.Array,
    b_RV: jax.Array,
    targets_BTC: jax.Array,
    g_BTC: jax.Array,
    order: Order,
    dtype: jnp.dtype,
    shards: int,
    blocks: Blocks,
) -> jax.Array:
    """Return sum_i u_i (sum_c g_ic [v = target_ic] - g_i p_iv), the probabilities p recomputed block by block."""
    (R, V), size = b_RV.shape, blocks.tokens(u_BTR.shape[1])

    def expected(h_MD: jax.Array, u_MR: jax.Array, lse_M: jax.Array, g_M: jax.Array) -> jax.Array:
        gu_RM = (u_MR * g_M[:, None]).T

        def step(carry: tuple[()], w_vD: jax.Array, b_Rv: jax.Array | None) -> tuple[tuple[()], jax.Array]:
            p_Mv = jnp.exp(_block_scores(h_MD, u_MR, w_vD, b_Rv, dtype) - lse_M[:, None])
            return carry, contract("RM,Mv->Rv", gu_RM, p_Mv, dtype)

        def sweep(head_VD: jax.Array, b_RV: jax.Array | None) -> jax.Array:
            _, parts = _over_blocks(step, (), head_VD, b_RV, blocks.entries)
            return jnp.concatenate([jnp.moveaxis(b_nRv, 0, 1).reshape(R, -1) for b_nRv in parts], axis=1)

        return jnp.moveaxis(_each_shard(sweep, shards, head_VD, b_RV), 0, 1).reshape(R, V)

    def row(h_TD: jax.Array, u_TR: jax.Array, lse_T: jax.Array, g_T: jax.Array, order_T: jax.Array) -> jax.Array:
        def add(i: jax.Array, sum_RV: jax.Array) -> jax.Array:
            at_M = jax.lax.dynamic_slice_in_dim(order_T, i * size, size)
            return sum_RV + expected(h_TD[at_M], u_TR[at_M], lse_T[at_M], g_T[at_M])

        return _over_chunks(len(h_TD) // size, 0, -(-order.with_gradient // size), add, jnp.zeros((R, V)))

    g_BT = jnp.sum(g_BTC, axis=-1)
    expected_RV = jnp.sum(_each_row(row, saved["h"], u_BTR, saved["lse"], g_BT, order.token_BT), axis=0)
    gu_BTCR = g_BTC[..., None] * u_BTR[:, :, None]
    hits_VR = jax.ops.segment_sum(gu_BTCR.reshape(-1, R), targets_BTC.reshape(-1), num_segments=V)
    return hits_VR.T - expected_RV
