"""How do a sampler's layers mix tokens with what the cache has of their rows? A page each of tiles, one token of steps.

A layer's own pages and places begin somewhere in the arrays of all layers, so that none of these is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Unpack

import jax
import jax.numpy as jnp

from jax_client.engine.sample.device.pool import STATES, Pool, memory_of
from jax_client.engine.sample.pages import PAGE
from jax_client.models.kernels.cache import PagedAttention
from jax_client.models.parts.attention import Extras
from jax_client.models.parts.gated_delta.mixing import Inputs, Marks, Memory, mix_tiles, mix_token
from jax_client.models.parts.kind import Context, Mixing, Weights

# f(pool, first) -> what mixes tokens with a layer's part of the pool, whose arrays (N, ...) have all layers'; the
# layer's begin at first (pages, places). What it keeps are the arrays that it has changed.
Mix = Callable[[Pool, tuple[jax.Array, jax.Array]], Mixing]
Batch = Mapping[str, jax.Array]


def mix_of_tiles(paged: PagedAttention, batch: Batch, position_tS: jax.Array, c: Context) -> Mix:
    """Return what mixes the tokens of tiles.

    Args:
        paged: the attention over pages.
        batch: of a prefill, without the axis of ways.
        position_tS: int32, -1 for no token.
        c: the pass.
    """

    def mix(pool: Pool, first: tuple[jax.Array, jax.Array]) -> Mixing:
        def attend(*qkv: jax.Array, **extras: Unpack[Extras]) -> tuple[jax.Array, Pool]:
            table, page = first[0] + batch["table"], first[0] + batch["page"]
            return _attended(paged, pool, qkv, (table, page, position_tS), c, extras)

        def recur(inputs: Inputs, w: Weights) -> tuple[jax.Array, Pool]:
            places = jnp.where(batch["places"] > 0, first[1] + batch["places"], 0)
            return _as_arrays(mix_tiles(inputs, w, batch["count"], places, memory_of(pool), c))

        return Mixing(attend=attend, recur=recur)

    return mix


def mix_of_step(paged: PagedAttention, settings: Batch, row: Batch, c: Context) -> Mix:
    """Return what mixes the token of each row with those before it.

    Args:
        paged: the attention over pages.
        settings: of the rows, by name.
        row: their state, by name.
        c: the pass.
    """
    position_R = row["position"]

    def mix(pool: Pool, first: tuple[jax.Array, jax.Array]) -> Mixing:
        def attend(*qkv: jax.Array, **extras: Unpack[Extras]) -> tuple[jax.Array, Pool]:
            table = first[0] + settings["table"]
            page = jnp.take_along_axis(table, (position_R // PAGE)[:, None], axis=1)[:, 0]
            return _attended(paged, pool, qkv, (table, page, position_R[:, None]), c, extras)

        def recur(inputs: Inputs, w: Weights) -> tuple[jax.Array, Pool]:
            # A row that has ended would go through its last token once more.
            place_R = jnp.where(row["done"], 0, first[1] + settings["place"])
            full_R = ~row["done"] & ((position_R + 1) % PAGE == 0)
            marks = Marks(jnp.sum(full_R, dtype=jnp.int32), jnp.argsort(~full_R), first[1] + settings["mark"])
            return _as_arrays(mix_token(inputs, w, place_R, position_R == 0, marks, memory_of(pool), c))

        return Mixing(attend=attend, recur=recur)

    return mix


def _attended(
    paged: PagedAttention,
    pool: Pool,
    qkv: tuple[jax.Array, ...],
    where: tuple[jax.Array, jax.Array, jax.Array],
    c: Context,
    extras: Extras,
) -> tuple[jax.Array, Pool]:
    """Return what attention over the pages gives, and the pages with the new tokens."""
    q, k, v = qkv
    pages = {name: a for name, a in pool.items() if name not in STATES}
    return paged.attend(q, k.astype(c.dtype), v.astype(c.dtype), pages, *where, c.dtype, **extras)


def _as_arrays(found: tuple[jax.Array, Memory]) -> tuple[jax.Array, Pool]:
    o, memory = found
    return o, dict(zip(STATES, memory, strict=True))
