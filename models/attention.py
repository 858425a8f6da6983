"""How does attention stay linear in memory, forwards and backwards, with packed segments?

Queries go in static blocks; each sees the keys up to its own end (nothing is computed above the causal diagonal, save
within the block), so the largest array is (B, K, G, block, S) and not (B, K, G, T, S). The backward pass recomputes the
probabilities from the saved logsumexp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract

QUERY_BLOCK = 256
MASKED = -1e30  # finite: a row whose every score is masked must not turn into NaN


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _scores(q_BTKGH: jax.Array, k_BSKH: jax.Array, visible_BTS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    s_BKGTS = contract("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, dtype) * q_BTKGH.shape[-1] ** -0.5
    return jnp.where(visible_BTS[:, None, None], s_BKGTS, MASKED)


def _visible(segments_BT: jax.Array, start: int, end: int) -> jax.Array:
    same_BTS = segments_BT[:, start:end, None] == segments_BT[:, None, :end]
    causal_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
    return same_BTS & causal_TS


def attention_forward(
    q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Attend causally within segments.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id.
        dtype: of the matmul operands.

    Returns:
        o_BTKGH float32, and lse_BKGT float32, the logsumexp of each query's scores, for the backward pass.
    """
    outs, lses = [], []
    for start, end in _blocks(q_BTKGH.shape[1]):
        visible_BTS = _visible(segments_BT, start, end)
        s_BKGTS = _scores(q_BTKGH[:, start:end], k_BTKH[:, :end], visible_BTS, dtype)
        m_BKGT1 = jnp.max(s_BKGTS, axis=-1, keepdims=True)
        p_BKGTS = jnp.exp(s_BKGTS - m_BKGT1)
        l_BKGT = jnp.sum(p_BKGTS, axis=-1)
        o_BTKGH = contract("BKGTS,BSKH->BTKGH", p_BKGTS, v_BTKH[:, :end], dtype)
        outs.append(o_BTKGH / jnp.moveaxis(l_BKGT, 3, 1)[..., None])
        lses.append(m_BKGT1[..., 0] + jnp.log(l_BKGT))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=-1)


def attention_backward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    o_BTKGH: jax.Array,
    lse_BKGT: jax.Array,
    do_BTKGH: jax.Array,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of q, k and v for the cotangent do of `attention_forward`'s output.

    Source: FlashAttention-2, arXiv 2307.08691, section 3.1.
    """
    length = q_BTKGH.shape[1]
    delta_BKGT = jnp.einsum("BTKGH,BTKGH->BKGT", o_BTKGH.astype(jnp.float32), do_BTKGH)
    dqs, dk_BTKH, dv_BTKH = [], 0.0, 0.0
    for start, end in _blocks(length):
        q, k, v, do = q_BTKGH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], do_BTKGH[:, start:end]
        s_BKGTS = _scores(q, k, _visible(segments_BT, start, end), dtype)
        p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT[..., start:end, None])
        dp_BKGTS = contract("BTKGH,BSKH->BKGTS", do, v, dtype)
        ds_BKGTS = p_BKGTS * (dp_BKGTS - delta_BKGT[..., start:end, None]) * q.shape[-1] ** -0.5
        dqs.append(contract("BKGTS,BSKH->BTKGH", ds_BKGTS, k, dtype))
        rest = ((0, 0), (0, length - end), (0, 0), (0, 0))
        dk_BTKH += jnp.pad(contract("BKGTS,BTKGH->BSKH", ds_BKGTS, q, dtype), rest)
        dv_BTKH += jnp.pad(contract("BKGTS,BTKGH->BSKH", p_BKGTS, do, dtype), rest)
    return jnp.concatenate(dqs, axis=1), dk_BTKH, dv_BTKH
