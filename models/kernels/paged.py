"""How does attention read keys and values that lie in pages, and how do new ones get there?

The pool is (N, S, K, H): N pages, each with the keys (or values) of S successive tokens of one row in one layer. A
row's pages of a layer stand in a table in the order of its tokens. The queries of all rows visit their tables in blocks
of `BLOCK` pages with an online softmax, as far as the longest row reaches: the work follows the live context and not
the capacity, and a row's sums do not depend on its batch mates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.models.kernels.blockwise import MASKED, softmax_shift
from jax_client.models.layers import contract, from_bits, to_bits

BLOCK = 2  # pages of one turn: 64 keys; one page or four took a CPU longer, and eight a prompt, too


def write_tokens(
    k_NSKH: jax.Array, v_NSKH: jax.Array, k_RKH: jax.Array, v_RKH: jax.Array, page_R: jax.Array, place_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with one token of each row stored at (page, place in the page)."""
    k_RKH, v_RKH = _storable(k_RKH, v_RKH)
    at = page_R, place_R
    return k_NSKH.at[at].set(_as_stored(k_RKH, k_NSKH)), v_NSKH.at[at].set(_as_stored(v_RKH, v_NSKH))


def write_pages(
    k_NSKH: jax.Array, v_NSKH: jax.Array, k_RSKH: jax.Array, v_RSKH: jax.Array, page_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with a whole page of each row stored."""
    k_RSKH, v_RSKH = _storable(k_RSKH, v_RSKH)
    return k_NSKH.at[page_R].set(_as_stored(k_RSKH, k_NSKH)), v_NSKH.at[page_R].set(_as_stored(v_RSKH, v_NSKH))


def _as_stored(array: jax.Array, pool_NSKH: jax.Array) -> jax.Array:
    return to_bits(array) if pool_NSKH.dtype == jnp.uint16 else array


def _storable(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
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
) -> jax.Array:
    """Attend causally to what the rows' pages hold, which includes the queries' own tokens.

    Args:
        q_RTKGH: float32 queries after norm and rotation.
        k_NSKH, v_NSKH: the pool, in the matmul type or its bits; values are finite.
        table_Rn: int32 pages of each row, n a multiple of `BLOCK`; those past its end are not looked at.
        position_RT: int32 position of each query in its row; -1 sees nothing and gets an undefined, finite result.
        dtype: of the matmul operands.

    Returns:
        o_RTKGH float32.

    Source: online softmax, arXiv 1805.02867; pages, arXiv 2309.06180.
    """
    R, T, K, G, H = q_RTKGH.shape
    size, as_bits = BLOCK * k_NSKH.shape[1], k_NSKH.dtype == jnp.uint16
    spec = "RKsH" if as_bits else "RsKH"

    def tokens(pool_NSKH: jax.Array, pages_Rp: jax.Array) -> jax.Array:
        """Return the keys or values of some pages; bits with the heads first, for numbers of a CPU take longer."""
        found_RsKH = pool_NSKH[pages_Rp].reshape(R, size, K, H)
        return from_bits(jnp.swapaxes(found_RsKH, 1, 2)) if as_bits else found_RsKH

    q_RKXH = jnp.transpose(q_RTKGH, (0, 2, 3, 1, 4)).reshape(R, K, G * T, H)
    position_RX = jnp.tile(position_RT, (1, G))
    turns = jnp.max(position_RT) // size + 1

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_RKX, l_RKX, o_RKXH = carry
        pages_Rp = jax.lax.dynamic_slice_in_dim(table_Rn, j * BLOCK, BLOCK, axis=1)
        s_RKXs = contract(f"RKXH,{spec}->RKXs", q_RKXH, tokens(k_NSKH, pages_Rp), dtype) * H**-0.5
        visible_RXs = j * size + jnp.arange(size) <= position_RX[..., None]
        s_RKXs = jnp.where(visible_RXs[:, None], s_RKXs, MASKED)
        new_m_RKX = jnp.maximum(m_RKX, softmax_shift(jnp.max(s_RKXs, axis=-1)))
        # Rounded before they are summed, as in `blockwise_forward`: there is why.
        p_RKXs, decay_RKX = jnp.exp(s_RKXs - new_m_RKX[..., None]).astype(dtype), jnp.exp(m_RKX - new_m_RKX)
        pv_RKXH = contract(f"RKXs,{spec}->RKXH", p_RKXs, tokens(v_NSKH, pages_Rp), dtype)
        l_RKX = l_RKX * decay_RKX + jnp.sum(p_RKXs, axis=-1, dtype=jnp.float32)
        return new_m_RKX, l_RKX, o_RKXH * decay_RKX[..., None] + pv_RKXH

    zeros_RKX = jnp.zeros((R, K, G * T))
    start = zeros_RKX + MASKED, zeros_RKX, jnp.zeros((R, K, G * T, H))
    _, l_RKX, o_RKXH = jax.lax.fori_loop(0, turns, step, start)
    o_RKGTH = (o_RKXH / jnp.maximum(l_RKX, jnp.finfo(jnp.float32).tiny)[..., None]).reshape(R, K, G, T, H)
    return jnp.transpose(o_RKGTH, (0, 3, 1, 2, 4))
