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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jax_client import process
from jax_client.errors import BadRequestError, JaxClientError, shown
from jax_client.process import Step
from jax_client.server.dashboard.answers import encoded
from jax_client.server.dashboard.device import Devices
from jax_client.server.dashboard.source import Source
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
# What waits for one page; one that does not read as fast is sent away, and comes back with where it was.
MOST_FRAMES, MOST_BYTES = 64, 8 * 2**20
_ID = re.compile(r"([0-9a-f]{8})\.([0-9]{1,12})\.([0-9]{1,18}-[0-9]{1,18})?")


class Page:
    """One open page, and what waits to be sent to it. Made and read on the event loop's thread.

    Args:
        run: that it shows, None for none.
        since: how far it knows that run's series.
        seen: the version of the list of runs that it has.
    """

    def __init__(self, run: str | None, since: str | None, seen: int) -> None:
        self.run, self.since, self.seen = run, since, seen
        self.devices = 0
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self.dropped = False

    def put(self, frames: Sequence[bytes]) -> None:
        """Give frames to the page, from any thread."""
        if frames:
            # A loop that has ended, and its pages with it, takes nothing.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._put, frames)

    def _put(self, frames: Sequence[bytes]) -> None:
        self._frames.extend(frames)
        self._bytes += sum(map(len, frames))
        if len(self._frames) > MOST_FRAMES or self._bytes > MOST_BYTES:
            self.dropped = True
            self._frames.clear()
        self._filled.set()

    async def next(self, seconds: float) -> bytes | None:
        """Return what is to be sent next; b"" where nothing came for so long, None where the page is sent away."""
        if not self._frames and not self.dropped:
            self._filled.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._filled.wait()
            except TimeoutError:
                return b""
        if self.dropped:
            return None
        frame = self._frames.popleft()
        self._bytes -= len(frame)
        return frame


@dataclass(slots=True)
class _Rows:
    """The list of runs as it was last read, each with the version in which it changed."""

    version: int = 0
    rows: dict[str, tuple[JsonObject, int]] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)

    def update(self, found: Iterable[JsonObject]) -> None:
        new = {str(row["run"]): row for row in found}
        version = self.version + 1
        before = self.rows
        self.rows = {
            run: before[run] if run in before and before[run][0] == row else (row, version) for run, row in new.items()
        }
        self.gone.update(dict.fromkeys(before.keys() - new.keys(), version))
        for run in new:
            self.gone.pop(run, None)
        self.version = version

    def after(self, seen: int) -> JsonObject | None:
        """Return what changed after a version, None for nothing."""
        changed = [row for row, version in self.rows.values() if version > seen]
        gone = [run for run, version in self.gone.items() if version > seen > 0]
        return {"runs": changed, "gone": gone} if changed or gone else None


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
        self._changed: str | None = None
        self._rows_of: str | None = None
        self._rows_at = self._rows_next = 0.0
        self._device: bytes = b""
        self._device_at, self._device_version = 0.0, 0
        self._complained = False

    def page(self, run: str | None, since: str | None, last_id: str | None) -> Page:
        """Return a new page, which `Watcher.join` begins to serve.

        Args:
            run: that it shows.
            since: how far it knows the run's series.
            last_id: of the newest event that it has had, of an earlier connection.
        """
        seen = 0
        if last_id and (found := _ID.fullmatch(last_id)):
            since = found[3] or since
            seen = int(found[2]) if found[1] == self._instance else 0
        return Page(run, since, seen)

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
            return [page for page in self._pages if not page.dropped]

    def look(self) -> None:
        """Look for what is new, and put it into the pages' queues; logs what fails."""
        pages = self.pages()
        if not pages:
            return
        try:
            changed = self._source.changed()
            news: dict[Page, list[bytes]] = {page: [] for page in pages}
            self._look_at_points(news, changed)
            self._look_at_rows(news, changed)
            self._look_at_devices(news)
            self._changed = changed
            for page, frames in news.items():
                page.put(frames)
        except Exception:
            if not self._complained:
                self._complained = True
                logger.exception("the page's stream could not be read; it is tried again")

    def _look_at_points(self, news: dict[Page, list[bytes]], changed: str) -> None:
        groups: dict[tuple[str, str | None], list[Page]] = {}
        for page in news:
            if page.run is not None and (changed != self._changed or page.devices == 0):
                groups.setdefault((page.run, page.since), []).append(page)
        for (run, since), pages in groups.items():
            try:
                series = self._source.series(run, None, points=POINTS, since=since).to_json()
            except JaxClientError:  # no such run yet, or no longer
                continue
            if series["next"] == since:
                continue
            body = encoded(series)
            for page in pages:
                page.since = series["next"]
                news[page].append(self._frame("points", body, page))

    def _look_at_rows(self, news: dict[Page, list[bytes]], changed: str) -> None:
        start = time.monotonic()
        due = changed != self._rows_of or start - self._rows_at > MOST_SECONDS
        if due and start >= self._rows_next:
            self._rows.update(row.to_json() for row in self._source.runs())
            self._rows_of, self._rows_at = changed, time.monotonic()
            self._rows_next = self._rows_at + max(LEAST_SECONDS, _SHARE * (self._rows_at - start))
        bodies: dict[int, bytes | None] = {}
        for page, frames in news.items():
            if page.seen == self._rows.version:
                continue
            if page.seen not in bodies:
                found = self._rows.after(page.seen)
                bodies[page.seen] = None if found is None else encoded(found)
            body, page.seen = bodies[page.seen], self._rows.version
            if body is not None:
                frames.append(self._frame("runs", body, page))

    def _look_at_devices(self, news: dict[Page, list[bytes]]) -> None:
        now = time.monotonic()
        if now - self._device_at > DEVICE_SECONDS or not self._device_version:
            body = encoded(self._devices.shown([row for row, _ in self._rows.rows.values()]))
            self._device_at = time.monotonic()
            if body != self._device:
                self._device, self._device_version = body, self._device_version + 1
        for page, frames in news.items():
            if page.devices != self._device_version:
                page.devices = self._device_version
                frames.append(self._frame("device", self._device, page))

    def _frame(self, event: str, body: bytes, page: Page) -> bytes:
        mark = f"{self._instance}.{page.seen}.{page.since or ''}"
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (mark.encode(), event.encode(), body)


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
