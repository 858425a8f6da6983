"""How does attention stay linear in memory, forwards and backwards, with packed segments?

Queries go in static blocks; each sees the keys up to its own end (nothing is computed above the causal diagonal, save
within the block), so the largest array is a block's scores and not (T, S). The backward pass recomputes the
probabilities from the saved logsumexp. Written for one row and one key/value head with its G query heads, whose queries
stand side by side in a block: X = G x Q of them.

Scores are (S, X), keys first: then no product transposes an array of their size, and what varies by query (its
segment's start, its logsumexp) is a vector along the last axis. The other way round took a CPU twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.models.layers import contract

QUERY_BLOCK = 128
MOST_BLOCKS = 16  # longer rows have longer blocks: every block is compiled separately
MASKED = -1e30  # finite: a row whose every score is masked must not turn into NaN


def attention_forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    dtype: jnp.dtype,
    head_by_head: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attend causally within segments.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. A segment's tokens stand
            next to each other.
        dtype: of the matmul operands.
        head_by_head: run one row and head after the other, so that the scores stay in a CPU's cache; else all at once.

    Returns:
        o_BTKGH float32, and lse_BKnX float32, the logsumexp of each query's scores, for the backward pass.
    """
    size = _block_size(segments_BT.shape[1])

    def head(q_nXH: jax.Array, k_SH: jax.Array, v_HS: jax.Array, start_nX: jax.Array) -> tuple[jax.Array, jax.Array]:
        outs, lses = [], []
        for i, end in enumerate(range(size, len(k_SH) + 1, size)):
            s_SX = _scores(q_nXH[i], k_SH[:end], start_nX[i], size, dtype)
            m_X = jnp.max(s_SX, axis=0)
            p_SX = jnp.exp(s_SX - m_X)
            l_X = jnp.sum(p_SX, axis=0)
            outs.append(contract("HS,SX->HX", v_HS[:, :end], p_SX, dtype) / l_X)
            lses.append(m_X + jnp.log(l_X))
        return jnp.stack(outs), jnp.stack(lses)

    v_BKHS = jnp.moveaxis(v_BTKH, 1, 3)
    args = _to_blocks(q_BTKGH, size), jnp.moveaxis(k_BTKH, 1, 2), v_BKHS, _segment_starts(segments_BT, q_BTKGH, size)
    o_BKnHX, lse_BKnX = _each_head(head, head_by_head, *args)
    return _from_blocks(o_BKnHX, q_BTKGH.shape), lse_BKnX


def attention_backward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    o_BTKGH: jax.Array,
    lse_BKnX: jax.Array,
    do_BTKGH: jax.Array,
    dtype: jnp.dtype,
    head_by_head: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of q, k and v for the cotangent do of `attention_forward`'s output.

    Source: FlashAttention-2, arXiv 2307.08691, section 3.1.
    """
    size, scale = _block_size(segments_BT.shape[1]), q_BTKGH.shape[-1] ** -0.5
    delta_BTKG = jnp.sum(o_BTKGH.astype(jnp.float32) * do_BTKGH, axis=-1)

    def head(
        q_nXH: jax.Array,
        k_SH: jax.Array,
        k_HS: jax.Array,
        v_SH: jax.Array,
        do_nXH: jax.Array,
        lse_nX: jax.Array,
        delta_nX: jax.Array,
        start_nX: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dqs: list[jax.Array] = []
        dk_SH, dv_SH = jnp.zeros(k_SH.shape), jnp.zeros(v_SH.shape)
        for i, end in enumerate(range(size, len(k_SH) + 1, size)):
            p_SX = jnp.exp(_scores(q_nXH[i], k_SH[:end], start_nX[i], size, dtype) - lse_nX[i])
            dp_SX = contract("SH,XH->SX", v_SH[:end], do_nXH[i], dtype)
            ds_SX = p_SX * (dp_SX - delta_nX[i]) * scale
            dqs.append(contract("HS,SX->HX", k_HS[:, :end], ds_SX, dtype))
            rest = ((0, len(k_SH) - end), (0, 0))
            dk_SH += jnp.pad(contract("SX,XH->SH", ds_SX, q_nXH[i], dtype), rest)
            dv_SH += jnp.pad(contract("SX,XH->SH", p_SX, do_nXH[i], dtype), rest)
        return jnp.stack(dqs), dk_SH, dv_SH

    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    q, do, delta = (_to_blocks(a, size) for a in (q_BTKGH, do_BTKGH, delta_BTKG))
    start = _segment_starts(segments_BT, q_BTKGH, size)
    args = q, k_BKSH, jnp.swapaxes(k_BKSH, 2, 3), v_BKSH, do, lse_BKnX, delta, start
    dq_BKnHX, dk_BKSH, dv_BKSH = _each_head(head, head_by_head, *args)
    return _from_blocks(dq_BKnHX, q_BTKGH.shape), jnp.moveaxis(dk_BKSH, 2, 1), jnp.moveaxis(dv_BKSH, 2, 1)


def _block_size(length: int) -> int:
    """Return the largest divisor of the row length up to the block's limit."""
    limit = max(QUERY_BLOCK, length // MOST_BLOCKS)
    return next(size for size in range(min(limit, length), 0, -1) if length % size == 0)


def _scores(q_XH: jax.Array, k_SH: jax.Array, start_X: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Return the scaled scores (S, X) of the block of queries that ends with key S, masked where one is not visible."""
    S, X = len(k_SH), len(q_XH)
    position_X = jnp.asarray(np.tile(np.arange(S - size, S, dtype=np.int32), X // size))
    key_S1 = jnp.arange(S, dtype=jnp.int32)[:, None]
    s_SX = contract("SH,XH->SX", k_SH, q_XH, dtype) * q_XH.shape[-1] ** -0.5
    return jnp.where((key_S1 >= start_X) & (key_S1 <= position_X), s_SX, MASKED)


def _segment_starts(segments_BT: jax.Array, q_BTKGH: jax.Array, size: int) -> jax.Array:
    """Return for each query, in blocks, the place in the row where its segment begins."""
    first_B1 = jnp.ones_like(segments_BT[:, :1], bool)
    begins_BT = jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    place_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    start_BT = jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
    return _to_blocks(jnp.broadcast_to(start_BT[..., None, None], q_BTKGH.shape[:-1]), size)


def _to_blocks(x_BTKG: jax.Array, size: int) -> jax.Array:
    """Turn (B, T, K, G, ...) into (B, K, n, X, ...), each block of queries in one piece."""
    B, T, K, G, *rest = x_BTKG.shape
    x_BnQKG = x_BTKG.reshape(B, T // size, size, K, G, *rest)
    x_BKnGQ = jnp.moveaxis(x_BnQKG, (3, 1, 4, 2), (1, 2, 3, 4))
    return x_BKnGQ.reshape(B, K, T // size, G * size, *rest)


def _from_blocks(x_BKnHX: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Turn (B, K, n, H, X) into (B, T, K, G, H), the given shape."""
    B, T, K, G, H = shape
    n = x_BKnHX.shape[2]
    return jnp.transpose(x_BKnHX.reshape(B, K, n, H, G, T // n), (0, 2, 5, 1, 4, 3)).reshape(shape)


def _each_head(head: Callable[..., Any], one_by_one: bool, *arrays_BK: jax.Array) -> Any:
    """Apply `head` to every row and key/value head."""
    if not one_by_one:
        return jax.vmap(jax.vmap(head))(*arrays_BK)
    rows = arrays_BK[0].shape[:2]
    flat = jax.lax.map(lambda args: head(*args), [a.reshape(-1, *a.shape[2:]) for a in arrays_BK])
    return jax.tree.map(lambda a: a.reshape(*rows, *a.shape[1:]), flat)
