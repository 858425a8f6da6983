"""Which row is placed next? The first one of the owner with the fewest rows that run; an owner's rows keep their order.

`Waiting` has a queue for each owner. Where owners have the same number of rows, the one goes first whose last row was
placed the longest ago.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

from jax_client.engine.sample.rows import Row


class Waiting:
    """The rows that wait, in order for each owner."""

    def __init__(self) -> None:
        self._rows: dict[str, deque[Row]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __iter__(self) -> Iterator[Row]:
        return (row for rows in self._rows.values() for row in rows)

    def owners(self) -> Iterable[str]:
        """Return the owners that have rows."""
        return self._rows.keys()

    def extend(self, rows: Iterable[Row]) -> None:
        """Queue rows behind those of their owners."""
        for row in rows:
            self._rows.setdefault(row.owner, deque()).append(row)

    def put_first(self, row: Row) -> None:
        """Queue a row before the others of its owner."""
        self._rows.setdefault(row.owner, deque()).appendleft(row)

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the rows of which `wanted(row)` is false."""
        kept = {owner: deque(filter(wanted, rows)) for owner, rows in self._rows.items()}
        self._rows = {owner: rows for owner, rows in kept.items() if rows}

    def next(self, placed: Iterable[Row]) -> Row | None:
        """Return the row that is placed next, None for none.

        Args:
            placed: the rows that run.
        """
        if len(self._rows) < 2:
            return next((rows[0] for rows in self._rows.values()), None)
        running = Counter(row.owner for row in placed)
        return self._rows[min(self._rows, key=lambda owner: running[owner])][0]

    def take(self, row: Row) -> None:
        """Take out a row that `next` returned."""
        rows = self._rows.pop(row.owner)
        rows.popleft()
        if rows:  # behind the other owners
            self._rows[row.owner] = rows
