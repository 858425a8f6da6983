"""Which row is placed next? The first one of the owner who has least of the cache; an owner's rows keep their order.

`CacheUse` counts what each owner has: of the places for rows and of the pages that part counts which is the larger
(Ghodsi et al., "Dominant resource fairness", NSDI 2011). `Waiting` has a queue for each owner. Where owners have equal
parts, the one goes first whose last row was placed the longest ago.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, KeysView
from dataclasses import dataclass, field, replace

from jax_client.engine.sample.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheUse:
    """What each owner has of a cache.

    Attributes:
        all_rows, all_pages: that there can be.
        rows: of each owner that are placed.
        pages: of each owner that these use; one that several use counts once.
    """

    all_rows: int
    all_pages: int
    rows: Counter[str] = field(default_factory=Counter)
    pages: Counter[str] = field(default_factory=Counter)

    def part(self, owner: str, rows: int = 0, pages: int = 0) -> float:
        """Return which part of the rows or of the pages an owner has, with these beside: the larger of the two."""
        return max((self.rows[owner] + rows) / self.all_rows, (self.pages[owner] + pages) / self.all_pages)

    def copy(self) -> CacheUse:
        """Return the same, to be changed on its own."""
        return replace(self, rows=self.rows.copy(), pages=self.pages.copy())


class Waiting:
    """The rows that wait, in order for each owner."""

    def __init__(self) -> None:
        self._rows: dict[str, deque[Row]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __iter__(self) -> Iterator[Row]:
        return (row for rows in self._rows.values() for row in rows)

    def owners(self) -> KeysView[str]:
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

    def next(self, use: CacheUse, passed: Collection[str] = ()) -> Row | None:
        """Return the row that is placed next, None for none.

        Args:
            use: of the rows that run.
            passed: owners who have no turn now.
        """
        owner = min((each for each in self._rows if each not in passed), key=use.part, default=None)
        return None if owner is None else self._rows[owner][0]

    def take(self, row: Row) -> None:
        """Take out a row that `next` returned."""
        rows = self._rows.pop(row.owner)
        rows.popleft()
        if rows:  # behind the other owners
            self._rows[row.owner] = rows


def in_turn(rows: Iterable[Row]) -> list[Row]:
    """Return rows from the owners in turn; of each owner those first that took part in a block the longest ago."""
    waited = sorted(rows, key=lambda row: row.served)
    before: Counter[str] = Counter()
    places = []
    for row in waited:
        places.append(before[row.owner])
        before[row.owner] += 1
    return [waited[i] for i in sorted(range(len(waited)), key=lambda i: places[i])]
