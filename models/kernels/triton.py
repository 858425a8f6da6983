"""How does an NVIDIA GPU attend to keys and values that lie in pages?

By a kernel in Pallas' Triton dialect. A program takes some queries of one row and one key/value head through a part of
the row's pages, and ends where the row does, on the device; the parts of a row come together afterwards. The pool is
that of `paged`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_client.models.kernels.blockwise import MASKED, softmax_shift, start_with_sinks
from jax_client.models.kernels.paged import first_turns

BLOCK = 2  # pages of a turn: 64 keys of 32-token pages
FEWEST_QUERIES, MOST_QUERIES = 16, 64  # of a program; a tensor core takes no fewer
# Programs that keep a large GPU busy: a row's pages are cut into parts where rows and heads are fewer.
PROGRAMS = 512
MOST_PARTS = 16


def unsupported(H: int) -> str | None:
    """Return why the kernel does not take heads of width H; None if it does."""
    return None if H in (16, 32, 64, 128, 256) else f"heads of width {H} are no power of two from 16 to 256"


def triton_attention(
    q_RTKGH: jax.Array,
    k_NSKH: jax.Array,
    v_NSKH: jax.Array,
    table_Rn: jax.Array,
    position_RT: jax.Array,
    dtype: jnp.dtype,
    *,
    window: int | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally to what the rows' pages hold, which includes the queries' own tokens.

    Args:
        q_RTKGH: float32 queries after norm and rotation.
        k_NSKH, v_NSKH: the pool, in the matmul type; values are finite.
        table_Rn: int32 pages of each row; those past its end are not looked at.
        position_RT: int32 position of each query in its row; -1 sees nothing and gets an undefined, finite result.
        dtype: of the matmul operands.
        window, sinks, scale: as for `paged.paged_attention`.
        interpret: emulate the kernel on any platform, for tests; slow.

    Returns:
        o_RTKGH float32.

    Source: FlashAttention-2, arXiv 2307.08691; parts of a row as in Flash-Decoding, arXiv 2311.01282.
    """
    R, T, K, G, H = q_RTKGH.shape
    S = k_NSKH.shape[1]
    queries = min(MOST_QUERIES, max(FEWEST_QUERIES, 1 << (G * T - 1).bit_length()))
    blocks = -(-G * T // queries)
    extra = blocks * queries - G * T
    q_RKXH = jnp.transpose(q_RTKGH, (0, 2, 3, 1, 4)).reshape(R, K, G * T, H).astype(dtype)
    q_RKXH = jnp.pad(q_RKXH, ((0, 0), (0, 0), (0, extra), (0, 0)))
    position_RX = jnp.pad(jnp.tile(position_RT, (1, G)), ((0, 0), (0, extra)), constant_values=-1)
    table_Rn = jnp.pad(table_Rn, ((0, 0), (0, -table_Rn.shape[1] % BLOCK)))
    turns_R = jnp.max(position_RT, axis=1) // (S * BLOCK) + 1
    most = table_Rn.shape[1] // BLOCK if window is None else -(-(window + T) // (S * BLOCK)) + 1
    parts = min(MOST_PARTS, max(1, PROGRAMS // (R * K * blocks)), table_Rn.shape[1] // BLOCK, most)
    first_R = () if window is None else (first_turns(position_RT, window, S * BLOCK),)
    own = lambda *shape: pl.BlockSpec((None, *shape), lambda r, _, __: (r,) + (0,) * len(shape))  # noqa: E731
    heads = pl.BlockSpec((*k_NSKH.shape[:2], None, H), lambda r, kx, p: (0, 0, kx // blocks, 0))
    sums = pl.BlockSpec((None, None, None, queries), lambda r, kx, p: (p, r, kx // blocks, kx % blocks))
    m_pRKX, l_pRKX, o_pRKXH = pl.pallas_call(
        partial(_kernel, parts=parts, scale=H**-0.5 if scale is None else scale, window=window),
        grid=(R, K * blocks, parts),
        in_specs=[
            own(table_Rn.shape[1]),
            pl.BlockSpec((1,), lambda r, kx, p: (r,)),
            pl.BlockSpec((None, queries), lambda r, kx, p: (r, kx % blocks)),
            pl.BlockSpec((None, None, queries, H), lambda r, kx, p: (r, kx // blocks, kx % blocks, 0)),
            heads,
            heads,
            *[pl.BlockSpec((1,), lambda r, kx, p: (r,)) for _ in first_R],
        ],
        out_specs=[
            sums,
            sums,
            pl.BlockSpec((None, None, None, queries, H), lambda r, kx, p: (p, r, kx // blocks, kx % blocks, 0)),
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct((parts, R, K, blocks * queries), jnp.float32)] * 2,
            jax.ShapeDtypeStruct((parts, R, K, blocks * queries, H), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(table_Rn, turns_R, position_RX, q_RKXH, k_NSKH, v_NSKH, *first_R)
    sinks_KX = None if sinks is None else jnp.pad(jnp.repeat(sinks, T, axis=1), ((0, 0), (0, extra)))
    o_RKXH = _joined(m_pRKX, l_pRKX, o_pRKXH, sinks_KX)
    return jnp.transpose(o_RKXH[:, :, : G * T].reshape(R, K, G, T, H), (0, 3, 1, 2, 4))


def _joined(m_pRKX: jax.Array, l_pRKX: jax.Array, o_pRKXH: jax.Array, sinks_KX: jax.Array | None) -> jax.Array:
    """Return the result (R, K, X, H) of a row's parts; sinks are one more, without values."""
    m_RKX = jnp.max(m_pRKX, axis=0)
    if sinks_KX is not None:
        sink_m_KX, sink_l_KX = start_with_sinks(sinks_KX)
        m_RKX = jnp.maximum(m_RKX, sink_m_KX)
    decay_pRKX = jnp.exp(m_pRKX - m_RKX)
    l_RKX = jnp.sum(l_pRKX * decay_pRKX, axis=0)
    if sinks_KX is not None:
        l_RKX += sink_l_KX * jnp.exp(sink_m_KX - m_RKX)
    l_RKX = jnp.maximum(l_RKX, jnp.finfo(jnp.float32).tiny)
    return jnp.sum(o_pRKXH * decay_pRKX[..., None], axis=0) / l_RKX[..., None]


def _kernel(
    table_ref: Any,
    turns_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    parts: int,
    scale: float,
    window: int | None,
) -> None:
    """Write the running maximum, the sum of the probabilities, and their product with the values, of one part.

    Before these three, `refs` has the row's first turn where there is a window.
    """
    *first_ref, m_ref, l_ref, o_ref = refs
    queries, H = q_ref.shape
    keys = BLOCK * k_ref.shape[1]
    q_XH, position_X = q_ref[...], position_ref[...]
    turns = turns_ref[0]
    if window is None:
        each = pl.cdiv(turns, parts)
        first = pl.program_id(2) * each
    else:
        begin = first_ref[0][0]
        each = pl.cdiv(jnp.maximum(turns - begin, 0), parts)
        first = begin + pl.program_id(2) * each

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_X, l_X, o_XH = carry
        pages = table_ref[pl.ds(j * BLOCK, BLOCK)]
        k_sH, v_sH = (ref[pages].reshape(keys, H) for ref in (k_ref, v_ref))
        s_Xs = _product(q_XH, k_sH, 1) * scale
        key_1s = (j * keys + jnp.arange(keys))[None]
        visible_Xs = key_1s <= position_X[:, None]
        if window is not None:
            visible_Xs &= key_1s > position_X[:, None] - window
        s_Xs = jnp.where(visible_Xs, s_Xs, MASKED)
        new_m_X = jnp.maximum(m_X, softmax_shift(jnp.max(s_Xs, axis=1)))
        # Rounded before they are summed, as in `blockwise_forward`: there is why.
        p_Xs, decay_X = jnp.exp(s_Xs - new_m_X[:, None]).astype(v_sH.dtype), jnp.exp(m_X - new_m_X)
        l_X = l_X * decay_X + jnp.sum(p_Xs.astype(jnp.float32), axis=1)
        return new_m_X, l_X, o_XH * decay_X[:, None] + _product(p_Xs, v_sH, 0)

    start = jnp.full(queries, MASKED, jnp.float32), jnp.zeros(queries), jnp.zeros((queries, H))
    m_ref[...], l_ref[...], o_ref[...] = jax.lax.fori_loop(first, jnp.minimum(first + each, turns), step, start)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Return the float32 product over the last axis of x and `axis` of y."""
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
