"""Which points and events of a run are in memory? All that its file has, read once and added to from its cursor.

A reader's cursor is "GENERATION-POINT-EVENT". The generation says what the file has at that point and that event, so
that a file which was begun anew or restored is told from one that grew, whichever process reads it.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from jax_client.metrics.store import MAX_EVENTS, MAX_POINTS, Cursor, Event, MetricsStore, Point
from jax_client.runs.overview.columns import Columns, Table
from jax_client.runs.overview.records import Series
from jax_client.runs.overview.small_file import file_stamp

PAGE = 20_000


class _UnreadableError(Exception):
    """The file cannot be read now, or is not there."""


@dataclass(slots=True)
class _Known:
    """What was read of one file.

    Attributes:
        inode: of the file.
        cursor: how far it is read.
        steps: points of the kind "step" that the series has had so far.
    """

    inode: int | None
    columns: Columns = field(default_factory=Columns)
    events: list[Event] = field(default_factory=list)
    cursor: Cursor = field(default_factory=Cursor)
    steps: int = 0

    def spelt(self, cursor: Cursor) -> str | None:
        """Return a cursor as text, None where the file does not have its point or its event."""
        return spelt(cursor, self.columns.mark(cursor.point), self._event_mark(cursor.event))

    def _event_mark(self, number: int) -> int | None:
        place = bisect_left(self.events, number, key=attrgetter("id"))
        if place < len(self.events) and self.events[place].id == number:
            return _mark(self.events[place])
        return None if number else 0

    def has(self, points: list[Point], events: list[Event]) -> bool:
        """Return whether the first of what was read from its newest point and event on are these two."""
        pairs = ((self.cursor.point, points), (self.cursor.event, events))
        if any(number and (not rows or rows[0].id != number) for number, rows in pairs):
            return False
        found = spelt(self.cursor, _first_mark(self.cursor.point, points), _first_mark(self.cursor.event, events))
        return found == self.spelt(self.cursor)

    def add(self, point: Point) -> None:
        represents = 1
        if point.kind == "step":
            represents, self.steps = point.number + 1 - self.steps, point.number + 1
        self.columns.add(
            point.id, point.kind, point.step, point.time, point.metrics, represents=represents, mark=_mark(point)
        )


class RunPoints:
    """The points and events of one run. Thread-safe.

    Args:
        run_id: of the run.
        metrics: where they are read.
        path: of the metrics file: another one in its place begins anew.
    """

    def __init__(self, run_id: str, metrics: MetricsStore, path: Path) -> None:
        self._run_id = run_id
        self._metrics = metrics
        self._path = path
        self._lock = threading.Lock()
        self._known = _Known(None)

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        return self._known.columns.values

    def _update(self) -> bool:
        """Read what is new; return whether the file can be read. Where not, what is known stays."""
        stamp = file_stamp(self._path)
        if stamp is None:
            return False
        rows = max(self._known.columns.rows(kind) for kind in ("step", "forward", "device", "user"))
        try:
            # A file that is only longer keeps fewer of its old points.
            if stamp[0] != self._known.inode or rows > 2 * MAX_POINTS or not self._read_on(self._known):
                new = _Known(stamp[0])
                self._read_on(new)
                self._known = new
        except _UnreadableError:
            return False
        return True

    def _read_on(self, known: _Known) -> bool:
        """Read what the file has more than is known; return False where it is another one. Raises _UnreadableError."""
        more = True
        while more:
            # From what is known on: a new file may have the old one's inode, and more points.
            last = Cursor(point=max(known.cursor.point - 1, 0), event=max(known.cursor.event - 1, 0))
            found = self._metrics.read(self._run_id, last, limit=PAGE)
            if not found.readable:
                raise _UnreadableError
            points, events = list(found.points), list(found.events)
            if not known.has(points, events):
                return False
            for point in points[1 if known.cursor.point else 0 :]:
                known.add(point)
            known.events += events[1 if known.cursor.event else 0 :]
            known.cursor, more = found.cursor, found.more
        del known.events[: max(0, len(known.events) - MAX_EVENTS)]
        return True

    def series(self, names: Collection[str] | None, *, points: int, since: str | None, live: bool) -> Series:
        """Return what there is after a cursor, thinned; see `Overview.series`."""
        with self._lock:
            is_readable, known = self._update(), self._known
            begin = parse_cursor(since)
            reset = since is not None and known.spelt(begin) != since
            if reset and not is_readable:
                return Series(run=self._run_id, names=known.columns.names(), next=since or "", live=live)
            begin = Cursor() if reset else begin
            events = [
                {"kind": each.kind, "step": each.step, "time": each.time, "details": dict(each.details)}
                for each in known.events
                if each.id > begin.event
            ]
            return Series(
                run=self._run_id,
                series=known.columns.series(names, points=points, since=begin.point),
                names=known.columns.names(),
                events=events,
                next=known.spelt(known.cursor) or "",
                live=live,
                reset=reset,
            )

    def table(self, names: Collection[str] | None, *, without: Collection[str]) -> Table:
        """Return every point; see `Overview.table`."""
        with self._lock:
            self._update()
            return self._known.columns.table(names, without=without)


def parse_cursor(text: str | None) -> Cursor:
    """Return the point and the event that `next` spelt; the beginning for None, and for what is none."""
    _, _, place = (text or "").partition("-")
    point, _, event = place.partition("-")
    if point.isascii() and point.isdigit() and event.isascii() and event.isdigit() and len(place) < 40:
        return Cursor(point=int(point), event=int(event))
    return Cursor()


def spelt(cursor: Cursor, point_mark: int | None, event_mark: int | None = 0) -> str | None:
    """Return a cursor as `next` spells it, None where a mark, of what is at its point and its event, is not known."""
    if point_mark is None or event_mark is None:
        return None
    return f"{point_mark:08x}{event_mark:08x}-{cursor.point}-{cursor.event}"


def _mark(row: Point | Event) -> int:
    held = row.metrics if isinstance(row, Point) else row.details
    return zlib.crc32(f"{row.id} {row.kind} {row.step} {row.time} {held}".encode("utf-8", "replace"))


def _first_mark(number: int, rows: list[Point] | list[Event]) -> int:
    return _mark(rows[0]) if number else 0
