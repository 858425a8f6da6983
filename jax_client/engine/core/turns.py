"""Whose turn is it on the device? Training and sampling get half of the time each, and lanes of a kind take turns.

Where both kinds have work, the kind that has used less goes first, however long a turn of either takes and however many
lanes it has; the other kind is held back for as long as it is ahead. Within a kind the lanes go round robin. Only
bookkeeping: the caller has the lock, the threads and the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# What a task yields is described in `dispatch`; it is sent the result of what it yielded, hence Any.
Task = Generator[Callable[[], object] | None, Any, T]


@dataclass(frozen=True, slots=True)
class Queued(Generic[T]):
    """A task of a lane and the future of its result."""

    task: Task[T]
    future: Future[T]


@dataclass(slots=True)
class _Kind:
    """One kind of work: the seconds that its turns have taken, and how many of its lanes have tasks."""

    used_s: float = 0.0
    lanes: int = 0


class Lane:
    """The tasks of one client, first come first served.

    Args:
        sampling: whether it is of the sampling kind, and not of the training kind.
    """

    def __init__(self, *, sampling: bool = False) -> None:
        self.sampling = sampling
        self.ready_at = 0.0
        self.turn_began = 0.0
        self.tasks: deque[Queued[Any]] = deque()
        # The value or the error that the head task is resumed with.
        self.resume: tuple[object, BaseException | None] = (None, None)

    @property
    def waited_s(self) -> float:
        """Seconds that the head task was ready before its present turn began."""
        return self.turn_began - self.ready_at


class Turns:
    """The lanes that have tasks, those of them that are ready, and what each kind has used. Times are seconds."""

    def __init__(self) -> None:
        self.lanes: set[Lane] = set()
        self._ready: deque[Lane] = deque()
        self._training, self._sampling = _Kind(), _Kind()
        self._last_end = 0.0

    def enter(self, lane: Lane) -> None:
        """Add a lane that has its first task."""
        self.lanes.add(lane)
        kind, other = self._kinds(lane)
        if not kind.lanes:  # what it did not use while it had nothing to do is not saved up
            kind.used_s = max(kind.used_s, other.used_s)
        kind.lanes += 1

    def leave(self, lane: Lane) -> None:
        """Remove a lane that has no task left."""
        self.lanes.discard(lane)
        self._kinds(lane)[0].lanes -= 1

    def make_ready(self, lane: Lane, now: float) -> None:
        """Queue a lane whose head task can run."""
        lane.ready_at = now
        self._ready.append(lane)

    def forget_ready(self) -> None:
        """Give no more turns to the lanes that are ready."""
        self._ready.clear()

    def take(self, now: float) -> tuple[Lane | None, float | None]:
        """Give the next lane its turn; return it, or None and the seconds for which all that are ready are held back.

        A kind is ahead of one that has work in flight by a known number of seconds. It is not held for longer than
        that: what the other kind waits for may be on the host, or even for a lane of this kind.
        """
        waits = []
        for lane in sorted(self._ready, key=lambda lane: self._kinds(lane)[0].used_s):
            kind, other = self._kinds(lane)
            in_flight = other.lanes > sum(ready.sampling != lane.sampling for ready in self._ready)
            ahead_s = kind.used_s - other.used_s if in_flight else 0.0
            wait_s = lane.ready_at + ahead_s - now
            if ahead_s <= 0 or wait_s <= 0:
                self._ready.remove(lane)
                lane.turn_began = now
                return lane, None
            waits.append(wait_s)
        return None, min(waits, default=None)

    def charge(self, lane: Lane, now: float) -> None:
        """Add a turn that has come to its end to what its kind has used. Turns overlap only in waiting."""
        self._kinds(lane)[0].used_s += now - max(lane.turn_began, self._last_end)
        self._last_end = now

    def _kinds(self, lane: Lane) -> tuple[_Kind, _Kind]:
        """Return a lane's kind and the other one."""
        return (self._sampling, self._training) if lane.sampling else (self._training, self._sampling)
