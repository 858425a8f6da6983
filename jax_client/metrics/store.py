"""Where are the metrics and events of a run kept? STATE/metrics.sqlite holds the points and events of every run.

A point has a step's metrics; an event is a save, a compile or the like. The file is worth less than the training, and
nothing here raises for its sake: see `sqlite_file`.

A series, the points of one run and kind, has a bounded number of rows. Where there are too many, every second one goes,
of those that are left from before every second one again, and so on: the whole run stays visible at one density, with
its first point and its newest ones in full. All runs together have a limit, too: the run whose points are oldest goes.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jax_client.metrics.newest import newest
from jax_client.metrics.summary import Summary
from jax_client.sqlite_file import SqliteFile, reclaim, transaction, used_bytes
from jax_client.values import JsonObject

T = TypeVar("T")
# Run, kind, step, time, JSON, id, number.
_Row = tuple[str, str, int, float, str, int, int]

FILE_NAME = "metrics.sqlite"
DAMAGED = ".damaged"
# Only the recorder's own thread and readers wait for it.
BUSY_SECONDS = 5.0
# Rows of a series before it is thinned; the newest are kept in full; events of a run, of which the oldest go.
MAX_POINTS = 10_000
NEWEST = 1_000
MAX_EVENTS = 2_000
# Of the file; a look at its size after this number of points.
MAX_BYTES = 1_000 * 2**20
_LEFT = 0.9
_LOOK_EVERY = 500
# A step is at most what a double, and so every reader, holds exactly.
MAX_STEP = 2**53
# Of one point or event: a user's own metrics may have any names.
MAX_KEYS = 256
MAX_TEXT = 200

_TABLES = """
CREATE TABLE series (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, kind TEXT NOT NULL, next INTEGER NOT NULL, stride INTEGER NOT NULL,
    rows INTEGER NOT NULL, UNIQUE (run, kind)
);
CREATE TABLE points (
    id INTEGER PRIMARY KEY AUTOINCREMENT, series INTEGER NOT NULL, number INTEGER NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, metrics TEXT NOT NULL
);
CREATE INDEX points_of_series ON points (series, id);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, details TEXT NOT NULL
);
CREATE INDEX events_of_run ON events (run, id);
"""
_SUMMARIES = """
CREATE TABLE summaries (run TEXT PRIMARY KEY, summary TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX events_of_kind ON events (kind, run);
"""
# From version N to N + 1 at place N.
_MIGRATIONS = (_TABLES, _SUMMARIES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The metrics of one run at one step.

    Attributes:
        run: its id.
        kind: of the series, such as "step".
        step: optimizer steps that the run had taken.
        time: unix seconds.
        metrics: finite numbers by name; others are left out.
        id: grows from each point to the next in the file; 0 for one that is not in it.
        number: how many points its series had before it, with those that were left out since.
    """

    run: str
    kind: str
    step: int
    time: float
    metrics: Mapping[str, float]
    id: int = 0
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened in a run, such as a compile.

    Attributes:
        run, kind, step, time, id: as of a point.
        details: numbers, texts and truth values by name.
    """

    run: str
    kind: str
    step: int
    time: float
    details: Mapping[str, object]
    id: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """That a run is alive at a time; it compiles the program named, "" for none."""

    run: str
    time: float
    compiling: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far a reader is: the newest point and event that it has seen."""

    point: int = 0
    event: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a run has after a cursor.

    Attributes:
        points, events: in the order in which they were recorded.
        cursor: where the next read begins.
        more: whether the limit left something out.
        readable: whether the file was there and could be read.
    """

    points: Sequence[Point] = ()
    events: Sequence[Event] = ()
    cursor: Cursor = field(default_factory=Cursor)
    more: bool = False
    readable: bool = True


class MetricsStore:
    """The metrics file of one state directory. Thread-safe; any number of processes may share the file.

    Args:
        path: of the file; made when something is first added.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(
            path,
            _MIGRATIONS,
            busy_seconds=BUSY_SECONDS,
            unused="metrics are not recorded",
            shrinks=True,
            damaged=DAMAGED,
        )
        self._summaries: dict[str, tuple[str, Summary | None]] = {}
        # The first look is at once: a file may have become too large before.
        self._until_look = 0

    def add(self, points: Iterable[Point] = (), events: Iterable[Event] = (), signs: Iterable[Sign] = ()) -> bool:
        """Write points, events and signs, and thin out what has become too much; say whether they are in the file."""
        new_points, new_events, new_signs = list(points), list(events), list(signs)

        def work(database: sqlite3.Connection) -> bool:
            with transaction(database):
                _summarise(database, new_points, new_events, new_signs)
                for point in new_points:
                    _add_point(database, point)
                for event in new_events:
                    row = (event.run, event.kind, event.step, event.time, _json(_plain(event.details)))
                    database.execute("INSERT INTO events (run, kind, step, time, details) VALUES (?, ?, ?, ?, ?)", row)
                for run, kind in {(point.run, point.kind) for point in new_points}:
                    _thin(database, run, kind)
                for run in {event.run for event in new_events}:
                    _forget_old_events(database, run)
            self._until_look -= len(new_points) + len(new_events)
            if self._until_look <= 0:
                self._until_look = _LOOK_EVERY
                _forget_old_runs(database, {each.run for each in (*new_points, *new_events)})
            return True

        return self._file.use(work, False)

    def read(self, run: str, since: Cursor | None = None, *, limit: int = 1_000) -> Found:
        """Return what a run has after a cursor, at most `limit` points and `limit` events, the oldest first."""
        since = since or Cursor()

        def work(database: sqlite3.Connection) -> Found:
            # One after the other, and the points last: none of them is newer than an event that is not seen.
            events = [_event(row) for row in database.execute(_EVENTS, (run, since.event, limit + 1))]
            points = [_point(row) for row in database.execute(_POINTS, (run, since.point, limit + 1))]
            return _found(points[:limit], events[:limit], since, more=max(len(points), len(events)) > limit)

        return self._reading(work, Found(cursor=since, readable=False))

    def overview(self, run: str, since: Cursor | None = None, *, most: int) -> Found:
        """Return all that a run has after a cursor, of each kind at most `most` points (2 or more), evenly spread.

        Points are left out, never averaged; the first and the last of each kind are among them.
        """
        since = since or Cursor()

        def work(database: sqlite3.Connection) -> Found:
            events = [_event(row) for row in database.execute(_EVENTS, (run, since.event, -1))]
            ids: dict[int, list[int]] = {}
            for series, number in database.execute(_POINT_IDS, (run, since.point)):
                ids.setdefault(series, []).append(number)
            chosen = sorted(number for numbers in ids.values() for number in _spread(numbers, most))
            points: list[Point] = []
            for start in range(0, len(chosen), 500):  # SQLite allows so many variables, and more
                part = chosen[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"{_SELECT_POINTS} WHERE points.id IN ({marks}) ORDER BY points.id"
                points += [_point(row) for row in database.execute(query, part)]
            return _found(points, events, since, more=False)

        return self._reading(work, Found(cursor=since, readable=False))

    def summaries(self) -> dict[str, Summary]:
        """Return the summary of every run, by its id."""

        def parsed(run: str, text: str) -> Summary | None:
            known = self._summaries.get(run)
            if known is None or known[0] != text:
                known = self._summaries[run] = text, _summary(text)
            return known[1]

        def work(database: sqlite3.Connection) -> dict[str, Summary]:
            found = {run: parsed(run, text) for run, text in database.execute("SELECT run, summary FROM summaries")}
            for run in self._summaries.keys() - found:
                self._summaries.pop(run, None)
            # Those that an earlier version of this package wrote have none.
            query = "SELECT run FROM series EXCEPT SELECT run FROM summaries"
            missing = [run for (run,) in database.execute(query)]
            return {run: summary for run, summary in found.items() if summary is not None} | {
                run: _from_points(database, run) for run in missing
            }

        return self._reading(work, {})

    def events(self, kinds: Collection[str], run: str | None = None) -> list[Event]:
        """Return the events of some kinds, of a run or of all, the oldest first."""
        marks = ",".join("?" * len(kinds))
        where, values = ("", ()) if run is None else (" AND run = ?", (run,))
        query = f"SELECT run, kind, step, time, details, id FROM events WHERE kind IN ({marks}){where} ORDER BY id"
        return self._reading(lambda database: [_event(row) for row in database.execute(query, (*kinds, *values))], [])

    def latest(self, run: str, *, point: str, event: str, most: int) -> JsonObject:
        """Return a run's newest point of a kind and its newest events of another; see `newest`."""
        return self._reading(lambda database: newest(database, run, point, event, most), {"point": None, "events": []})

    def runs(self) -> list[JsonObject]:
        """Return the runs that have points: run, points (rows), step and time of the newest; the newest run first."""
        query = """
            SELECT series.run, SUM(series.rows), newest.step, MAX(newest.time) FROM series
            JOIN points AS newest ON newest.id = (SELECT MAX(p.id) FROM points AS p WHERE p.series = series.id)
            GROUP BY series.run ORDER BY MAX(newest.time) DESC, series.run
        """
        names = ("run", "points", "step", "time")
        return self._reading(
            lambda database: [dict(zip(names, row, strict=True)) for row in database.execute(query)], []
        )

    def _reading(self, work: Callable[[sqlite3.Connection], T], nothing: T) -> T:
        return self._file.read(work, nothing) if self._file.path.exists() else nothing


def _summarise(
    database: sqlite3.Connection, points: Sequence[Point], events: Sequence[Event], signs: Sequence[Sign]
) -> None:
    """Add what is new to the summaries of its runs; before it is in the tables, from which a missing one is made."""
    changed: dict[str, Summary] = {}
    for run in dict.fromkeys(each.run for each in (*points, *events, *signs)):
        found = database.execute("SELECT summary FROM summaries WHERE run = ?", (run,)).fetchone()
        changed[run] = (None if found is None else _summary(found[0])) or _from_points(database, run)
    for each in sorted((*points, *events), key=lambda each: each.time):
        if isinstance(each, Point):
            changed[each.run].add_point(each.kind, each.step, each.time, _storable(each.metrics))
        else:
            changed[each.run].add_event(each.kind, each.step, each.time, each.details)
    for sign in signs:
        changed[sign.run].add_sign(sign.time, sign.compiling)
    rows = [(run, _json(summary.to_json())) for run, summary in changed.items()]
    database.executemany("INSERT OR REPLACE INTO summaries (run, summary) VALUES (?, ?)", rows)


def _summary(text: str) -> Summary | None:
    """Return what a row holds; None where another version wrote it, or something else."""
    try:
        return Summary.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _from_points(database: sqlite3.Connection, run: str) -> Summary:
    """Make the summary of a run of an earlier version: from its starts and ends, and what is left of its points."""
    summary = Summary()
    for row in database.execute(_EVENTS, (run, 0, -1)):
        summary.add_event(row[1], row[2], row[3], json.loads(row[4]))
    ended, active = summary.ended, summary.active
    for row in database.execute(_POINTS, (run, 0, -1)):
        summary.add_point(row[1], row[2], row[3], json.loads(row[4]))
    summary.ended = ended
    summary.active = max((time for time in (active, summary.active) if time is not None), default=None)
    return summary


def _add_point(database: sqlite3.Connection, point: Point) -> None:
    database.execute(
        "INSERT INTO series (run, kind, next, stride, rows) VALUES (?, ?, 1, 1, 1) "
        "ON CONFLICT (run, kind) DO UPDATE SET next = next + 1, rows = rows + 1",
        (point.run, point.kind),
    )
    found = database.execute("SELECT id, next - 1 FROM series WHERE run = ? AND kind = ?", (point.run, point.kind))
    series, number = found.fetchone()
    database.execute(
        "INSERT INTO points (series, number, step, time, metrics) VALUES (?, ?, ?, ?, ?)",
        (series, number, point.step, point.time, _json(_storable(point.metrics))),
    )


def _thin(database: sqlite3.Connection, run: str, kind: str) -> None:
    found = database.execute("SELECT id, next, stride, rows FROM series WHERE run = ? AND kind = ?", (run, kind))
    series, following, stride, rows = found.fetchone()
    if rows <= MAX_POINTS:
        return
    # First those that were new and in full; then a wider stride, if that made too little room for many more.
    while True:
        gone = database.execute(
            "DELETE FROM points WHERE series = ? AND number % ? != 0 AND number < ?",
            (series, stride, following - NEWEST),
        ).rowcount
        rows -= gone
        if rows <= MAX_POINTS * 3 // 4:
            break
        stride *= 2
    database.execute("UPDATE series SET stride = ?, rows = ? WHERE id = ?", (stride, rows, series))


def _forget_old_events(database: sqlite3.Connection, run: str) -> None:
    database.execute(
        "DELETE FROM events WHERE run = ? AND id <= "
        "(SELECT id FROM events WHERE run = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (run, run, MAX_EVENTS),
    )


def _forget_old_runs(database: sqlite3.Connection, current: Collection[str]) -> None:
    """Delete whole runs, the longest silent first, while the file is too large; then points of the current ones."""
    if used_bytes(database) <= MAX_BYTES:
        return
    marks = ",".join("?" * len(current))
    query = (
        "SELECT run FROM (SELECT run, MAX(points.id) AS newest FROM series "
        "LEFT JOIN points ON points.series = series.id GROUP BY run) "
        f"WHERE run NOT IN ({marks}) ORDER BY newest"
    )
    for (run,) in database.execute(query, tuple(current)).fetchall():
        if used_bytes(database) <= _LEFT * MAX_BYTES:
            break
        with transaction(database):
            database.execute("DELETE FROM points WHERE series IN (SELECT id FROM series WHERE run = ?)", (run,))
            database.execute("DELETE FROM series WHERE run = ?", (run,))
            database.execute("DELETE FROM events WHERE run = ?", (run,))
            database.execute("DELETE FROM summaries WHERE run = ?", (run,))
    while used_bytes(database) > _LEFT * MAX_BYTES:
        found = database.execute("SELECT id, rows FROM series ORDER BY rows DESC LIMIT 1").fetchone()
        if found is None or found[1] < 2:
            break
        series, rows = found
        with transaction(database):
            gone = database.execute(
                "DELETE FROM points WHERE id IN (SELECT id FROM points WHERE series = ? ORDER BY id LIMIT ?)",
                (series, rows // 2),
            ).rowcount
            database.execute("UPDATE series SET rows = rows - ? WHERE id = ?", (max(gone, 1), series))
    reclaim(database)


_SELECT_POINTS = (
    "SELECT series.run, series.kind, points.step, points.time, points.metrics, points.id, points.number "
    "FROM points JOIN series ON series.id = points.series"
)
_POINTS = f"{_SELECT_POINTS} WHERE series.run = ? AND points.id > ? ORDER BY points.id LIMIT ?"
_POINT_IDS = (
    "SELECT points.series, points.id FROM points JOIN series ON series.id = points.series "
    "WHERE series.run = ? AND points.id > ? ORDER BY points.series, points.id"
)
_EVENTS = "SELECT run, kind, step, time, details, id FROM events WHERE run = ? AND id > ? ORDER BY id LIMIT ?"


def _point(row: _Row) -> Point:
    run, kind, step, time, metrics, identity, number = row
    return Point(run=run, kind=kind, step=step, time=time, metrics=json.loads(metrics), id=identity, number=number)


def _event(row: tuple[str, str, int, float, str, int]) -> Event:
    run, kind, step, time, details, identity = row
    return Event(run=run, kind=kind, step=step, time=time, details=json.loads(details), id=identity)


def _found(points: Sequence[Point], events: Sequence[Event], since: Cursor, *, more: bool) -> Found:
    cursor = Cursor(
        point=max([since.point, *(point.id for point in points)]),
        event=max([since.event, *(event.id for event in events)]),
    )
    return Found(points=points, events=events, cursor=cursor, more=more)


def _spread(numbers: list[int], most: int) -> Iterable[int]:
    """Return at most `most` of the numbers, evenly spread, the first and the last among them."""
    if len(numbers) <= most:
        return numbers
    last = len(numbers) - 1
    return [numbers[i * last // (most - 1)] for i in range(most)]


def _storable(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what JSON can hold, within the bounds: a point may have any names and values."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if len(found) == MAX_KEYS:
            break
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                found[str(name)[:MAX_TEXT]] = number
    return found


def _plain(details: Mapping[str, object]) -> JsonObject:
    return {
        str(name)[:MAX_TEXT]: value[:MAX_TEXT] if isinstance(value, str) else value
        for name, value in list(details.items())[:MAX_KEYS]
        if isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))
    }


def _json(values: Mapping[str, object]) -> str:
    return json.dumps(values, separators=(",", ":"), allow_nan=False)
