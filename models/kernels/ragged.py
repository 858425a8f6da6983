"""How does a TPU attend to keys and values that lie in pages?

Through the ragged paged attention that jax ships. The kernel copies a row's pages into VMEM while it multiplies those
before them, and ends where the row does. It wants one array, (N, S, C, 128), in which a token's heads alternate: key 0,
value 0, key 1, value 1. Narrower heads share the 128 lanes: each query is zero in its neighbours' lanes, and takes its
own lanes of the result.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_client.models.kernels.paged import attend_in_turns, storable, store_one_by_one
from jax_client.sharding import LANES

# Of one step of the kernel: 512 keys, and the queries of 32 rows, or of one tile of a prompt.
PAGES_AT_ONCE = 16
QUERIES_AT_ONCE = 32
TABLE_BYTES = 2**19  # of the rows of one call; the scalar memory that tables lie in is a megabyte
# f(q_MNH, kv_NSCH, lengths_R, table_Rn, starts_R, count, scale) -> o_MNH, with the keyword `window` where there is one
Kernel = Callable[..., jax.Array]


def unsupported(K: int, H: int) -> str | None:
    """Return why the kernel does not take K key/value heads of width H; None if it does."""
    if LANES % H:
        return f"heads of width {H} do not divide the {LANES} lanes"
    if K % (LANES // H):
        return f"{K} heads of width {H} do not fill {LANES} lanes each"
    filled = K * H // LANES
    if filled not in (1, 2, 4) and filled % 8:
        return f"{filled} x {LANES} lanes of keys do not fill a tile"
    return None


def token_shape(K: int, H: int) -> tuple[int, int]:
    """Return the shape that a token has in the pool: (C, 128)."""
    return 2 * (K * H // LANES), LANES


def write(
    kv_NSCH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array, page_R: jax.Array, place_R: jax.Array | None
) -> jax.Array:
    """Return the pool with new tokens.

    Args:
        kv_NSCH: the pool.
        k_RTKH, v_RTKH: in the pool's type: a page of each row, or one token.
        page_R: int32, where they are stored.
        place_R: of the one token in its page; None for whole pages.
    """
    R, T = k_RTKH.shape[:2]
    k, v = (x.reshape(R, T, -1, LANES) for x in storable(k_RTKH, v_RTKH))
    kv_RTCH = jnp.stack([k, v], axis=3).reshape(R, T, -1, LANES)
    if place_R is None:
        return store_one_by_one(kv_NSCH, kv_RTCH, page_R)
    return kv_NSCH.at[page_R, place_R].set(kv_RTCH[:, 0])


def ragged_attention(
    q_RTKGH: jax.Array,
    kv_NSCH: jax.Array,
    table_Rn: jax.Array,
    position_RT: jax.Array,
    dtype: jnp.dtype,
    kernel: Kernel,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attend causally to what the rows' pages hold, which includes the queries' own tokens.

    Args:
        q_RTKGH: float32 queries after norm and rotation.
        kv_NSCH: the pool.
        table_Rn: int32 pages of each row; those past its end are not looked at.
        position_RT: int32, successive positions of each row's queries; -1 for a row that is none, whose result is 0.
        dtype: of the queries and the result within the kernel.
        kernel: `tpu_kernel`, or `plain_kernel` on other platforms.
        window: a query sees that many tokens at most, itself included; None for all. The kernel masks the others, but
            reads their pages.
        scale: of the scores; None for 1 / sqrt(H).

    Returns:
        o_RTKGH float32.

    Source: arXiv 2604.15464; the kernel is jax.experimental.pallas.ops.tpu.ragged_paged_attention.
    """
    R, T, K, G, H = q_RTKGH.shape
    share = LANES // H
    own_ee = jnp.eye(share, dtype=dtype)
    # Of the heads that share lanes, head e has its queries in the lanes of e.
    q_RTkeGH = q_RTKGH.astype(dtype).reshape(R, T, K // share, share, G, H)
    q_RTkeGeH = q_RTkeGH[..., None, :] * own_ee[:, None, :, None]
    q_RTNH = q_RTkeGeH.reshape(R, T, K * G, LANES)
    live_R = position_RT[:, 0] >= 0
    length_R = jnp.where(live_R, position_RT[:, 0], 0) + T
    rows = max(1, TABLE_BYTES // (4 * table_Rn.shape[1]))
    parts, scale = [], H**-0.5 if scale is None else scale
    more = {} if window is None else {"window": window}
    for first in range(0, R, rows):
        at = slice(first, min(first + rows, R))
        count = at.stop - first
        starts = jnp.arange(count + 1, dtype=jnp.int32) * T
        q_MNH = q_RTNH[at].reshape(count * T, K * G, LANES)
        rest = starts, jnp.full(1, count, jnp.int32), scale
        o_MNH = kernel(q_MNH, kv_NSCH, length_R[at], table_Rn[at], *rest, **more)
        parts.append(o_MNH.reshape(count, T, K // share, share, G, share, H))
    o_RTkeGeH = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    o_RTkeGH = jnp.stack([o_RTkeGeH[:, :, :, e, :, e] for e in range(share)], axis=3)
    o_RTKGH = o_RTkeGH.reshape(R, T, K, G, H).astype(jnp.float32)
    return jnp.where(live_R[:, None, None, None, None], o_RTKGH, 0.0)


def tpu_kernel(
    q_MNH: jax.Array,
    kv_NSCH: jax.Array,
    length_R: jax.Array,
    table_Rn: jax.Array,
    starts: jax.Array,
    count: jax.Array,
    scale: float,
    *,
    window: int | None = None,
) -> jax.Array:
    """Run jax's kernel.

    Args:
        q_MNH: the rows' queries, one row after the other, the last of what the row's pages hold.
        kv_NSCH: the pool.
        length_R: int32, tokens that each row's pages hold.
        table_Rn: int32, pages of each row.
        starts: int32 (R + 1,), where each row's queries begin, and where the last one's end.
        count: int32 (1,), the number of rows.
        scale: of the scores.
        window: most tokens that a query sees; None for all.
    """
    # Here: Pallas is large, and only a TPU needs this part of it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return ragged_paged_attention(
        q_MNH,
        kv_NSCH,
        length_R,
        table_Rn,
        starts,
        count,
        sm_scale=scale,
        sliding_window=window,
        num_kv_pages_per_block=min(PAGES_AT_ONCE, table_Rn.shape[1]),
        num_queries_per_block=min(QUERIES_AT_ONCE, len(q_MNH)),
    )


def plain_kernel(
    q_MNH: jax.Array,
    kv_NSCH: jax.Array,
    length_R: jax.Array,
    table_Rn: jax.Array,
    starts: jax.Array,
    count: jax.Array,
    scale: float,
    *,
    window: int | None = None,
) -> jax.Array:
    """Return what `tpu_kernel` returns, in plain JAX, for rows that have as many queries each."""
    R, page, K = len(table_Rn), kv_NSCH.shape[1], kv_NSCH.shape[2] // 2
    T = len(q_MNH) // R
    position_RT = (length_R - T)[:, None] + jnp.arange(T)

    def read(j: jax.Array) -> tuple[jax.Array, jax.Array]:
        kv_RsCH = kv_NSCH[jax.lax.dynamic_index_in_dim(table_Rn, j, axis=1, keepdims=False)]
        return kv_RsCH[:, :, 0::2], kv_RsCH[:, :, 1::2]

    turns = jnp.max(length_R + page - 1) // page
    q_RTKGH = q_MNH.reshape(R, T, K, -1, q_MNH.shape[2])
    o_RTKGH = attend_in_turns(q_RTKGH, read, page, turns, position_RT, kv_NSCH.dtype, scale, window=window)
    return o_RTKGH.reshape(q_MNH.shape).astype(q_MNH.dtype)
