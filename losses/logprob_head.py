"""How do target logprobs come from hidden states without a [T, V] array, forwards and backwards?

The vocabulary goes in blocks with an online logsumexp. Beside the running sum the forward pass carries
e = sum_v p_v W_v, so that d logprob / dh = W_target - e needs no second pass over the vocabulary: two matmuls where
recomputing the probabilities takes three. Only an adapter on the head needs them again, for its B.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract
from jax_client.models.lora import lora_scale

VOCAB_BLOCK = 2048
Unembed = Mapping[str, jax.Array]  # {"A": (R, D), "B": (R, V)}, or empty


def _scaled_u(h_BTD: jax.Array, lora: Unembed, dtype: jnp.dtype) -> jax.Array:
    return contract("BTD,RD->BTR", h_BTD, lora["A"], dtype) * lora_scale(lora["A"])


def _block_scores(
    h_BTD: jax.Array, u_BTR: jax.Array | None, w_SvD: jax.Array, b_RSv: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    s_BTSv = contract("BTD,SvD->BTSv", h_BTD, w_SvD, dtype)
    return s_BTSv if u_BTR is None or b_RSv is None else s_BTSv + contract("BTR,RSv->BTSv", u_BTR, b_RSv, dtype)


def _over_blocks(size: int, step: Any, carry: Any) -> tuple[Any, list[Any]]:
    """Run step(carry, start, width) over blocks of one vocabulary shard; the last one may be narrower."""
    whole = size // VOCAB_BLOCK
    outs = []
    if whole:
        scan_step = lambda c, i: step(c, i * VOCAB_BLOCK, VOCAB_BLOCK)  # noqa: E731
        carry, ys = jax.lax.scan(scan_step, carry, jnp.arange(whole))
        outs.append(ys)
    if tail := size - whole * VOCAB_BLOCK:
        carry, y = step(carry, whole * VOCAB_BLOCK, tail)
        outs.append(jax.tree.map(lambda a: a[None], y))
    return carry, outs


def head_forward(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    lora: Unembed,
    targets_BTC: jax.Array,
    *,
    dtype: jnp.dtype,
    shards: int,
    with_backward: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return log p(targets | h), and what `head_backward` needs.

    Args:
        h_BTD: float32 hidden states after the final norm.
        head_VD: output projection in the matmul type.
        lora: the adapter on the head, or {}.
        targets_BTC: int32 token ids, C per position.
        shards: ways that V is split over the mesh; each shard keeps its own running sums, merged at the end.
        with_backward: also carry e. Without it the second result is empty.

    Returns:
        logprobs_BTC float32, in nats. Largest temporary: (B, T, shards, VOCAB_BLOCK) float32.

    Source: online softmax, arXiv 1805.02867.
    """
    B, T, D = h_BTD.shape
    V = head_VD.shape[0]
    head_SVD = head_VD.reshape(shards, V // shards, D)
    u_BTR = _scaled_u(h_BTD, lora, dtype) if lora else None
    b_RSV = lora["B"].reshape(-1, shards, V // shards) if lora else None
    take = jax.lax.dynamic_slice_in_dim

    def step(carry: dict[str, jax.Array], start: Any, width: int) -> tuple[dict[str, jax.Array], None]:
        w_SvD = take(head_SVD, start, width, axis=1)
        b_RSv = None if b_RSV is None else take(b_RSV, start, width, axis=2)
        s_BTSv = _block_scores(h_BTD, u_BTR, w_SvD, b_RSv, dtype)
        m_BTS = jnp.maximum(carry["m"], jnp.max(s_BTSv, axis=-1))
        p_BTSv = jnp.exp(s_BTSv - m_BTS[..., None])
        decay_BTS = jnp.exp(carry["m"] - m_BTS)
        new = {"m": m_BTS, "l": carry["l"] * decay_BTS + jnp.sum(p_BTSv, axis=-1)}
        if with_backward:
            new["e"] = carry["e"] * decay_BTS[..., None] + contract("BTSv,SvD->BTSD", p_BTSv, w_SvD, dtype)
        if with_backward and b_RSv is not None:
            new["b"] = carry["b"] * decay_BTS[..., None] + contract("BTSv,RSv->BTSR", p_BTSv, b_RSv, dtype)
        return new, None

    carry = {"m": jnp.full((B, T, shards), -jnp.inf), "l": jnp.zeros((B, T, shards))}
    if with_backward:
        carry["e"] = jnp.zeros((B, T, shards, D))
    if with_backward and b_RSV is not None:
        carry["b"] = jnp.zeros((B, T, shards, b_RSV.shape[0]))
    carry, _ = _over_blocks(V // shards, step, carry)

    m_BT = jnp.max(carry["m"], axis=-1)
    weight_BTS = jnp.exp(carry["m"] - m_BT[..., None])
    l_BT = jnp.sum(carry["l"] * weight_BTS, axis=-1)
    lse_BT = m_BT + jnp.log(l_BT)
    logits_BTC = _target_logits(h_BTD, u_BTR, head_VD, lora, targets_BTC, dtype)
    saved = {}
    if with_backward:
        weight_BTS = weight_BTS / l_BT[..., None]
        saved = {"h": h_BTD.astype(dtype), "lse": lse_BT, "e": jnp.einsum("BTSD,BTS->BTD", carry["e"], weight_BTS)}
        if b_RSV is not None:
            saved["b"] = jnp.einsum("BTSR,BTS->BTR", carry["b"], weight_BTS)
    return logits_BTC - lse_BT[..., None], saved


def _target_logits(
    h_BTD: jax.Array,
    u_BTR: jax.Array | None,
    head_VD: jax.Array,
    lora: Unembed,
    targets_BTC: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    w_BTCD = jnp.take(head_VD, targets_BTC, axis=0)
    logits_BTC = contract("BTD,BTCD->BTC", h_BTD, w_BTCD, dtype)
    if u_BTR is not None:
        logits_BTC += contract("BTR,RBTC->BTC", u_BTR, jnp.take(lora["B"], targets_BTC, axis=1), dtype)
    return logits_BTC


def head_backward(
    saved: dict[str, jax.Array],
    head_VD: jax.Array,
    lora: Unembed,
    targets_BTC: jax.Array,
    g_BTC: jax.Array,
    *,
    dtype: jnp.dtype,
    shards: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return dh (B, T, D) float32 and the gradients of the head's adapter, for the cotangents g of the logprobs.

    The frozen head gets no gradient.
    """
    g_BT = jnp.sum(g_BTC, axis=-1)
    w_BTCD = jnp.take(head_VD, targets_BTC, axis=0)
    dh_BTD = jnp.einsum("BTC,BTCD->BTD", g_BTC, w_BTCD.astype(jnp.float32)) - g_BT[..., None] * saved["e"]
    if not lora:
        return dh_BTD, {}
    scale = lora_scale(lora["A"])
    h_BTD = saved["h"]
    u_BTR = _scaled_u(h_BTD, lora, dtype)
    targets_b = jnp.einsum("BTC,RBTC->BTR", g_BTC, jnp.take(lora["B"], targets_BTC, axis=1))
    du_BTR = (targets_b - g_BT[..., None] * saved["b"]) * scale
    dh_BTD += contract("BTR,RD->BTD", du_BTR, lora["A"], dtype)
    grads = {
        "A": contract("BTR,BTD->RD", du_BTR, h_BTD, dtype),
        "B": _unembed_b_grad(h_BTD, u_BTR, head_VD, lora["B"], saved["lse"], targets_BTC, g_BTC, dtype, shards),
    }
    return dh_BTD, grads


def _unembed_b_grad(
    h_BTD: jax.Array,
    u_BTR: jax.Array,
    head_VD: jax.Array,
    b_RV: jax.Array,
    lse_BT: jax.Array,
    targets_BTC: jax.Array,
    g_BTC: jax.Array,
    dtype: jnp.dtype,
    shards: int,
) -> jax.Array:
    """Return sum_i u_i (sum_c g_ic [v = target_ic] - g_i p_iv), the probabilities p recomputed block by block."""
    (R, V), D = b_RV.shape, head_VD.shape[1]
    head_SVD, b_RSV = head_VD.reshape(shards, V // shards, D), b_RV.reshape(R, shards, V // shards)
    gu_BTR = u_BTR * jnp.sum(g_BTC, axis=-1)[..., None]
    take = jax.lax.dynamic_slice_in_dim

    def step(carry: tuple[()], start: Any, width: int) -> tuple[tuple[()], jax.Array]:
        w_SvD, b_RSv = take(head_SVD, start, width, axis=1), take(b_RSV, start, width, axis=2)
        s_BTSv = _block_scores(h_BTD, u_BTR, w_SvD, b_RSv, dtype)
        p_BTSv = jnp.exp(s_BTSv - lse_BT[..., None, None])
        return carry, contract("BTR,BTSv->RSv", gu_BTR, p_BTSv, dtype)

    _, blocks = _over_blocks(V // shards, step, ())
    expected_RSV = jnp.concatenate([jnp.moveaxis(b, 0, 2).reshape(R, shards, -1) for b in blocks], axis=2)
    gu_BTCR = g_BTC[..., None] * u_BTR[:, :, None]
    rows = (targets_BTC.reshape(-1), gu_BTCR.reshape(-1, R))
    hits_VR = partial(jax.ops.segment_sum, num_segments=V)(rows[1], rows[0])
    return hits_VR.T - expected_RSV.reshape(R, V)
