"""How does attention stay linear in memory, forwards and backwards, with packed segments?

Queries go in static blocks; each sees the keys up to its own end (nothing is computed above the causal diagonal, save
within the block), so the largest array is a block's scores and not (T, S). The backward pass recomputes the
probabilities from the saved logsumexp. Written for one row and one key/value head with its G query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract

QUERY_BLOCK = 128
MASKED = -1e30  # finite: a row whose every score is masked must not turn into NaN


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

    def head(q_GTH: jax.Array, k_SH: jax.Array, v_SH: jax.Array, segments_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        outs, lses = [], []
        for start, end in _blocks(len(k_SH)):
            s_GTS = _scores(q_GTH[:, start:end], k_SH[:end], segments_T, start, dtype)
            m_GT1 = jnp.max(s_GTS, axis=-1, keepdims=True)
            p_GTS = jnp.exp(s_GTS - m_GT1)
            l_GT1 = jnp.sum(p_GTS, axis=-1, keepdims=True)
            outs.append(contract("GTS,SH->GTH", p_GTS, v_SH[:end], dtype) / l_GT1)
            lses.append((m_GT1 + jnp.log(l_GT1))[..., 0])
        return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=-1)

    o_BKGTH, lse_BKGT = _each_head(head, _heads_first(q_BTKGH), _heads_first(k_BTKH), _heads_first(v_BTKH), segments_BT)
    return jnp.moveaxis(o_BKGTH, 3, 1), lse_BKGT


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
    delta_BTKG = jnp.sum(o_BTKGH.astype(jnp.float32) * do_BTKGH, axis=-1)

    def head(
        q_GTH: jax.Array,
        k_SH: jax.Array,
        v_SH: jax.Array,
        do_GTH: jax.Array,
        lse_GT: jax.Array,
        delta_GT: jax.Array,
        segments_T: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        length = len(k_SH)
        dqs: list[jax.Array] = []
        dk_SH, dv_SH = jnp.zeros(k_SH.shape), jnp.zeros(v_SH.shape)
        for start, end in _blocks(length):
            q, k, v, do = q_GTH[:, start:end], k_SH[:end], v_SH[:end], do_GTH[:, start:end]
            p_GTS = jnp.exp(_scores(q, k, segments_T, start, dtype) - lse_GT[:, start:end, None])
            dp_GTS = contract("GTH,SH->GTS", do, v, dtype)
            ds_GTS = p_GTS * (dp_GTS - delta_GT[:, start:end, None]) * q.shape[-1] ** -0.5
            dqs.append(contract("GTS,SH->GTH", ds_GTS, k, dtype))
            rest = ((0, length - end), (0, 0))
            dk_SH += jnp.pad(contract("GTS,GTH->SH", ds_GTS, q, dtype), rest)
            dv_SH += jnp.pad(contract("GTS,GTH->SH", p_GTS, do, dtype), rest)
        return jnp.concatenate(dqs, axis=1), dk_SH, dv_SH

    q, k, v, do = (_heads_first(a) for a in (q_BTKGH, k_BTKH, v_BTKH, do_BTKGH))
    dq, dk, dv = _each_head(head, q, k, v, do, lse_BKGT, jnp.moveaxis(delta_BTKG, 1, 3), segments_BT)
    return jnp.moveaxis(dq, 3, 1), jnp.moveaxis(dk, 2, 1), jnp.moveaxis(dv, 2, 1)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _scores(q_GTH: jax.Array, k_SH: jax.Array, segments_T: jax.Array, start: int, dtype: jnp.dtype) -> jax.Array:
    """Return the scaled scores of a block of queries that begins at `start`, masked where a key is not visible."""
    end = len(k_SH)
    same_TS = segments_T[start:end, None] == segments_T[None, :end]
    visible_TS = same_TS & (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])
    s_GTS = contract("GTH,SH->GTS", q_GTH, k_SH, dtype) * q_GTH.shape[-1] ** -0.5
    return jnp.where(visible_TS, s_GTS, MASKED)


def _heads_first(x_BTK: jax.Array) -> jax.Array:
    """Turn (B, T, K, H) into (B, K, T, H) and (B, T, K, G, H) into (B, K, G, T, H)."""
    return jnp.moveaxis(x_BTK, 1, x_BTK.ndim - 2)


def _each_head(head: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Apply `head` to every row and key/value head at once; the last array, the segments, has no head axis."""
    over_heads = jax.vmap(head, in_axes=(*(0,) * (len(arrays) - 1), None))
    return jax.vmap(over_heads)(*arrays)
