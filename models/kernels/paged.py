"""How does attention read keys and values that lie in pages, and how do new ones get there?

The pool is (N, S, K, H), or (N, S, K x H): N pages, each with the keys (or values) of S successive tokens of one row in
one layer. A row's pages of a layer stand in a table in the order of its tokens. The queries of all rows visit their
tables in turns of some pages with an online softmax, as far as the longest row reaches: the work follows the live
context and not the capacity, and a row's sums do not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_client.models.kernels.blockwise import MASKED, softmax_shift, start_with_sinks
from jax_client.models.layers import contract, from_bits, to_bits

BLOCK = 2  # pages of one turn: 64 keys; one page or four took a CPU longer, and eight a prompt, too


def write_tokens(
    k_NSKH: jax.Array, v_NSKH: jax.Array, k_RKH: jax.Array, v_RKH: jax.Array, page_R: jax.Array, place_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with one token of each row stored at (page, place in the page)."""
    k_RKH, v_RKH = (_as_stored(x, k_NSKH, 1) for x in storable(k_RKH, v_RKH))
    return k_NSKH.at[page_R, place_R].set(k_RKH), v_NSKH.at[page_R, place_R].set(v_RKH)


def write_pages(
    k_NSKH: jax.Array,
    v_NSKH: jax.Array,
    k_RSKH: jax.Array,
    v_RSKH: jax.Array,
    page_R: jax.Array,
    *,
    one_by_one: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with a whole page of each row stored, at once or as `store_one_by_one` does."""
    k_RSKH, v_RSKH = (_as_stored(x, k_NSKH, 2) for x in storable(k_RSKH, v_RSKH))
    if one_by_one:
        return store_one_by_one(k_NSKH, k_RSKH, page_R), store_one_by_one(v_NSKH, v_RSKH, page_R)
    return k_NSKH.at[page_R].set(k_RSKH), v_NSKH.at[page_R].set(v_RSKH)


def store_one_by_one(pool_NSCH: jax.Array, new_RSCH: jax.Array, page_R: jax.Array) -> jax.Array:
    """Return the pool with a whole page of each row stored, one after the other, as a TPU has to.

    Of few heads, XLA's compiler for TPUs lays a pool that whole pages are scattered into out with tokens and not heads
    in the tiles: it copies the pool as the program begins and ends, and in each layer for the kernel that reads it.

    Args:
        pool_NSCH: N pages of S tokens.
        new_RSCH: in the pool's type.
        page_R: int32, where they are stored.
    """

    def store(i: jax.Array, pool_NSCH: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(pool_NSCH, new_RSCH[i], page_R[i], axis=0)

    return jax.lax.fori_loop(0, len(page_R), store, pool_NSCH)


def _as_stored(x: jax.Array, pool: jax.Array, rows: int) -> jax.Array:
    """Return new tokens, whose first `rows` axes count them, in the shape that the pool has for one.

    Of bfloat16 the bits, for a pool of bits, which a CPU has; a pool of numbers would take bits as numbers.
    """
    x = x.reshape(*x.shape[:rows], *pool.shape[2:])
    return to_bits(x) if pool.dtype == jnp.uint16 else x


def storable(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values without a value that is not finite: its key becomes NaN.

    A page's next row does not see what lies behind its own last token, of any adapter: it replaces the scores, but
    gives the values weight 0, and 0 times NaN is NaN. The page's own row still sees the NaN, by the key.
    """
    finite = jnp.isfinite(v)
    whole = jnp.all(finite, axis=-1, keepdims=True)
    return jnp.where(whole, k, jnp.asarray(jnp.nan, k.dtype)), jnp.where(finite, v, jnp.asarray(0, v.dtype))


def paged_attention(
    q_RTKGH: jax.Array,
    k_NSKH: jax.Array,
    v_NSKH: jax.Array,
    table_Rn: jax.Array,
    position_RT: jax.Array,
    dtype: jnp.dtype,
    *,
    block: int = BLOCK,
    whole_table: bool = False,
    window: int | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attend causally to what the rows' pages hold, which includes the queries' own tokens.

    Args:
        q_RTKGH: float32 queries after norm and rotation.
        k_NSKH, v_NSKH: the pool, in the matmul type or its bits; values are finite.
        table_Rn: int32 pages of each row, n a multiple of `block`; those past its end are not looked at.
        position_RT: int32 position of each query in its row; -1 sees nothing and gets an undefined, finite result.
        dtype: of the matmul operands.
        block: pages of a turn.
        whole_table: take all turns that the table or the window has, a number that the compiler knows, instead of
            those that the longest row needs.
        window: a query sees that many tokens at most, itself included; None for all. Each row then begins at the turn
            that holds the first key of its window: the work is that of the window. The queries of a row have successive
            positions, or -1.
        sinks: (K, G) float32, a score of each query head that takes its share of the softmax and has no value; None for
            none.
        scale: of the scores; None for 1 / sqrt(H).

    Returns:
        o_RTKGH float32.

    Source: online softmax, arXiv 1805.02867; pages, arXiv 2309.06180.
    """
    (R, T, K, _, H), n = q_RTKGH.shape, table_Rn.shape[1]
    size = block * k_NSKH.shape[1]
    more = {"sinks": sinks, "scale": scale}

    def gathered(pages_Rp: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_RsKH, v_RsKH = (from_bits(pool[pages_Rp]).reshape(R, size, K, H) for pool in (k_NSKH, v_NSKH))
        return k_RsKH, v_RsKH

    if window is not None and window < n // block * size:
        first_R = first_turns(position_RT, window, size)

        def read_own(j: jax.Array) -> tuple[jax.Array, jax.Array]:
            # A turn behind the table's end is that of its last page: all of it lies behind the queries.
            place_Rp = (first_R + j)[:, None] * block + jnp.arange(block)
            return gathered(jnp.take_along_axis(table_Rn, jnp.minimum(place_Rp, n - 1), axis=1))

        most = min(n // block, (window + T - 3 + size) // size + 1)
        turns = most if whole_table else jnp.max(jnp.max(position_RT, axis=1) // size - first_R) + 1
        return attend_in_turns(
            q_RTKGH, read_own, size, turns, position_RT, dtype, window=window, first_R=first_R, **more
        )

    def read(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gathered(jax.lax.dynamic_slice_in_dim(table_Rn, j * block, block, axis=1))

    turns = n // block if whole_table else jnp.max(position_RT) // size + 1
    return attend_in_turns(q_RTKGH, read, size, turns, position_RT, dtype, **more)


def first_turns(position_RT: jax.Array, window: int, size: int) -> jax.Array:
    """Return which turn of `size` keys holds the first key that a row's queries see, (R,) int32; 0 for a row of -1."""
    last = jnp.iinfo(jnp.int32).max
    earliest_R = jnp.min(jnp.where(position_RT < 0, last, position_RT), axis=1)
    return jnp.where(earliest_R == last, 0, jnp.maximum(earliest_R - (window - 1), 0) // size)


def attend_in_turns(
    q_RTKGH: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    size: int,
    turns: jax.Array | int,
    position_RT: jax.Array,
    dtype: jnp.dtype,
    scale: float | None = None,
    *,
    window: int | None = None,
    first_R: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attend causally to keys and values that come in turns; arguments and result as those of `paged_attention`.

    Args:
        read: `f(j) -> (k_RsKH, v_RsKH)`, the keys and values of turn j, those of the positions from j * size on; in row
            r, of the turn first_R[r] + j.
        size: keys of a turn.
        turns: how many there are.
        scale: of the scores; None for 1 / sqrt(H).
        window, sinks: as for `paged_attention`.
        first_R: the turn with which each row begins; None for 0.
    """
    R, T, K, G, H = q_RTKGH.shape
    q_RKXH = jnp.transpose(q_RTKGH, (0, 2, 3, 1, 4)).reshape(R, K, G * T, H)
    position_RX = jnp.tile(position_RT, (1, G))
    factor = H**-0.5 if scale is None else scale

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_RKX, l_RKX, o_RKXH = carry
        k_RsKH, v_RsKH = read(j)
        s_RKXs = contract("RKXH,RsKH->RKXs", q_RKXH, k_RsKH, dtype) * factor
        turn = j if first_R is None else (first_R + j)[:, None, None]
        key = turn * size + jnp.arange(size)
        visible_RXs = key <= position_RX[..., None]
        if window is not None:
            visible_RXs &= key > position_RX[..., None] - window
        s_RKXs = jnp.where(visible_RXs[:, None], s_RKXs, MASKED)
        new_m_RKX = jnp.maximum(m_RKX, softmax_shift(jnp.max(s_RKXs, axis=-1)))
        # Rounded before they are summed, as in `blockwise_forward`: there is why.
        p_RKXs, decay_RKX = jnp.exp(s_RKXs - new_m_RKX[..., None]).astype(dtype), jnp.exp(m_RKX - new_m_RKX)
        pv_RKXH = contract("RKXs,RsKH->RKXH", p_RKXs, v_RsKH, dtype)
        l_RKX = l_RKX * decay_RKX + jnp.sum(p_RKXs, axis=-1, dtype=jnp.float32)
        return new_m_RKX, l_RKX, o_RKXH * decay_RKX[..., None] + pv_RKXH

    zeros_RKX = jnp.zeros((R, K, G * T))
    if sinks is None:
        start = zeros_RKX + MASKED, zeros_RKX, jnp.zeros((R, K, G * T, H))
    else:
        m_RKX, l_RKX = start_with_sinks(zeros_RKX + jnp.repeat(sinks, T, axis=1))
        start = m_RKX, l_RKX, jnp.zeros((R, K, G * T, H))
    _, l_RKX, o_RKXH = jax.lax.fori_loop(0, turns, step, start)
    o_RKGTH = (o_RKXH / jnp.maximum(l_RKX, jnp.finfo(jnp.float32).tiny)[..., None]).reshape(R, K, G, T, H)
    return jnp.transpose(o_RKGTH, (0, 3, 1, 2, 4))
