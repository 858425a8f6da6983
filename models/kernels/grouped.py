"""How do rows meet the matrices of the expert that each was sent to? Sorted by expert, in tiles of one expert.

A token has k choices, each a row: S = M x k rows, sorted by expert. A tile is t successive rows that begin with one
expert's; where they reach into the next expert's, the tile of that expert comes later and writes over them. So no row
is dropped, none is padded, and no array has an axis of experts and one of tokens with a width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")
Matrices = TypeVar("Matrices")
FEWEST_ROWS, MOST_ROWS = 8, 128


class Groups(NamedTuple):
    """The rows of tokens, sorted by expert; or of those one round, as many as a buffer holds.

    Attributes:
        token_S: int32; the token of each row, with a tile's rows of padding behind them.
        place_Mk: int32; the row of each choice. One that is not in [0, S) is in no tile.
        start_E, size_E: int32; the first row of each expert, and how many it has.
        tile: rows of a tile.
    """

    token_S: jax.Array
    place_Mk: jax.Array
    start_E: jax.Array
    size_E: jax.Array
    tile: int

    @property
    def rows(self) -> int:
        """S, without the padding."""
        return len(self.token_S) - self.tile

    def sort(self, values_Mk: jax.Array) -> jax.Array:
        """Return what each choice has by row (S,), with zeros for the padding."""
        return jnp.zeros(len(self.token_S), values_Mk.dtype).at[self._inside()].set(values_Mk, mode="drop")

    def by_choice(self, rows_S: jax.Array) -> jax.Array:
        """Return what each row has by choice (M, k); 0 for one that is in no tile."""
        return rows_S.at[self._inside()].get(mode="fill", fill_value=0)

    def total(self, rows_SX: jax.Array, weight_Mk: jax.Array | None = None) -> jax.Array:
        """Return the sum over a token's rows (M, X), float32, each times its weight."""
        total_MX, place_Mk = jnp.zeros(()), self._inside()
        for j in range(self.place_Mk.shape[1]):
            row_MX = rows_SX.at[place_Mk[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
            total_MX += row_MX if weight_Mk is None else row_MX * weight_Mk[:, j, None]
        return total_MX

    def _inside(self) -> jax.Array:
        """Return the places, with those in no tile behind the last row: no index counts from the end."""
        inside_Mk = (self.place_Mk >= 0) & (self.place_Mk < self.rows)
        return jnp.where(inside_Mk, self.place_Mk, len(self.token_S))

    def round(self, first: jax.Array, rows: int) -> Groups:
        """Return the groups of `rows` rows from `first` on."""
        token_S = jnp.pad(self.token_S, (0, rows))  # no slice reaches beyond the end
        start_E, end_E = (jnp.clip(at - first, 0, rows) for at in (self.start_E, self.start_E + self.size_E))
        return Groups(
            jax.lax.dynamic_slice_in_dim(token_S, first, rows + self.tile),
            self.place_Mk - first,
            start_E,
            end_E - start_E,
            self.tile,
        )


class Tile(NamedTuple):
    """Rows of one expert.

    Attributes:
        first: of its rows, int32.
        token_t: int32; the token of each.
        own_t: whether the row is the expert's; the others are the next one's, or padding.
    """

    first: jax.Array
    token_t: jax.Array
    own_t: jax.Array

    def rows(self, array_SX: jax.Array) -> jax.Array:
        """Return the tile's rows of an array."""
        return jax.lax.dynamic_slice_in_dim(array_SX, self.first, len(self.token_t))

    def put(self, array_SX: jax.Array, rows_tX: jax.Array) -> jax.Array:
        """Return the array with these rows in the tile's place."""
        return jax.lax.dynamic_update_slice_in_dim(array_SX, rows_tX.astype(array_SX.dtype), self.first, 0)

    def add(self, total: jax.Array, expert: jax.Array, new: jax.Array) -> jax.Array:
        """Return (R, E, F) sums with (R, F) added to those of an expert."""
        old = jax.lax.dynamic_index_in_dim(total, expert, 1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, old + new, expert, 1)


def group(choice_Mk: jax.Array, experts: int) -> Groups:
    """Sort the choices of tokens by expert.

    Args:
        choice_Mk: int32; one of `experts` itself is in no tile.
        experts: how many there are.
    """
    S = choice_Mk.size
    order_S = jnp.argsort(choice_Mk.ravel(), stable=True).astype(jnp.int32)
    place_S = jnp.zeros(S, jnp.int32).at[order_S].set(jnp.arange(S, dtype=jnp.int32))
    size_E = jnp.bincount(choice_Mk.ravel(), length=experts + 1)[:experts].astype(jnp.int32)
    start_E = jnp.cumsum(size_E) - size_E
    tile, place_Mk = _tile_rows(S, experts), place_S.reshape(choice_Mk.shape)
    token_S = jnp.pad(order_S // choice_Mk.shape[1], (0, tile))
    return Groups(token_S, jnp.where(choice_Mk < experts, place_Mk, -1), start_E, size_E, tile)


def in_rounds(groups: Groups, rows: int, body: Callable[[Carry, Groups], Carry], carry: Carry) -> Carry:
    """Return what `body` makes of `carry`, a round of at most `rows` rows after the other, until none is left.

    So what a device computes for the tokens of others takes the memory of `rows`, however many they send.
    """
    if rows >= groups.rows:
        return body(carry, groups)
    rounds = (jnp.sum(groups.size_E) + rows - 1) // rows
    return jax.lax.fori_loop(0, rounds, lambda i, carry: body(carry, groups.round(i * rows, rows)), carry)


def _tile_rows(rows: int, experts: int) -> int:
    """Return the rows of a tile: half of those that an expert has, as its last tile is half empty on average."""
    return min(MOST_ROWS, max(FEWEST_ROWS, (1 << (-(-rows // experts) - 1).bit_length()) // 2))


def for_tiles(
    groups: Groups,
    cut: Callable[[jax.Array], Matrices],
    body: Callable[[Carry, jax.Array, Matrices, Tile], Carry],
    carry: Carry,
    *,
    on_cpu: bool,
) -> Carry:
    """Return what `body` makes of `carry`, one tile after the other, in the order of their rows.

    Args:
        groups: of the rows.
        cut: `f(expert) -> arrays`, the matrices of one expert.
        body: `f(carry, expert, arrays, tile) -> carry`.
        carry: what it changes.
        on_cpu: take an expert's matrices once for all of its tiles, and only experts that have rows. Else the loop has
            as many turns as there may be tiles: a GPU waits for the host after each turn of a loop whose length it
            learns from an array. Turns beyond the last tile write into the padding.
    """
    t, E, S = groups.tile, len(groups.size_E), groups.rows

    def tile(e: jax.Array, first: jax.Array) -> Tile:
        token_t = jax.lax.dynamic_slice_in_dim(groups.token_S, first, t)
        return Tile(first, token_t, first + jnp.arange(t) < groups.start_E[e] + groups.size_E[e])

    if on_cpu:
        used_E = jnp.argsort(groups.size_E == 0, stable=True)

        def expert(i: jax.Array, carry: Carry) -> Carry:
            e = used_E[i]
            arrays = cut(e)
            turns = (groups.size_E[e] + t - 1) // t
            one = lambda j, carry: body(carry, e, arrays, tile(e, groups.start_E[e] + j * t))  # noqa: E731
            return jax.lax.fori_loop(0, turns, one, carry)

        return jax.lax.fori_loop(0, jnp.sum(groups.size_E > 0), expert, carry)

    most = S // t + min(E, S)
    tiles_E = (groups.size_E + t - 1) // t
    end_E = jnp.cumsum(tiles_E)

    def turn(i: jax.Array, carry: Carry) -> Carry:
        e = jnp.minimum(jnp.searchsorted(end_E, i, side="right"), E - 1).astype(jnp.int32)
        first = groups.start_E[e] + (i - (end_E[e] - tiles_E[e])) * t
        return body(carry, e, cut(e), tile(e, jnp.where(i < end_E[-1], first, S)))

    return jax.lax.fori_loop(0, most, turn, carry)
