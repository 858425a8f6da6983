"""Which sampling requests of a client were answered since it asked last? One poll for a whole sampling session."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tinker.types.future_completion import FutureCompletion, FutureFailed, FutureFinished

# Pickled clients number their requests from so many times their own number on.
CLONE = 1_000_000_000
# Of one client; older ones were not asked for by anybody who is still there.
MAX_UNSEEN = 100_000

Channel = tuple[str, int]


@dataclass(slots=True)
class _Events:
    """What one client has not been told. `first` is the cursor of the first one.

    Cursors start with the time, so that those of a restarted server are higher than any that it gave before.
    """

    first: int = field(default_factory=lambda: int(time.time() * 1e6))
    completions: list[FutureCompletion] = field(default_factory=list)
    waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    def seen(self, cursor: int) -> None:
        gone = min(max(cursor - self.first, 0), len(self.completions))
        del self.completions[:gone]
        self.first += gone


class Completions:
    """The answered sampling requests of every client that polls for them. Thread-safe.

    Args:
        before: from a sampler's id to its answered requests with their sizes, 0 for failed ones.
    """

    def __init__(self, before: Callable[[str], Mapping[str, int]]) -> None:
        self._before = before
        self._channels: dict[Channel, _Events] = {}
        self._lock = threading.Lock()

    def add(self, request_id: str, size: int) -> None:
        """Tell the client of a request that it is answered, with so many bytes, or with a failure for 0."""
        channel = _channel(request_id)
        with self._lock:
            events = self._channels.get(channel)
            # Nobody polls for it yet: the first poll reads what there is.
            if events is None:
                return
            events.completions.append(_completion(request_id, size))
            if len(events.completions) > MAX_UNSEEN:
                events.seen(events.first + 1)
            waiting, events.waiting = events.waiting, []
        for loop, event in waiting:
            loop.call_soon_threadsafe(event.set)

    async def after(
        self, sampler_id: str, clone: int, cursor: int, seconds: float
    ) -> tuple[list[FutureCompletion], int]:
        """Return what was answered after `cursor`, and the new cursor; wait for something if there is nothing."""
        events = self._events((sampler_id, clone))
        event = asyncio.Event()
        with self._lock:
            events.seen(cursor)
            if not events.completions and seconds > 0:
                events.waiting.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), max(seconds, 0.001))
        with self._lock:
            events.waiting = [each for each in events.waiting if each[1] is not event]
            return list(events.completions), events.first + len(events.completions)

    def forget(self, session_id: str) -> None:
        """Forget the clients of a session."""
        with self._lock:
            for channel in [each for each in self._channels if each[0].startswith(f"{session_id}:")]:
                del self._channels[channel]

    def _events(self, channel: Channel) -> _Events:
        with self._lock:
            events = self._channels.get(channel)
            if events is None:
                events = self._channels[channel] = _Events()
                for request_id, size in self._before(channel[0]).items():
                    if _channel(request_id) == channel:
                        events.completions.append(_completion(request_id, size))
            return events


def _channel(request_id: str) -> Channel:
    sampler_id, _, number = request_id.rpartition(":")
    return sampler_id, int(number) // CLONE


def _completion(request_id: str, size: int) -> FutureCompletion:
    if size:
        return FutureFinished(request_id=request_id, response_payload_uncompressed_size=size)
    return FutureFailed(request_id=request_id)
