"""How are a million points of a run kept and drawn? In compact columns, thinned so that every spike stays.

A bucket of points keeps its smallest and its largest one, and a series its first and its last. An average would hide
the one step whose gradient exploded.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from jax_client.metrics.summary import mean_loss
from jax_client.values import JsonObject

MAX_NAMES = 512
# Numbers of one run in memory; of more, every second row goes, as in the file.
MAX_VALUES = 16_000_000


@dataclass(slots=True)
class _Rows:
    """What the points of one kind share: their ids, steps, times and the tokens so far."""

    ids: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[int] = field(default_factory=lambda: array("q"))


@dataclass(slots=True)
class _Column:
    """The values of one name, each with the number of its row."""

    kind: str
    at: array[int] = field(default_factory=lambda: array("I"))
    values: array[float] = field(default_factory=lambda: array("d"))


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
        self._step = 0

    def add(self, number: int, kind: str, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Append a point; its id grows from each to the next, its time may be NaN."""
        rows = self._rows.get(kind)
        if rows is None:
            rows = self._rows[kind] = _Rows()
        if kind == "step" and "tokens:sum" in metrics:
            # Where points between were left out, theirs were as many on average.
            self._tokens += metrics["tokens:sum"] * max(1, step - self._step if self._step else 1)
            self._step = max(step, self._step)
        row = len(rows.ids)
        rows.ids.append(number)
        rows.steps.append(step)
        rows.times.append(time)
        rows.tokens.append(int(self._tokens))
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
        return {
            "kind": column.kind,
            "step": [rows.steps[row] for row in at],
            "time": [time if math.isfinite(time := rows.times[row]) else None for row in at],
            "tokens": [rows.tokens[row] for row in at],
            "value": [column.values[i] for i in chosen],
        }

    def _halve(self) -> None:
        """Leave every second row out; the newest stays."""
        odd = {kind: (len(rows.ids) - 1) % 2 for kind, rows in self._rows.items()}
        for kind, rows in self._rows.items():
            start = odd[kind]
            rows.ids, rows.steps, rows.tokens = rows.ids[start::2], rows.steps[start::2], rows.tokens[start::2]
            rows.times = rows.times[start::2]
        self.values = 0
        for column in self._columns.values():
            start = odd[column.kind]
            kept = [i for i, row in enumerate(column.at) if row % 2 == start]
            column.at = array("I", ((column.at[i] - start) // 2 for i in kept))
            column.values = array("d", (column.values[i] for i in kept))
            self.values += len(kept)


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
