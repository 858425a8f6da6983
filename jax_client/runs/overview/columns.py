"""How are a million points of a run kept and drawn? In compact columns, thinned so that every spike stays.

A bucket of points keeps its smallest and its largest one, and a series its first and its last. An average would hide
the one step whose gradient exploded. Beside each point of a thinned series stands the mean of those that it replaces:
an average of the extremes alone would be another curve.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, TypeVar

from jax_client.metrics.store import MAX_STEP
from jax_client.metrics.summary import mean_loss
from jax_client.values import JsonObject

if TYPE_CHECKING:
    import numpy as np

MAX_NAMES = 512
# Numbers of one run in memory; of more, every second row goes, as in the file.
MAX_VALUES = 16_000_000
K = TypeVar("K")
V = TypeVar("V", bound="HasValues")
# Rows of a table that are made at once.
_BLOCK = 1_000


@dataclass(slots=True)
class _Rows:
    """What the points of one kind share: their ids and marks, steps, times and the tokens so far."""

    ids: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    marks: array[int] = field(default_factory=lambda: array("I"))


@dataclass(slots=True)
class _Column:
    """The values of one name, each with the number of its row."""

    kind: str
    at: array[int] = field(default_factory=lambda: array("I"))
    values: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One point with all its values; a time that is not known is None, a value that it lacks is ""."""

    kind: str
    step: int
    time: float | None
    tokens: int
    values: Sequence[float | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The points of a run, none of them left out.

    Attributes:
        names: of the values of each row, in their order.
        rows: in the order in which they were recorded; may be asked once, on any thread.
    """

    names: Sequence[str]
    rows: Iterator[TableRow]


class Columns:
    """The points of one run, by name. Not thread-safe.

    Attributes:
        values: how many numbers it holds.
    """

    def __init__(self) -> None:
        self.values = 0
        self._rows: dict[str, _Rows] = {}
        self._columns: dict[str, _Column] = {}
        self._tokens = 0.0

    def add(
        self,
        number: int,
        kind: str,
        step: int,
        time: float,
        metrics: Mapping[str, float],
        *,
        represents: int = 1,
        mark: int = 0,
    ) -> None:
        """Append a point.

        Args:
            number: its id, which grows from each to the next.
            kind, step, metrics: as of the point. A step beyond +-MAX_STEP, of another program's file, is the nearest.
            time: unix seconds; may be NaN.
            represents: points of its kind, with those before it that the file has left out.
            mark: 32 bits of what it holds, see `mark`.
        """
        rows = self._rows.get(kind)
        if rows is None:
            rows = self._rows[kind] = _Rows()
        if kind == "step" and "tokens:sum" in metrics:
            # Where points between were left out, theirs were as many on average.
            self._tokens += metrics["tokens:sum"] * max(1, represents)
            self._tokens = min(max(self._tokens, 0.0), float(MAX_STEP))
        row = len(rows.ids)
        rows.ids.append(number)
        rows.steps.append(min(max(step, -MAX_STEP), MAX_STEP))
        rows.times.append(time)
        rows.tokens.append(int(self._tokens))
        rows.marks.append(mark)
        for name, value in metrics.items():
            self._append(name, kind, row, value)
        if kind in ("step", "forward") and "loss:sum" in metrics and (loss := mean_loss(metrics)) is not None:
            self._append("loss:mean", kind, row, loss)
        if self.values > MAX_VALUES:
            self._halve()

    def _append(self, name: str, kind: str, row: int, value: float) -> None:
        column = self._columns.get(name)
        if column is None or column.kind != kind:
            # The names of a step are as they are; those of another kind that it has, too, say which they are.
            if column is not None or kind == "forward":
                name = f"{kind}/{name}"
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= MAX_NAMES:
                    return
                column = self._columns[name] = _Column(kind)
        if column.at and column.at[-1] == row:
            return  # what was recorded under a name goes before what is derived
        column.at.append(row)
        column.values.append(value)
        self.values += 1

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._columns)

    def rows(self, kind: str) -> int:
        """Return how many points of a kind there are."""
        return len(self._rows[kind].ids) if kind in self._rows else 0

    def newest(self) -> int:
        """Return the largest id, 0 where there is no point."""
        return max((rows.ids[-1] for rows in self._rows.values() if rows.ids), default=0)

    def mark(self, number: int) -> int | None:
        """Return what was given for the point of an id; 0 for the beginning, None where there is no such point."""
        for rows in self._rows.values():
            place = bisect_left(rows.ids, number)
            if place < len(rows.ids) and rows.ids[place] == number:
                return rows.marks[place]
        return None if number else 0

    def table(self, names: Collection[str] | None, *, without: Collection[str] = ()) -> Table:
        """Return every point that has one of the names, but those of the kinds `without`.

        It costs no copy: its rows are read from the columns as they are now, also while more is added.
        """
        chosen = self.names() if names is None else [name for name in dict.fromkeys(names) if name in self._columns]
        chosen = [name for name in chosen if self._columns[name].kind not in without]
        columns = [self._columns[name] for name in chosen]
        # Of one list each, for `_halve` replaces them; longer ones may follow.
        kinds = dict.fromkeys(column.kind for column in columns)
        parts = [
            _rows_of(
                kind,
                self._rows[kind],
                [(i, column.at, column.values) for i, column in enumerate(columns) if column.kind == kind],
                len(columns),
            )
            for kind in kinds
        ]
        return Table(names=chosen, rows=(row for _, row in heapq.merge(*parts, key=itemgetter(0))))

    def series(self, names: Collection[str] | None, *, points: int, since: int = 0) -> dict[str, JsonObject]:
        """Return the values of the names after the point `since`, of each at most about `points`."""
        chosen = self.names() if names is None else [name for name in names if name in self._columns]
        found = {name: self._one(self._columns[name], points, since) for name in chosen}
        return {name: series for name, series in found.items() if series["value"]}

    def _one(self, column: _Column, points: int, since: int) -> JsonObject:
        rows = self._rows[column.kind]
        first = _after(rows.ids, column.at, since)
        chosen = thinned(column.values, first, points)
        at = [column.at[i] for i in chosen]
        is_thinned = len(chosen) < len(column.values) - first
        return {
            "kind": column.kind,
            "step": [rows.steps[row] for row in at],
            "time": [time if math.isfinite(time := rows.times[row]) else None for row in at],
            "tokens": [rows.tokens[row] for row in at],
            "value": [column.values[i] for i in chosen],
            **(replaced(column.values, first, chosen) if is_thinned else {}),
        }

    def _halve(self) -> None:
        """Leave every second row out; the newest stays."""
        odd = {kind: (len(rows.ids) - 1) % 2 for kind, rows in self._rows.items()}
        for kind, rows in self._rows.items():
            start = odd[kind]
            rows.ids, rows.steps, rows.tokens = rows.ids[start::2], rows.steps[start::2], rows.tokens[start::2]
            rows.times, rows.marks = rows.times[start::2], rows.marks[start::2]
        self.values = 0
        for column in self._columns.values():
            start = odd[column.kind]
            kept = [i for i, row in enumerate(column.at) if row % 2 == start]
            column.at = array("I", ((column.at[i] - start) // 2 for i in kept))
            column.values = array("d", (column.values[i] for i in kept))
            self.values += len(kept)


class HasValues(Protocol):
    """What has columns in memory."""

    @property
    def values(self) -> int:
        """How many numbers they hold."""
        ...


def forget_oldest(kept: OrderedDict[K, V], most: int, most_values: int) -> None:
    """Remove the oldest until there are at most `most`, with at most `most_values` numbers; the newest stays."""
    values = sum(each.values for each in kept.values())
    while len(kept) > most or (values > most_values and len(kept) > 1):
        values -= kept.popitem(last=False)[1].values


def _after(ids: array[int], at: array[int], since: int) -> int:
    """Return the first place of a column whose row has a larger id than `since`."""
    low, high = 0, len(at)
    while low < high:
        middle = (low + high) // 2
        if ids[at[middle]] > since:
            high = middle
        else:
            low = middle + 1
    return low


def thinned(values: array[float], first: int, points: int) -> list[int]:
    """Return the places from `first` on that are drawn: all, or about `points` with every bucket's extremes.

    The smallest and the largest value of each bucket, the first and the last place are among them.
    """
    count, most = len(values) - first, max(points, 4)
    if count <= most:
        return list(range(first, len(values)))
    import numpy as np  # here, because a list of runs has no need of it

    found = np.frombuffer(values, dtype=np.float64)[first:]
    buckets = (most - 2) // 2
    size = -(-count // buckets)
    whole = count // size
    body = found[: whole * size].reshape(whole, size)
    starts = np.arange(whole) * size
    chosen = {0, count - 1, *(starts + body.argmin(1)).tolist(), *(starts + body.argmax(1)).tolist()}
    if whole * size < count:
        rest = found[whole * size :]
        chosen |= {whole * size + int(rest.argmin()), whole * size + int(rest.argmax())}
    return [first + place for place in sorted(chosen)]


def replaced(values: array[float], first: int, chosen: Sequence[int]) -> JsonObject:
    """Return what each place of `thinned` stands for: itself, and those after the place before it.

    Returns:
        {"count": the number of finite values, "mean": theirs, None where there is none}.
    """
    import numpy as np

    found = np.frombuffer(values, dtype=np.float64)[first : chosen[-1] + 1]
    starts = np.array([0, *(place + 1 - first for place in chosen[:-1])])
    finite = np.isfinite(found)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    # Not by differences of one running sum: a spike would take the digits of all that follows.
    means = _means(np.where(finite, found, 0.0), starts, counts)
    return {
        "count": counts.tolist(),
        "mean": [mean if count else None for mean, count in zip(means.tolist(), counts.tolist(), strict=True)],
    }


def _means(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    import numpy as np

    divisors = np.maximum(counts, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.add.reduceat(values, starts) / divisors
        if not np.isfinite(means).all():
            # A sum that no double holds, of numbers near the largest one; a power of two costs no digit.
            small = np.ldexp(np.add.reduceat(np.ldexp(values, -64), starts) / divisors, 64)
            most = np.finfo(np.float64).max
            means = np.where(np.isfinite(means), means, np.clip(small, -most, most))
    return means


def _rows_of(
    kind: str, rows: _Rows, columns: Sequence[tuple[int, array[int], array[float]]], width: int
) -> Iterator[tuple[int, TableRow]]:
    """Return the points of one kind with their ids, as they are now; each column comes with its place in a row."""
    ids, steps, times, tokens, count = rows.ids, rows.steps, rows.times, rows.tokens, len(rows.ids)

    def found() -> Iterator[tuple[int, TableRow]]:
        for start in range(0, count, _BLOCK):
            end = min(start + _BLOCK, count)
            cells: list[list[float | str]] = [[""] * width for _ in range(start, end)]
            has = [False] * len(cells)
            for place, at, values in columns:
                low = bisect_left(at, start)
                for row, value in zip(at[low : low + _BLOCK], values[low : low + _BLOCK], strict=False):
                    if row >= end:
                        break
                    cells[row - start][place] = value
                    has[row - start] = True
            for row in range(start, end):
                if has[row - start]:
                    time = times[row] if math.isfinite(times[row]) else None
                    yield (
                        ids[row],
                        TableRow(kind=kind, step=steps[row], time=time, tokens=tokens[row], values=cells[row - start]),
                    )

    return found()
