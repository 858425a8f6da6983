"""How do open pages learn what is new? One thread looks at the files, and puts what changed into each page's queue.

However many pages are open, each change is read once. The thread lives as long as there are pages. It gives a small
part of a core to the list of runs, whatever their number; a watched run's points come first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from jax_client import process
from jax_client.errors import BadRequestError, JaxClientError, shown
from jax_client.process import Step
from jax_client.server.dashboard.answers import encoded
from jax_client.server.dashboard.device import Devices
from jax_client.server.dashboard.source import Source, listed
from jax_client.server.wire.accounts import BusyError
from jax_client.threads import start_thread
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.4
# The list of runs is made anew at most every so often, and at least, because a run becomes idle without a change.
_SHARE, LEAST_SECONDS, MOST_SECONDS = 50.0, 0.4, 10.0
DEVICE_SECONDS = 3.0
POINTS = 2_000
MOST_PAGES = 64
# While so much waits for a page that does not read as fast, it is given nothing; later all that is new since.
MOST_BYTES = 8 * 2**20
# Of the rows, and the numbers of series, in one frame; a single row or series may have more.
PART_BYTES, PART_VALUES = 2**18, 40_000
# Runs that are gone, of which a page that was away is told.
MOST_GONE = 1_000
# A place in the middle of an answer, in the ids of its frames: no series has this one, so all is sent anew.
NOWHERE = "0-0-0"
_ID = re.compile(r"([0-9a-f]{8})\.([0-9]{1,12})\.([0-9a-z-]{1,60})?")


class Page:
    """One open page, and what waits to be sent to it. Made and read on the event loop's thread.

    Args:
        run: that it shows, None for none.
        since: how far it knows that run's series.
        seen: the change of the list of runs up to which it has them.
        archived: whether it is given archived runs that do not change.
    """

    def __init__(self, run: str | None, since: str | None, seen: int, *, archived: bool = False) -> None:
        self.run, self.since, self.seen = run, since, seen
        # Up to this change archived runs are left out; None until that is known.
        self.quiet = 0 if archived or seen else None
        # What the source said when the points were last read for it.
        self.looked: str | None = None
        self.devices = 0
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._given = self._taken = 0
        self._filled = asyncio.Event()

    def has_room(self) -> bool:
        """Return whether the page may be given more; for the thread that gives."""
        return self._given - self._taken < MOST_BYTES

    def put(self, frame: bytes) -> None:
        """Give a frame to the page, from one thread."""
        self._given += len(frame)
        # A loop that has ended, and its pages with it, takes nothing.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, frame)

    def _put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._filled.set()

    async def next(self, seconds: float) -> bytes:
        """Return what is to be sent next; b"" where nothing came for so long."""
        if not self._frames:
            self._filled.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._filled.wait()
            except TimeoutError:
                return b""
        frame = self._frames.popleft()
        self._taken += len(frame)
        return frame


@dataclass(frozen=True, slots=True)
class _Change:
    """A row as it became by a change, and as it is sent; no row where the run went."""

    number: int
    row: JsonObject | None
    text: bytes


@dataclass(slots=True)
class _Rows:
    """The list of runs as it was last read, and the newest change of each; the changes are numbered."""

    version: int = 0
    rows: list[JsonObject] = field(default_factory=list)
    # In the order of their numbers.
    changes: dict[str, _Change] = field(default_factory=dict)

    def update(self, found: Iterable[JsonObject]) -> None:
        new = {str(row["run"]): row for row in found}
        # All of it before any of it is kept.
        texts = {run: encoded(row) for run, row in new.items() if not self._is(run, row)}
        for run in [run for run, change in self.changes.items() if change.row is not None and run not in new]:
            self._change(run, None, encoded(run))
        for run, text in texts.items():
            self._change(run, new[run], text)
        self.rows = list(new.values())
        gone = [run for run, change in self.changes.items() if change.row is None]
        for run in gone[:-MOST_GONE]:
            del self.changes[run]

    def _is(self, run: str, row: JsonObject) -> bool:
        return run in self.changes and self.changes[run].row == row

    def _change(self, run: str, row: JsonObject | None, text: bytes) -> None:
        self.version += 1
        self.changes.pop(run, None)
        self.changes[run] = _Change(self.version, row, text)

    def after(self, seen: int, quiet: int) -> list[tuple[bytes, int]]:
        """Return what changed after a change, in pieces, each with the number of its last change.

        Args:
            seen: the number of that change, 0 for the whole list.
            quiet: up to this number archived runs are left out.
        """
        news = list(takewhile(lambda change: change.number > seen, reversed(self.changes.values())))
        parts: list[tuple[bytes, int]] = []
        rows: list[bytes] = []
        gone: list[bytes] = []
        size = 0
        for change in reversed(news):
            kind = gone if change.row is None else rows
            if seen > 0 if change.row is None else change.number > quiet or not change.row.get("archived"):
                kind.append(change.text)
                size += len(change.text)
            if size and (size >= PART_BYTES or change is news[0]):
                parts.append((b'{"runs":[%s],"gone":[%s]}' % (b",".join(rows), b",".join(gone)), change.number))
                rows, gone, size = [], [], 0
        return parts


class Watch:
    """The pages of one owner. `look` is for the watching thread, the other methods for any.

    Args:
        source: what the pages show.
        devices: likewise.
    """

    def __init__(self, source: Source, devices: Devices) -> None:
        self._source, self._devices = source, devices
        # In the ids of events: another process counts anew.
        self._instance = secrets.token_hex(4)
        self._pages: set[Page] = set()
        self._lock = threading.Lock()
        self._rows = _Rows()
        self._rows_of: str | None = None
        self._rows_at = self._rows_next = 0.0
        self._device: bytes = b""
        self._device_at, self._device_version = 0.0, 0
        self._complained = False

    def page(self, run: str | None, since: str | None, last_id: str | None, *, archived: bool = False) -> Page:
        """Return a new page, which `Watcher.join` begins to serve.

        Args:
            run: that it shows.
            since: how far it knows the run's series.
            last_id: of the newest event that it has had, of an earlier connection.
            archived: whether its first list of runs has archived ones.
        """
        seen = 0
        if last_id and (found := _ID.fullmatch(last_id)):
            since = found[3] or since
            seen = int(found[2]) if found[1] == self._instance else 0
        return Page(run, since, seen, archived=archived)

    def add(self, page: Page) -> None:
        """Serve a page. Raises BusyError."""
        with self._lock:
            if len(self._pages) >= MOST_PAGES:
                raise BusyError(f"{MOST_PAGES} pages are open already; close one.")
            self._pages.add(page)

    def remove(self, page: Page) -> None:
        """Serve a page no longer."""
        with self._lock:
            self._pages.discard(page)

    def pages(self) -> list[Page]:
        """Return the open pages."""
        with self._lock:
            return list(self._pages)

    def look(self) -> None:
        """Look for what is new, and put it into the pages' queues; logs what fails, and continues with the rest."""
        pages = [page for page in self.pages() if page.has_room()]
        if not pages:
            return
        with self._logged():
            changed = self._source.changed()
            self._look_at_points(pages, changed)
            with self._logged():
                self._read_rows(changed)
        with self._logged():
            self._give_rows(pages)
        with self._logged():
            self._read_devices()
        self._give_devices(pages)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._complained:
                self._complained = True
                logger.exception("the page's stream could not be read; it is tried again")

    def _look_at_points(self, pages: Sequence[Page], changed: str) -> None:
        groups: dict[tuple[str, str | None], list[Page]] = {}
        for page in pages:
            if page.run is not None and page.looked != changed:
                groups.setdefault((page.run, page.since), []).append(page)
        for (run, since), group in groups.items():
            with self._logged():
                self._give_points(group, run, since)
                for page in group:
                    page.looked = changed

    def _give_points(self, pages: Sequence[Page], run: str, since: str | None) -> None:
        try:
            series = self._source.series(run, None, points=POINTS, since=since).to_json()
        except JaxClientError:  # no such run yet, or no longer
            return
        if series["next"] == since:
            return
        *first, last = map(encoded, _parts(series))
        for page in pages:
            page.since = NOWHERE
            for body in first:
                page.put(self._frame("points", body, page))
            page.since = series["next"]
            page.put(self._frame("points", last, page))

    def _read_rows(self, changed: str) -> None:
        start = time.monotonic()
        due = changed != self._rows_of or start - self._rows_at > MOST_SECONDS
        if due and start >= self._rows_next:
            self._rows.update(map(listed, self._source.runs()))
            self._rows_of, self._rows_at = changed, time.monotonic()
            self._rows_next = self._rows_at + max(LEAST_SECONDS, _SHARE * (self._rows_at - start))

    def _give_rows(self, pages: Sequence[Page]) -> None:
        found: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
        for page in pages:
            if page.seen == self._rows.version:
                continue
            if page.quiet is None:
                page.quiet = self._rows.version
            place = page.seen, page.quiet
            if place not in found:
                found[place] = self._rows.after(*place)
            for body, number in found[place]:
                if not page.has_room():
                    break
                page.seen = number
                page.put(self._frame("runs", body, page))
            else:
                page.seen = self._rows.version

    def _read_devices(self) -> None:
        if time.monotonic() - self._device_at > DEVICE_SECONDS or not self._device_version:
            body = encoded(self._devices.shown(self._rows.rows))
            self._device_at = time.monotonic()
            if body != self._device:
                self._device, self._device_version = body, self._device_version + 1

    def _give_devices(self, pages: Sequence[Page]) -> None:
        for page in pages:
            if page.devices != self._device_version and page.has_room():
                page.devices = self._device_version
                page.put(self._frame("device", self._device, page))

    def _frame(self, event: str, body: bytes, page: Page) -> bytes:
        mark = f"{self._instance}.{page.seen}.{page.since or ''}"
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (mark.encode(), event.encode(), body)


def _parts(answer: JsonObject) -> Iterator[JsonObject]:
    """Yield a run's points in pieces, which a page takes one by one; the last one says where they end."""
    kept = {key: value for key, value in answer.items() if key not in ("series", "next")}
    part: dict[str, JsonObject] = {}
    values = 0
    for name, each in answer["series"].items():
        if values >= PART_VALUES:
            yield kept | {"series": part}
            # What is of the whole answer was in the first piece.
            kept, part, values = {key: kept[key] for key in ("run", "live") if key in kept}, {}, 0
        part[name] = each
        values += len(each["value"])
    yield kept | {"series": part, "next": answer["next"]}


class Watcher:
    """The thread that looks for all pages of one state directory. Thread-safe."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        process.register(
            "pages",
            "the thread that looks for what open pages show",
            at_exit={Step.INTAKE: Watcher.close},
            after_fork=Watcher._restart,
            owner=self,
        )

    def join(self, watch: Watch, page: Page) -> None:
        """Serve a page from now on. Raises BusyError."""
        watch.add(page)
        with self._lock:
            self._watches.add(watch)
            if self._thread is None:
                self._thread = start_thread("jax_client-pages", self._look)
        self._wake.set()

    def close(self) -> None:
        """End the thread; the pages that are open are served no longer."""
        with self._lock:
            self._watches.clear()
        self._wake.set()

    def _restart(self) -> None:
        self._watches, self._lock, self._thread, self._wake = set(), threading.Lock(), None, threading.Event()

    def _look(self) -> None:
        while True:
            with self._lock:
                self._watches = {watch for watch in self._watches if watch.pages()}
                watches = list(self._watches)
                if not watches:
                    self._thread = None
                    return
            for watch in watches:
                watch.look()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()


def checked_run(text: str | None) -> str | None:
    """Return the id of a run that a query names. Raises BadRequestError."""
    if text is not None and len(text) > 500:
        raise BadRequestError(f"run is {shown(text[:40])}; give the id of a run.")
    return text or None
