"""Which points and events of a run are in memory? All that its file has, read once and added to from its cursor."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from jax_client.metrics.store import MAX_EVENTS, MAX_POINTS, Cursor, Event, MetricsStore
from jax_client.runs.overview.columns import Columns
from jax_client.runs.overview.records import Series
from jax_client.runs.overview.small_file import file_stamp

PAGE = 20_000


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
        self._begin()

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        return self._columns.values

    def _begin(self) -> None:
        stamp = file_stamp(self._path)
        self._inode = None if stamp is None else stamp[0]
        self._columns = Columns()
        self._events: list[Event] = []
        self._cursor = Cursor()

    def _update(self) -> None:
        stamp = file_stamp(self._path)
        rows = max(self._columns.rows(kind) for kind in ("step", "forward", "device", "user"))
        newest = self._metrics.newest()
        # A new file may have the old one's inode. A file that is only longer keeps fewer of its old points.
        is_new = newest.point < self._cursor.point or newest.event < self._cursor.event
        if (stamp and stamp[0]) != self._inode or is_new or rows > 2 * MAX_POINTS:
            self._begin()
        more = True
        while more:
            found = self._metrics.read(self._run_id, self._cursor, limit=PAGE)
            for point in found.points:
                self._columns.add(point.id, point.kind, point.step, point.time, point.metrics)
            self._events += found.events
            self._cursor, more = found.cursor, found.more
        del self._events[: max(0, len(self._events) - MAX_EVENTS)]

    def series(self, names: Collection[str] | None, *, points: int, since: str | None, live: bool) -> Series:
        """Return what there is after a cursor, thinned; see `Overview.series`."""
        begin = parse_cursor(since)
        with self._lock:
            self._update()
            # A cursor of a file that is gone is ahead of this one.
            if begin.point > self._cursor.point or begin.event > self._cursor.event:
                begin = Cursor()
            events = [
                {"kind": each.kind, "step": each.step, "time": each.time, "details": dict(each.details)}
                for each in self._events
                if each.id > begin.event
            ]
            return Series(
                run=self._run_id,
                series=self._columns.series(names, points=points, since=begin.point),
                names=self._columns.names(),
                events=events,
                next=f"{self._cursor.point}-{self._cursor.event}",
                live=live,
            )


def parse_cursor(text: str | None) -> Cursor:
    """Return the cursor that `next` spelt; the beginning for None, and for what is none."""
    point, _, event = (text or "").partition("-")
    if point.isascii() and point.isdigit() and event.isascii() and event.isdigit() and len(text or "") < 40:
        return Cursor(point=int(point), event=int(event))
    return Cursor()
