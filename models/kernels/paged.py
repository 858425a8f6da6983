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


def write_tokens(pool_PKSH: jax.Array, new_RKH: jax.Array, page_R: jax.Array, place_R: jax.Array) -> jax.Array:
    """Return the pool with one token of each row stored at (page, place in the page)."""
    return pool_PKSH.at[page_R, :, place_R].set(to_bits(new_RKH))


def write_pages(pool_PKSH: jax.Array, new_RTKH: jax.Array, page_R: jax.Array) -> jax.Array:
    """Return the pool with a whole page of each row stored, T = S."""
    return pool_PKSH.at[page_R].set(to_bits(jnp.swapaxes(new_RTKH, 1, 2)))


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
        k_PKSH, v_PKSH: the pool, in the matmul type or its bits.
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
    last_R1 = jnp.max(position_RT, axis=1, keepdims=True)
    turns = jnp.max(position_RT) // size + 1

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_RKX, l_RKX, o_RKXH = carry
        pages_Rp = jax.lax.dynamic_slice_in_dim(table_Rn, j * BLOCK, BLOCK, axis=1)
        piece_RKp = pages_Rp[:, None] * K + jnp.arange(K)[:, None]
        k_RKsH, v_RKsH = (from_bits(piece[piece_RKp]).reshape(R, K, size, H) for piece in pieces)
        s_RKXs = contract("RKXH,RKsH->RKXs", q_RKXH, k_RKsH, dtype) * H**-0.5
        place_s = j * size + jnp.arange(size)
        visible_RXs = place_s <= position_RX[..., None]
        s_RKXs = jnp.where(visible_RXs[:, None], s_RKXs, MASKED)
        new_m_RKX = jnp.maximum(m_RKX, softmax_shift(jnp.max(s_RKXs, axis=-1)))
        # Rounded before they are summed, as in `blockwise_forward`: there is why.
        p_RKXs, decay_RKX = jnp.exp(s_RKXs - new_m_RKX[..., None]).astype(dtype), jnp.exp(m_RKX - new_m_RKX)
        # Behind a row's last token lies what earlier rows left, of any adapter: their NaN times weight 0 would be NaN.
        v_RKsH = jnp.where((place_s <= last_R1)[:, None, :, None], v_RKsH, 0)
        pv_RKXH = contract("RKXs,RKsH->RKXH", p_RKXs, v_RKsH, dtype)
        l_RKX = l_RKX * decay_RKX + jnp.sum(p_RKXs, axis=-1, dtype=jnp.float32)
        return new_m_RKX, l_RKX, o_RKXH * decay_RKX[..., None] + pv_RKXH

    zeros_RKX = jnp.zeros((R, K, G * T))
    start = zeros_RKX + MASKED, zeros_RKX, jnp.zeros((R, K, G * T, H))
    _, l_RKX, o_RKXH = jax.lax.fori_loop(0, turns, step, start)
    o_RKGTH = (o_RKXH / jnp.maximum(l_RKX, jnp.finfo(jnp.float32).tiny)[..., None]).reshape(R, K, G, T, H)
    return jnp.transpose(o_RKGTH, (0, 3, 1, 2, 4))
