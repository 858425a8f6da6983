"""How does attention stay linear in memory, forwards and backwards, in plain JAX?

Queries and keys go in blocks: the largest array is the scores of one block of queries against one of keys. A block of
queries visits the keys from the place where its first query's segment begins up to its own end, with an online softmax;
so on one CPU the work follows the segments and not the row. The backward pass recomputes the probabilities from the
saved logsumexp. Written for one row and one key/value head with its G query heads, whose queries stand side by side in
a block: X = G x Q of them. s is one block of the keys S.

Scores are (s, X), keys first: then no product transposes an array of their size, and what varies by query (its
segment's start, its logsumexp) is a vector along the last axis. The other way round took a CPU twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.models.layers import contract

QUERY_BLOCK = 256
KEY_BLOCK = 256
MASKED = -1e30  # finite: a block in which a query sees no key must not turn into NaN


def blockwise_forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    dtype: jnp.dtype,
    *,
    head_by_head: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attend causally within segments.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. A segment's tokens stand
            next to each other.
        dtype: of the matmul operands.
        head_by_head: run one row and head after the other and skip the keys before a block's segments, for one CPU;
            else all at once, over every key that causality allows (a loop whose length differs by row would
            synchronise the devices of a mesh at every turn).

    Returns:
        o_BTKGH float32, and lse_BKnX float32, the logsumexp of each query's scores, for the backward pass.

    Source: online softmax, arXiv 1805.02867.
    """
    blocks = _Blocks(q_BTKGH, segments_BT, head_by_head)

    def head(q_nXH: jax.Array, k_SH: jax.Array, v_HS: jax.Array, start_nX: jax.Array, first_n: Any) -> Any:
        def attend(block: Any) -> tuple[jax.Array, jax.Array]:
            q_XH, start_X, position_X, first, end = block

            def step(j: jax.Array, carry: Any) -> Any:
                m_X, l_X, o_HX = carry
                s_sX = _scores(q_XH, blocks.keys(k_SH, j), start_X, position_X, j * blocks.key_size, dtype)
                new_m_X = jnp.maximum(m_X, softmax_shift(jnp.max(s_sX, axis=0)))
                # Rounded before they are summed, too: the weights of the values then add up to 1. Summed before, they
                # did not, and trainer and sampler in bfloat16 were 1.7 times as far apart.
                p_sX, decay_X = jnp.exp(s_sX - new_m_X).astype(dtype), jnp.exp(m_X - new_m_X)
                pv_HX = contract("Hs,sX->HX", blocks.keys(v_HS, j, axis=1), p_sX, dtype)
                return new_m_X, l_X * decay_X + jnp.sum(p_sX, axis=0, dtype=jnp.float32), o_HX * decay_X + pv_HX

            X, H = q_XH.shape
            start = jnp.full(X, MASKED), jnp.zeros(X), jnp.zeros((H, X))
            m_X, l_X, o_HX = jax.lax.fori_loop(first, end, step, start)
            return o_HX / l_X, m_X + jnp.log(l_X)

        return jax.lax.map(attend, (q_nXH, start_nX, blocks.position_nX, first_n, blocks.end_n))

    args = blocks.split(q_BTKGH), jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 3)
    o_BKnHX, lse_BKnX = blocks.each_head(head, *args)
    return blocks.join(o_BKnHX), lse_BKnX


def blockwise_backward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    o_BTKGH: jax.Array,
    lse_BKnX: jax.Array,
    do_BTKGH: jax.Array,
    dtype: jnp.dtype,
    *,
    head_by_head: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of q, k and v for the cotangent do of `blockwise_forward`'s output.

    Source: FlashAttention-2, arXiv 2307.08691, section 3.1.
    """
    blocks, scale = _Blocks(q_BTKGH, segments_BT, head_by_head), q_BTKGH.shape[-1] ** -0.5
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
        first_n: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def attend(sums: Any, block: Any) -> tuple[Any, jax.Array]:
            q_XH, do_XH, lse_X, delta_X, start_X, position_X, first, end = block

            def step(j: jax.Array, carry: Any) -> Any:
                dq_HX, dk_SH, dv_SH = carry
                s_sX = _scores(q_XH, blocks.keys(k_SH, j), start_X, position_X, j * blocks.key_size, dtype)
                p_sX = jnp.exp(s_sX - lse_X)
                dp_sX = contract("sH,XH->sX", blocks.keys(v_SH, j), do_XH, dtype)
                ds_sX = p_sX * (dp_sX - delta_X) * scale
                dq_HX += contract("Hs,sX->HX", blocks.keys(k_HS, j, axis=1), ds_sX, dtype)
                dk_SH = blocks.add_keys(dk_SH, contract("sX,XH->sH", ds_sX, q_XH, dtype), j)
                dv_SH = blocks.add_keys(dv_SH, contract("sX,XH->sH", p_sX, do_XH, dtype), j)
                return dq_HX, dk_SH, dv_SH

            dq_HX, *sums = jax.lax.fori_loop(first, end, step, (jnp.zeros(q_XH.shape[::-1]), *sums))
            return tuple(sums), dq_HX

        nothing = jnp.zeros(k_SH.shape), jnp.zeros(v_SH.shape)
        queries = q_nXH, do_nXH, lse_nX, delta_nX, start_nX, blocks.position_nX, first_n, blocks.end_n
        (dk_SH, dv_SH), dq_nHX = jax.lax.scan(attend, nothing, queries)
        return dq_nHX, dk_SH, dv_SH

    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    q, do, delta = (blocks.split(a) for a in (q_BTKGH, do_BTKGH, delta_BTKG))
    args = q, k_BKSH, jnp.swapaxes(k_BKSH, 2, 3), v_BKSH, do, lse_BKnX, delta
    dq_BKnHX, dk_BKSH, dv_BKSH = blocks.each_head(head, *args)
    return blocks.join(dq_BKnHX), jnp.moveaxis(dk_BKSH, 2, 1), jnp.moveaxis(dv_BKSH, 2, 1)


def softmax_shift(max_score: jax.Array) -> jax.Array:
    """Return what is subtracted from scores before exp: their maximum, rounded up to a multiple of log 2.

    So the keys that were seen before change a probability by a power of two, and its rounding to bfloat16 not at all:
    attention in blocks of any size rounds alike.
    """
    return jnp.ceil(max_score * (1 / math.log(2))) * math.log(2)


def _scores(
    q_XH: jax.Array, k_sH: jax.Array, start_X: jax.Array, position_X: jax.Array, key: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return the scaled scores (s, X) against the keys from place `key` on, masked where one is not visible."""
    key_s1 = key + jnp.arange(len(k_sH), dtype=jnp.int32)[:, None]
    s_sX = contract("sH,XH->sX", k_sH, q_XH, dtype) * q_XH.shape[-1] ** -0.5
    return jnp.where((key_s1 >= start_X) & (key_s1 <= position_X), s_sX, MASKED)


class _Blocks:
    """How one pass is cut: n blocks of queries and, for each, the blocks of keys that it visits."""

    def __init__(self, q_BTKGH: jax.Array, segments_BT: jax.Array, head_by_head: bool):
        self.shape = q_BTKGH.shape
        T, G = self.shape[1], self.shape[3]
        self.query_size, self.key_size = _divisor(T, QUERY_BLOCK), _divisor(T, KEY_BLOCK)
        self.n = T // self.query_size
        ends = np.arange(1, self.n + 1) * self.query_size
        self.end_n = jnp.asarray(-(-ends // self.key_size), jnp.int32)
        places = np.arange(T).reshape(self.n, self.query_size)
        self.position_nX = jnp.asarray(np.tile(places, G), jnp.int32)
        self._one_by_one = head_by_head
        start_BT = _segment_starts(segments_BT)
        self._start_BKnX = self.split(jnp.broadcast_to(start_BT[..., None, None], self.shape[:-1]))
        # A segment's tokens stand together: the first query of a block has its earliest key.
        self._first_Bn = start_BT[:, :: self.query_size] // self.key_size

    def split(self, x_BTKG: jax.Array) -> jax.Array:
        """Turn (B, T, K, G, ...) into (B, K, n, X, ...), each block of queries in one piece."""
        B, _, K, G, *rest = x_BTKG.shape
        x_BnQKG = x_BTKG.reshape(B, self.n, self.query_size, K, G, *rest)
        x_BKnGQ = jnp.moveaxis(x_BnQKG, (3, 1, 4, 2), (1, 2, 3, 4))
        return x_BKnGQ.reshape(B, K, self.n, G * self.query_size, *rest)

    def join(self, x_BKnHX: jax.Array) -> jax.Array:
        """Turn (B, K, n, H, X) into (B, T, K, G, H)."""
        B, _, K, G, H = self.shape
        x_BKnHGQ = x_BKnHX.reshape(B, K, self.n, H, G, self.query_size)
        return jnp.transpose(x_BKnHGQ, (0, 2, 5, 1, 4, 3)).reshape(self.shape)

    def keys(self, x: jax.Array, j: jax.Array, axis: int = 0) -> jax.Array:
        """Return block j of an array that is as long as the row along `axis`."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.key_size, self.key_size, axis)

    def add_keys(self, x_SH: jax.Array, new_sH: jax.Array, j: jax.Array) -> jax.Array:
        """Return x with `new` added to its block j."""
        return jax.lax.dynamic_update_slice_in_dim(x_SH, self.keys(x_SH, j) + new_sH, j * self.key_size, 0)

    def each_head(self, head: Callable[..., Any], *arrays_BK: jax.Array) -> Any:
        """Apply head(*arrays, start_nX, first_n) to every row and key/value head."""
        arrays = (*arrays_BK, self._start_BKnX)
        if not self._one_by_one:
            whole = lambda *args: head(*args, jnp.zeros_like(self.end_n))  # noqa: E731
            return jax.vmap(jax.vmap(whole))(*arrays)
        B, K = arrays[0].shape[:2]
        first = jnp.repeat(self._first_Bn, K, axis=0)
        flat = jax.lax.map(lambda args: head(*args), (*(a.reshape(B * K, *a.shape[2:]) for a in arrays), first))
        return jax.tree.map(lambda a: a.reshape(B, K, *a.shape[1:]), flat)


def _divisor(length: int, limit: int) -> int:
    """Return the largest divisor of the row length up to the limit."""
    return next(size for size in range(min(limit, length), 0, -1) if length % size == 0)


def _segment_starts(segments_BT: jax.Array) -> jax.Array:
    """Return for each token the place in the row where its segment begins."""
    first_B1 = jnp.ones_like(segments_BT[:, :1], bool)
    begins_BT = jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    place_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
