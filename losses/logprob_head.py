"""How do target logprobs come from hidden states without a [T, V] array, forwards and backwards?

The vocabulary goes in blocks with an online logsumexp. Beside the running sum the forward pass carries
e = sum_v p_v W_v, so that d logprob / dh = W_target - e needs no second pass over the vocabulary: two matmuls where
recomputing the probabilities takes three. Only an adapter on the head needs them again, for its B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract, from_bits, to_bits
from jax_client.models.lora import lora_scale

VOCAB_BLOCK = 2048
Unembed = Mapping[str, jax.Array]  # {"A": (R, D), "B": (R, V)}, or empty


def _scaled_u(h_MD: jax.Array, lora: Unembed, dtype: jnp.dtype) -> jax.Array:
    return contract("MD,RD->MR", h_MD, lora["A"], dtype) * lora_scale(lora["A"])


def _block_scores(
    h_MD: jax.Array, u_MR: jax.Array | None, w_vD: jax.Array, b_Rv: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    s_Mv = contract("MD,vD->Mv", h_MD, w_vD, dtype)
    return s_Mv if u_MR is None or b_Rv is None else s_Mv + contract("MR,Rv->Mv", u_MR, b_Rv, dtype)


def _over_blocks(step: Any, carry: Any, head_VD: jax.Array, b_RV: jax.Array | None) -> tuple[Any, list[Any]]:
    """Run step(carry, w_vD, b_Rv) over blocks of one vocabulary shard; the last one may be narrower."""
    bits_VD, size = to_bits(head_VD), len(head_VD)

    def block(carry: Any, start: Any, width: int) -> tuple[Any, Any]:
        w_vD = from_bits(jax.lax.dynamic_slice_in_dim(bits_VD, start, width))
        b_Rv = None if b_RV is None else jax.lax.dynamic_slice_in_dim(b_RV, start, width, axis=1)
        return step(carry, w_vD, b_Rv)

    whole, outs = size // VOCAB_BLOCK, []
    if whole:
        carry, ys = jax.lax.scan(lambda c, i: block(c, i * VOCAB_BLOCK, VOCAB_BLOCK), carry, jnp.arange(whole))
        outs.append(ys)
    if tail := size - whole * VOCAB_BLOCK:
        carry, y = block(carry, whole * VOCAB_BLOCK, tail)
        outs.append(jax.tree.map(lambda a: a[None], y))
    return carry, outs


def _each_shard(sweep: Any, shards: int, head_VD: jax.Array, b_RV: jax.Array | None) -> Any:
    """Return sweep(head, b) of each vocabulary shard, stacked on a leading axis that the mesh splits.

    One shard goes without that axis: XLA's CPU backend has no bfloat16 path for a matmul with a batch axis.
    """
    if shards == 1:
        return jax.tree.map(lambda a: a[None], sweep(head_VD, b_RV))
    head_SVD = head_VD.reshape(shards, -1, head_VD.shape[1])
    b_SRV = None if b_RV is None else jnp.moveaxis(b_RV.reshape(len(b_RV), shards, -1), 1, 0)
    return jax.vmap(sweep, in_axes=(0, None if b_SRV is None else 0))(head_SVD, b_SRV)


def head_forward(
    h_MD: jax.Array,
    head_VD: jax.Array,
    lora: Unembed,
    targets_MC: jax.Array,
    *,
    dtype: jnp.dtype,
    shards: int,
    with_backward: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return log p(targets | h), and what `head_backward` needs.

    Args:
        h_MD: float32 hidden states after the final norm, one per position.
        head_VD: output projection in the matmul type.
        lora: the adapter on the head, or {}.
        targets_MC: int32 token ids, C per position.
        shards: ways that V is split over the mesh; each shard keeps its own running sums, merged at the end.
        with_backward: also carry e. Without it the second result is empty.

    Returns:
        logprobs_MC float32, in nats. Largest temporary: (shards, M, VOCAB_BLOCK) float32.

    Source: online softmax, arXiv 1805.02867.
    """
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
        return _over_blocks(step, carry, head_VD, b_RV)[0]

    carry = _each_shard(sweep, shards, head_VD, lora["B"] if lora else None)
    m_M = jnp.max(carry["m"], axis=0)
    weight_SM = jnp.exp(carry["m"] - m_M)
    l_M = jnp.sum(carry["l"] * weight_SM, axis=0)
    lse_M = m_M + jnp.log(l_M)
    logits_MC = _target_logits(h_MD, u_MR, head_VD, lora, targets_MC, dtype)
    saved = {}
    if with_backward:
        weight_SM = weight_SM / l_M
        saved = {"h": h_MD.astype(dtype), "lse": lse_M, "e": jnp.einsum("SMD,SM->MD", carry["e"], weight_SM)}
        if lora:
            saved["b"] = jnp.einsum("SMR,SM->MR", carry["b"], weight_SM)
    return logits_MC - lse_M[:, None], saved


def _target_logits(
    h_MD: jax.Array,
    u_MR: jax.Array | None,
    head_VD: jax.Array,
    lora: Unembed,
    targets_MC: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    w_MCD = from_bits(jnp.take(to_bits(head_VD), targets_MC, axis=0))
    logits_MC = contract("MD,MCD->MC", h_MD, w_MCD, dtype)
    if u_MR is not None:
        logits_MC += contract("MR,RMC->MC", u_MR, jnp.take(lora["B"], targets_MC, axis=1), dtype)
    return logits_MC


def head_backward(
    saved: dict[str, jax.Array],
    head_VD: jax.Array,
    lora: Unembed,
    targets_MC: jax.Array,
    g_MC: jax.Array,
    *,
    dtype: jnp.dtype,
    shards: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return dh (M, D) float32 and the gradients of the head's adapter, for the cotangents g of the logprobs.

    The frozen head gets no gradient.
    """
    g_M = jnp.sum(g_MC, axis=-1)
    w_MCD = from_bits(jnp.take(to_bits(head_VD), targets_MC, axis=0))
    dh_MD = jnp.einsum("MC,MCD->MD", g_MC, w_MCD.astype(jnp.float32)) - g_M[:, None] * saved["e"]
    if not lora:
        return dh_MD, {}
    scale = lora_scale(lora["A"])
    h_MD = saved["h"]
    u_MR = _scaled_u(h_MD, lora, dtype)
    targets_b = jnp.einsum("MC,RMC->MR", g_MC, jnp.take(lora["B"], targets_MC, axis=1))
    du_MR = (targets_b - g_M[:, None] * saved["b"]) * scale
    dh_MD += contract("MR,RD->MD", du_MR, lora["A"], dtype)
    grads = {
        "A": contract("MR,MD->RD", du_MR, h_MD, dtype),
        "B": _unembed_b_grad(h_MD, u_MR, head_VD, lora["B"], saved["lse"], targets_MC, g_MC, dtype, shards),
    }
    return dh_MD, grads


def _unembed_b_grad(
    h_MD: jax.Array,
    u_MR: jax.Array,
    head_VD: jax.Array,
    b_RV: jax.Array,
    lse_M: jax.Array,
    targets_MC: jax.Array,
    g_MC: jax.Array,
    dtype: jnp.dtype,
    shards: int,
) -> jax.Array:
    """Return sum_i u_i (sum_c g_ic [v = target_ic] - g_i p_iv), the probabilities p recomputed block by block."""
    R, V = b_RV.shape
    gu_RM = (u_MR * jnp.sum(g_MC, axis=-1)[:, None]).T

    def step(carry: tuple[()], w_vD: jax.Array, b_Rv: jax.Array | None) -> tuple[tuple[()], jax.Array]:
        p_Mv = jnp.exp(_block_scores(h_MD, u_MR, w_vD, b_Rv, dtype) - lse_M[:, None])
        return carry, contract("RM,Mv->Rv", gu_RM, p_Mv, dtype)

    def sweep(head_VD: jax.Array, b_RV: jax.Array | None) -> jax.Array:
        _, blocks = _over_blocks(step, (), head_VD, b_RV)
        return jnp.concatenate([jnp.moveaxis(b_nRv, 0, 1).reshape(R, -1) for b_nRv in blocks], axis=1)

    expected_SRV = _each_shard(sweep, shards, head_VD, b_RV)
    gu_MCR = g_MC[..., None] * u_MR[:, None]
    hits_VR = jax.ops.segment_sum(gu_MCR.reshape(-1, R), targets_MC.reshape(-1), num_segments=V)
    return hits_VR.T - jnp.moveaxis(expected_SRV, 0, 1).reshape(R, V)
