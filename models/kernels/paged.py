"""How does attention read keys and values that lie in pages, and how do new ones get there?

One layer's pool is (P, K, S, H): P pages, each with the keys (or values) of S successive tokens of one row. A row's
pages stand in a table in the order of its tokens. The queries of all rows visit their tables in blocks of `BLOCK`
pages with an online softmax, as far as the longest row reaches: the work follows the live context and not the capacity,
and a row's sums do not depend on its batch mates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.models.kernels.blockwise import MASKED, softmax_shift
from jax_client.models.layers import contract, from_bits, to_bits

BLOCK = 2  # pages of one turn: 64 keys; one page or four took a CPU longer, and eight a prompt, too


def write_tokens(
    k_PKSH: jax.Array, v_PKSH: jax.Array, k_RKH: jax.Array, v_RKH: jax.Array, page_R: jax.Array, place_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with one token of each row stored at (page, place in the page)."""
    k_RKH, v_RKH = _storable(k_RKH, v_RKH)
    at = page_R, slice(None), place_R
    return k_PKSH.at[at].set(to_bits(k_RKH)), v_PKSH.at[at].set(to_bits(v_RKH))


def write_pages(
    k_PKSH: jax.Array, v_PKSH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array, page_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the pool with a whole page of each row stored, T = S."""
    k_RKTH, v_RKTH = _storable(jnp.swapaxes(k_RTKH, 1, 2), jnp.swapaxes(v_RTKH, 1, 2))
    return k_PKSH.at[page_R].set(to_bits(k_RKTH)), v_PKSH.at[page_R].set(to_bits(v_RKTH))


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
    k_PKSH: jax.Array,
    v_PKSH: jax.Array,
    table_Rn: jax.Array,
    position_RT: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Attend causally to what the rows' pages hold, which includes the queries' own tokens.

    Args:
        q_RTKGH: float32 queries after norm and rotation.
        k_PKSH, v_PKSH: the pool, in the matmul type or its bits; values are finite.
        table_Rn: int32 pages of each row, n a multiple of `BLOCK`; those past its end are not looked at.
        position_RT: int32 position of each query in its row; -1 sees nothing and gets an undefined, finite result.
        dtype: of the matmul operands.

    Returns:
        o_RTKGH float32.

    Source: online softmax, arXiv 1805.02867; pages, arXiv 2309.06180.
    """
    R, T, K, G, H = q_RTKGH.shape
    size = BLOCK * k_PKSH.shape[2]
    # One gather of (page, head) pieces puts the heads first; gathering pages would leave that to a transpose.
    pieces = [a.reshape(-1, *a.shape[2:]) for a in (k_PKSH, v_PKSH)]
    q_RKXH = jnp.transpose(q_RTKGH, (0, 2, 3, 1, 4)).reshape(R, K, G * T, H)
    position_RX = jnp.tile(position_RT, (1, G))
    turns = jnp.max(position_RT) // size + 1

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_RKX, l_RKX, o_RKXH = carry
        pages_Rp = jax.lax.dynamic_slice_in_dim(table_Rn, j * BLOCK, BLOCK, axis=1)
        piece_RKp = pages_Rp[:, None] * K + jnp.arange(K)[:, None]
        k_RKsH, v_RKsH = (from_bits(piece[piece_RKp]).reshape(R, K, size, H) for piece in pieces)
        s_RKXs = contract("RKXH,RKsH->RKXs", q_RKXH, k_RKsH, dtype) * H**-0.5
        visible_RXs = j * size + jnp.arange(size) <= position_RX[..., None]
        s_RKXs = jnp.where(visible_RXs[:, None], s_RKXs, MASKED)
        new_m_RKX = jnp.maximum(m_RKX, softmax_shift(jnp.max(s_RKXs, axis=-1)))
        # Rounded before they are summed, as in `blockwise_forward`: there is why.
        p_RKXs, decay_RKX = jnp.exp(s_RKXs - new_m_RKX[..., None]).astype(dtype), jnp.exp(m_RKX - new_m_RKX)
        pv_RKXH = contract("RKXs,RKsH->RKXH", p_RKXs, v_RKsH, dtype)
        l_RKX = l_RKX * decay_RKX + jnp.sum(p_RKXs, axis=-1, dtype=jnp.float32)
        return new_m_RKX, l_RKX, o_RKXH * decay_RKX[..., None] + pv_RKXH

    zeros_RKX = jnp.zeros((R, K, G * T))
    start = zeros_RKX + MASKED, zeros_RKX, jnp.zeros((R, K, G * T, H))
    _, l_RKX, o_RKXH = jax.lax.fori_loop(0, turns, step, start)
    o_RKGTH = (o_RKXH / jnp.maximum(l_RKX, jnp.finfo(jnp.float32).tiny)[..., None]).reshape(R, K, G, T, H)
    return jnp.transpose(o_RKGTH, (0, 3, 1, 2, 4))
