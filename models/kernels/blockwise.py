"""How does attention stay linear in memory, forwards and backwards, in plain JAX?

Queries and keys go in blocks: the largest array is the scores of one block of queries against one of keys. A block of
queries visits the keys with an online softmax; the backward pass recomputes the probabilities from the saved logsumexp.
The queries of a block are those of one key/value head with its G query heads, side by side: X = Q x G of them. s is one
block of the keys S.

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

# Queries, and keys, of one block. Small ones compute less beyond the segments and the diagonal: for the rows of which a
# CPU runs two at once. A longer one runs alone there, and only products of large blocks are spread over the cores.
SMALL_BLOCK, LARGE_BLOCK = 64, 256
SHORT_ROW = 2048  # tokens
MASKED = -1e30  # finite: a block in which a query sees no key must not turn into NaN


def blockwise_forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    dtype: jnp.dtype,
    *,
    one_cpu: bool,
    window: int | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend causally within segments.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. A segment's tokens stand
            next to each other.
        dtype: of the matmul operands.
        one_cpu: take one block of queries after the other, without a copy, and only the keys from the place where its
            first query's segment begins: the work follows the segments and not the row. Else all rows and heads are
            computed at once, over every key that causality allows: a loop whose length differs by row would
            synchronise the devices of a mesh at every turn.
        window: a query sees that many tokens at most, itself included; None for all. Blocks of keys outside are
            skipped.
        sinks: (K, G) float32, a score of each query head that takes its share of the softmax and has no value; None for
            none. They are frozen.
        scale: of the scores; None for 1 / sqrt(H).

    Returns:
        o_BTKGH float32, and lse_BKnX float32, the logsumexp of each query's scores and sink, for the backward pass.

    Source: online softmax, arXiv 1805.02867.
    """
    blocks = _Blocks(q_BTKGH, segments_BT, one_cpu, window)
    factor = q_BTKGH.shape[-1] ** -0.5 if scale is None else scale
    sinks_KX = None if sinks is None else blocks.by_query(sinks)
    v_BKHT = jnp.moveaxis(v_BTKH, 1, 3)
    if one_cpu:

        def one(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            (o_BTKGH, lse_BKnX), at = out, blocks.place(i)

            def keys(j: jax.Array) -> tuple[jax.Array, jax.Array]:
                return blocks.keys(k_BTKH, at, j), blocks.transposed_keys(v_BKHT, at, j)

            sink_X = None if sinks_KX is None else sinks_KX[at[1]]
            queries = blocks.queries(q_BTKGH, at)
            o_HX, lse_X = _attend(queries, keys, blocks.visible(at), blocks.visits(at), dtype, factor, sink_X)
            return blocks.put_queries(o_BTKGH, o_HX, at), lse_BKnX.at[at].set(lse_X)

        nothing = jnp.zeros(q_BTKGH.shape, jnp.float32), jnp.zeros(blocks.shape_BKnX, jnp.float32)
        return jax.lax.fori_loop(0, blocks.count, one, nothing)

    def head(
        q_nXH: jax.Array, k_TH: jax.Array, v_HT: jax.Array, start_nX: jax.Array, sink_X: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        def one(block: Any) -> tuple[jax.Array, jax.Array]:
            q_XH, start_X, position_X, first, end = block

            def keys(j: jax.Array) -> tuple[jax.Array, jax.Array]:
                return blocks.slice(k_TH, j, 0), blocks.slice(v_HT, j, 1)

            visits = 0 if first is None else first, end
            return _attend(q_XH, keys, (start_X, position_X), visits, dtype, factor, sink_X)

        return jax.lax.map(one, (q_nXH, start_nX, blocks.position_nX, blocks.first_n, blocks.end_n))

    heads = jax.vmap(jax.vmap(head), in_axes=(0, 0, 0, 0, None))
    queries = blocks.split(q_BTKGH)
    o_BKnHX, lse_BKnX = heads(queries, jnp.moveaxis(k_BTKH, 1, 2), v_BKHT, blocks.start_BKnX(), sinks_KX)
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
    one_cpu: bool,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of q, k and v for the cotangent do of `blockwise_forward`'s output.

    Sinks are frozen, and lse contains them: there is nothing of them to compute.

    Source: FlashAttention-2, arXiv 2307.08691, section 3.1.
    """
    blocks = _Blocks(q_BTKGH, segments_BT, one_cpu, window)
    factor = q_BTKGH.shape[-1] ** -0.5 if scale is None else scale
    k_BKHT = jnp.moveaxis(k_BTKH, 1, 3)
    # A product with ones, since XLA sums x * y over a short last axis at 12 ns an element on a CPU, 20 times slower.
    ones_H = jnp.ones(q_BTKGH.shape[-1])
    delta_BKnX = blocks.split(contract("BTKGH,H->BTKG", o_BTKGH * do_BTKGH, ones_H, jnp.dtype(jnp.float32)))
    if one_cpu:

        def one(i: jax.Array, out: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            (dq_BTKGH, sums), at = out, blocks.place(i)
            queries = blocks.queries(q_BTKGH, at), blocks.queries(do_BTKGH, at), lse_BKnX[at], delta_BKnX[at]

            def keys(j: jax.Array) -> tuple[jax.Array, ...]:
                return blocks.keys(k_BTKH, at, j), blocks.transposed_keys(k_BKHT, at, j), blocks.keys(v_BTKH, at, j)

            def add(sum_BTKH: jax.Array, new_sH: jax.Array, j: jax.Array) -> jax.Array:
                return blocks.add_keys(sum_BTKH, new_sH, at, j)

            visible, visits = blocks.visible(at), blocks.visits(at)
            dq_HX, sums = _attend_backward(queries, keys, visible, visits, sums, add, dtype, factor)
            return blocks.put_queries(dq_BTKGH, dq_HX, at), sums

        dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q_BTKGH, k_BTKH, v_BTKH))
        dq, (dk, dv) = jax.lax.fori_loop(0, blocks.count, one, (dq, (dk, dv)))
        return dq, dk, dv

    def head(
        queries_n: tuple[jax.Array, ...], k_TH: jax.Array, k_HT: jax.Array, v_TH: jax.Array, start_nX: jax.Array
    ) -> tuple[Any, jax.Array]:
        def one(sums: Any, block: Any) -> tuple[Any, jax.Array]:
            queries, start_X, position_X, first, end = block

            def keys(j: jax.Array) -> tuple[jax.Array, ...]:
                return blocks.slice(k_TH, j, 0), blocks.slice(k_HT, j, 1), blocks.slice(v_TH, j, 0)

            visible, visits = (start_X, position_X), (0 if first is None else first, end)
            dq_HX, sums = _attend_backward(queries, keys, visible, visits, sums, blocks.add_slice, dtype, factor)
            return sums, dq_HX

        nothing = jnp.zeros(k_TH.shape, jnp.float32), jnp.zeros(v_TH.shape, jnp.float32)
        return jax.lax.scan(one, nothing, (queries_n, start_nX, blocks.position_nX, blocks.first_n, blocks.end_n))

    queries = blocks.split(q_BTKGH), blocks.split(do_BTKGH), lse_BKnX, delta_BKnX
    k_BKTH, v_BKTH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    (dk_BKTH, dv_BKTH), dq_BKnHX = jax.vmap(jax.vmap(head))(queries, k_BKTH, k_BKHT, v_BKTH, blocks.start_BKnX())
    return blocks.join(dq_BKnHX), jnp.moveaxis(dk_BKTH, 2, 1), jnp.moveaxis(dv_BKTH, 2, 1)


def softmax_shift(max_score: jax.Array) -> jax.Array:
    """Return what is subtracted from scores before exp: their maximum, rounded up to a multiple of log 2.

    So the keys that were seen before change a probability by a power of two, and its rounding to bfloat16 not at all:
    attention in blocks of any size rounds alike.
    """
    return jnp.ceil(max_score * (1 / math.log(2))) * math.log(2)


def start_with_sinks(sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maximum and the sum of exponentials with which an online softmax begins where there are sinks."""
    sinks = sinks.astype(jnp.float32)
    shift = jnp.maximum(softmax_shift(sinks), sinks)  # rounded up, but for a sink of 1e8 and more, whose steps are wide
    return shift, jnp.exp(sinks - shift)


def _attend(
    q_XH: jax.Array,
    keys: Callable[..., Any],
    visible: tuple[jax.Array, jax.Array],
    visits: tuple[Any, Any],
    dtype: jnp.dtype,
    scale: float,
    sink_X: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return o (H, X) of one block of queries and the logsumexp (X,) of their scores and sinks.

    Args:
        keys: `keys(j) -> (k_sH, v_Hs)` of block j of the keys.
        visible: start_X and position_X, the first and the last place that each query sees.
        visits: the first block of keys to visit, and the one after the last.
        sink_X: scores of the queries' sinks.
    """

    def step(j: jax.Array, carry: Any) -> Any:
        (m_X, l_X, o_HX), (k_sH, v_Hs) = carry, keys(j)
        s_sX = _scores(q_XH, k_sH, *visible, j * len(k_sH), dtype, scale)
        new_m_X = jnp.maximum(m_X, softmax_shift(jnp.max(s_sX, axis=0)))
        # Rounded before they are summed, too: the weights of the values then add up to 1. Summed before, they did not,
        # and trainer and sampler in bfloat16 were 1.7 times as far apart.
        p_sX, decay_X = jnp.exp(s_sX - new_m_X).astype(dtype), jnp.exp(m_X - new_m_X)
        pv_HX = contract("Hs,sX->HX", v_Hs, p_sX, dtype)
        return new_m_X, l_X * decay_X + jnp.sum(p_sX, axis=0, dtype=jnp.float32), o_HX * decay_X + pv_HX

    X, H = q_XH.shape
    start = (jnp.full(X, MASKED), jnp.zeros(X)) if sink_X is None else start_with_sinks(sink_X)
    m_X, l_X, o_HX = jax.lax.fori_loop(*visits, step, (*start, jnp.zeros((H, X))))
    return o_HX / l_X, m_X + jnp.log(l_X)


def _attend_backward(
    queries: tuple[jax.Array, ...],
    keys: Callable[..., Any],
    visible: tuple[jax.Array, jax.Array],
    visits: tuple[Any, Any],
    sums: Any,
    add: Callable[..., jax.Array],
    dtype: jnp.dtype,
    scale: float,
) -> tuple[jax.Array, Any]:
    """Return dq (H, X) of one block of queries, and the sums of dk and dv with its part added.

    Args:
        queries: q_XH, do_XH, lse_X, and delta_X, the sums over H of o x do.
        keys: `keys(j) -> (k_sH, k_Hs, v_sH)` of block j of the keys.
        visible, visits: as for `_attend`.
        add: `add(sum, new_sH, j) -> sum` adds to block j of the keys.
    """
    q_XH, do_XH, lse_X, delta_X = queries

    def step(j: jax.Array, carry: Any) -> Any:
        (dq_HX, (dk, dv)), (k_sH, k_Hs, v_sH) = carry, keys(j)
        # Rounded as in the forward pass, and therefore one array for both of its uses.
        p_sX = jnp.exp(_scores(q_XH, k_sH, *visible, j * len(k_sH), dtype, scale) - lse_X).astype(dtype)
        ds_sX = p_sX * (contract("sH,XH->sX", v_sH, do_XH, dtype) - delta_X) * scale
        dq_HX += contract("Hs,sX->HX", k_Hs, ds_sX, dtype)
        dk = add(dk, contract("sX,XH->sH", ds_sX, q_XH, dtype), j)
        return dq_HX, (dk, add(dv, contract("sX,XH->sH", p_sX, do_XH, dtype), j))

    return jax.lax.fori_loop(*visits, step, (jnp.zeros(q_XH.shape[::-1]), sums))


def _scores(
    q_XH: jax.Array,
    k_sH: jax.Array,
    start_X: jax.Array,
    position_X: jax.Array,
    key: jax.Array,
    dtype: jnp.dtype,
    scale: float,
) -> jax.Array:
    """Return the scaled scores (s, X) against the keys from place `key` on, masked where one is not visible."""
    key_s1 = key + jnp.arange(len(k_sH), dtype=jnp.int32)[:, None]
    s_sX = contract("sH,XH->sX", k_sH, q_XH, dtype) * scale
    return jnp.where((key_s1 >= start_X) & (key_s1 <= position_X), s_sX, MASKED)


class _Blocks:
    """How one pass is cut into blocks: n of the queries of each row and head, and as many of the keys as fit.

    `place`, and what takes its answer `at`, are for one block after the other; the rest for all at once.
    """

    def __init__(self, q_BTKGH: jax.Array, segments_BT: jax.Array, one_cpu: bool, window: int | None):
        self._shape = B, T, K, G, _ = q_BTKGH.shape
        self._queries = self._keys = _divisor(T, SMALL_BLOCK if one_cpu and T <= SHORT_ROW else LARGE_BLOCK)
        n = T // self._queries
        self.count, self.shape_BKnX = B * K * n, (B, K, n, self._queries * G)
        self._start_BT = _segment_starts(segments_BT)
        if window is not None:
            # A row holds each segment in one piece: the difference of places is that of positions.
            self._start_BT = jnp.maximum(self._start_BT, jnp.arange(T, dtype=jnp.int32) - (window - 1))
        places = np.arange(T, dtype=np.int32).reshape(n, self._queries)
        self.position_nX = jnp.asarray(np.repeat(places, G, axis=1))
        # The first block of keys of each block of queries, where a window decides it, and the one after the last.
        first_n = None if window is None else np.maximum(places[:, 0] - (window - 1), 0) // self._keys
        self.first_n = None if first_n is None else jnp.asarray(first_n)
        self.end_n = jnp.asarray(places[:, -1] // self._keys + 1)

    def place(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return row, head and number in the row of block i."""
        _, K, n, _ = self.shape_BKnX
        return i // (K * n), i // n % K, i % n

    def queries(self, x_BTKGH: jax.Array, at: Any) -> jax.Array:
        """Return (X, H) of a block of queries."""
        (b, k, n), (*_, G, H) = at, self._shape
        block = jax.lax.dynamic_slice(x_BTKGH, (b, n * self._queries, k, 0, 0), (1, self._queries, 1, G, H))
        return block.reshape(-1, H)

    def put_queries(self, x_BTKGH: jax.Array, new_HX: jax.Array, at: Any) -> jax.Array:
        """Return x with a block of queries replaced."""
        (b, k, n), (*_, G, H) = at, self._shape
        new_QGH = jnp.moveaxis(new_HX.reshape(H, self._queries, G), 0, 2)
        return jax.lax.dynamic_update_slice(x_BTKGH, new_QGH[None, :, None], (b, n * self._queries, k, 0, 0))

    def visible(self, at: Any) -> tuple[jax.Array, jax.Array]:
        """Return the first and the last place that each query of a block sees, (X,) int32."""
        (b, _, n), G = at, self._shape[3]
        start_1Q = jax.lax.dynamic_slice(self._start_BT, (b, n * self._queries), (1, self._queries))
        return jnp.repeat(start_1Q[0], G), self.position_nX[n]

    def visits(self, at: Any) -> tuple[jax.Array, jax.Array]:
        """Return the first block of keys that a block of queries visits, and the one after the last.

        A segment's tokens stand together: the first query has the earliest key.
        """
        b, _, n = at
        return self._start_BT[b, n * self._queries] // self._keys, self.end_n[n]

    def keys(self, x_BTKH: jax.Array, at: Any, j: jax.Array) -> jax.Array:
        """Return (s, H) of block j of the keys."""
        (b, k, _), H = at, self._shape[-1]
        return jax.lax.dynamic_slice(x_BTKH, (b, j * self._keys, k, 0), (1, self._keys, 1, H)).reshape(-1, H)

    def transposed_keys(self, x_BKHT: jax.Array, at: Any, j: jax.Array) -> jax.Array:
        """Return (H, s) of block j of the keys."""
        (b, k, _), H = at, self._shape[-1]
        return jax.lax.dynamic_slice(x_BKHT, (b, k, 0, j * self._keys), (1, 1, H, self._keys))[0, 0]

    def add_keys(self, x_BTKH: jax.Array, new_sH: jax.Array, at: Any, j: jax.Array) -> jax.Array:
        """Return x with `new` added to block j of the keys."""
        b, k, _ = at
        new = (self.keys(x_BTKH, at, j) + new_sH)[None, :, None]
        return jax.lax.dynamic_update_slice(x_BTKH, new, (b, j * self._keys, k, 0))

    def by_query(self, x_KG: jax.Array) -> jax.Array:
        """Return what each query head has for each query of a block, (K, X)."""
        return jnp.tile(x_KG, (1, self._queries))

    def split(self, x_BTKG: jax.Array) -> jax.Array:
        """Turn (B, T, K, G, ...) into (B, K, n, X, ...)."""
        return jnp.moveaxis(x_BTKG, 1, 2).reshape(*self.shape_BKnX, *x_BTKG.shape[4:])

    def join(self, x_BKnHX: jax.Array) -> jax.Array:
        """Turn (B, K, n, H, X) into (B, T, K, G, H)."""
        B, T, K, G, H = self._shape
        x_BKnHQG = x_BKnHX.reshape(B, K, -1, H, self._queries, G)
        return jnp.transpose(x_BKnHQG, (0, 2, 4, 1, 5, 3)).reshape(B, T, K, G, H)

    def start_BKnX(self) -> jax.Array:
        """Return the first place that each query sees."""
        B, T, K, G, _ = self._shape
        start_BKTG = jnp.broadcast_to(self._start_BT[:, None, :, None], (B, K, T, G))
        return start_BKTG.reshape(self.shape_BKnX)

    def slice(self, x: jax.Array, j: jax.Array, axis: int) -> jax.Array:
        """Return block j of the keys along an axis."""
        return jax.lax.dynamic_slice_in_dim(x, j * self._keys, self._keys, axis)

    def add_slice(self, x_TH: jax.Array, new_sH: jax.Array, j: jax.Array) -> jax.Array:
        """Return x with `new` added to block j of the keys."""
        return jax.lax.dynamic_update_slice_in_dim(x_TH, self.slice(x_TH, j, 0) + new_sH, j * self._keys, 0)


def _divisor(length: int, limit: int) -> int:
    """Return the largest divisor of the row length up to the limit."""
    return next(size for size in range(min(limit, length), 0, -1) if length % size == 0)


def _segment_starts(segments_BT: jax.Array) -> jax.Array:
    """Return for each token the place in the row where its segment begins."""
    first_B1 = jnp.ones_like(segments_BT[:, :1], bool)
    begins_BT = jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    place_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
