"""Whose turn is it on the device? The owner who has used less of it; then training or sampling, then lanes in turn.

Owners who have work share the time equally, however many lanes each has; without keys there is one owner. Within an
owner, training and sampling get half of the time each, and the lanes of a kind go round robin. A lane that samples for
several owners counts as each of them by its part. An owner or a kind that is ahead is held back while another one's
work is in flight, however long a turn of either takes. Only bookkeeping: the caller has the lock, the threads and the
clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# What a task yields is described in `dispatch`; it is sent the result of what it yielded, hence Any.
Task = Generator[Callable[[], object] | None, Any, T]
# The owner of whatever has none.
NO_OWNER = ""


@dataclass(frozen=True, slots=True)
class Queued(Generic[T]):
    """A task of a lane and the future of its result."""

    task: Task[T]
    future: Future[T]


@dataclass(slots=True)
class _Use:
    """The seconds that turns have taken, about how many one takes, and how many lanes have tasks."""

    used_s: float = 0.0
    turn_s: float = 0.0
    lanes: int = 0


@dataclass(slots=True)
class _Owner(_Use):
    """What an owner has used, of each kind too; `device_s` is that without what it was moved ahead by."""

    training: _Use = field(default_factory=_Use)
    sampling: _Use = field(default_factory=_Use)
    device_s: float = 0.0

    def kinds(self, *, sampling: bool) -> tuple[_Use, _Use]:
        """Return one kind and the other one."""
        return (self.sampling, self.training) if sampling else (self.training, self.sampling)


class Lane:
    """The tasks of one client, first come first served.

    Attributes:
        shares: by owner, which part of its present turn each one pays. The owners of all that waits in it are named,
            those with no part in this turn too.

    Args:
        owner: whose lane it is.
        sampling: whether it is of the sampling kind, and not of the training kind.
    """

    def __init__(self, owner: str = NO_OWNER, *, sampling: bool = False) -> None:
        self.shares: Mapping[str, float] = {owner: 1.0}
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
    """The lanes that have tasks, those of them that are ready, and what each owner has used. Times are seconds.

    Attributes:
        lanes: that have tasks, each with its owners.
    """

    def __init__(self) -> None:
        self.lanes: dict[Lane, tuple[str, ...]] = {}
        self._ready: deque[Lane] = deque()
        self._owners: dict[str, _Owner] = {}
        self._last_end = 0.0

    def enter(self, lane: Lane) -> None:
        """Add a lane that has its first task."""
        self.lanes[lane] = tuple(lane.shares)
        for name in self.lanes[lane]:
            self._join(name, sampling=lane.sampling)

    def leave(self, lane: Lane) -> None:
        """Remove a lane that has no task left."""
        for name in self.lanes.pop(lane):
            self._part(name, sampling=lane.sampling)

    def make_ready(self, lane: Lane, now: float) -> None:
        """Queue a lane whose head task can run."""
        lane.ready_at = now
        self._ready.append(lane)

    def forget_ready(self) -> None:
        """Give no more turns to the lanes that are ready."""
        self._ready.clear()

    def take(self, now: float) -> tuple[Lane | None, float | None]:
        """Give the next lane its turn; return it, or None and the seconds for which all that are ready are held back.

        An owner, or a kind of one owner, is ahead of another that has work in flight by a known number of seconds. It
        is not held for longer than that, from when the other's turn began: what the other waits for may be on the host,
        or even for a lane of this one.
        """
        ready = set(self._ready)
        in_flight = [lane for lane in self.lanes if lane not in ready]
        # Without keys all owners are one, and ahead of no one.
        used_s = self._used_s(in_flight) if len(self._owners) > 1 else dict.fromkeys(self.lanes, 0.0)
        others = in_flight if len(self._owners) > 1 else []
        busy = {(self.lanes[lane], lane.sampling) for lane in in_flight}
        waits = []
        for lane in sorted(self._ready, key=lambda lane: (used_s[lane], self._kind_s(lane))):
            wait_s = max((other.turn_began + used_s[lane] - used_s[other] - now for other in others), default=0.0)
            if len(self.lanes[lane]) == 1 and (self.lanes[lane], not lane.sampling) in busy:
                kind, other = self._owners[self.lanes[lane][0]].kinds(sampling=lane.sampling)
                if (ahead_s := kind.used_s - other.used_s) > 0:
                    wait_s = max(wait_s, lane.ready_at + ahead_s - now)
            if wait_s <= 0:
                self._ready.remove(lane)
                lane.turn_began = now
                return lane, None
            waits.append(wait_s)
        return None, min(waits, default=None)

    def charge(self, lane: Lane, now: float) -> None:
        """Add a turn that has come to its end to what its owners have used. Turns overlap only in waiting."""
        self._follow(lane)
        seconds = now - max(lane.turn_began, self._last_end)
        for name, share in lane.shares.items():
            owner = self._owners[name]
            kind = owner.kinds(sampling=lane.sampling)[0]
            kind.turn_s += (seconds - kind.turn_s) / 8
            for use in (owner, kind):
                use.used_s += seconds * share
            owner.device_s += seconds * share
        self._last_end = now

    def device_s(self) -> dict[str, float]:
        """Return the seconds that each owner's turns have taken so far."""
        return {name: owner.device_s for name, owner in self._owners.copy().items()}

    def _follow(self, lane: Lane) -> None:
        """Take note of the owners that a lane has now."""
        if (before := self.lanes.get(lane)) is not None and before != (now := tuple(lane.shares)):
            for name in set(now) - set(before):
                self._join(name, sampling=lane.sampling)
            for name in set(before) - set(now):
                self._part(name, sampling=lane.sampling)
            self.lanes[lane] = now

    def _join(self, name: str, *, sampling: bool) -> None:
        owner = self._owners.setdefault(name, _Owner())
        if not owner.lanes:  # what it did not use while it had nothing to do is not saved up
            active = [each.used_s for each in self._owners.values() if each.lanes]
            others = [min(active)] if active else [each.used_s for each in self._owners.values()]
            owner.used_s = max(owner.used_s, *others)
        owner.lanes += 1
        kind, other = owner.kinds(sampling=sampling)
        if not kind.lanes:
            kind.used_s = max(kind.used_s, other.used_s)
        kind.lanes += 1

    def _part(self, name: str, *, sampling: bool) -> None:
        owner = self._owners[name]
        owner.lanes -= 1
        owner.kinds(sampling=sampling)[0].lanes -= 1

    def _used_s(self, in_flight: Sequence[Lane]) -> dict[Lane, float]:
        """Return of each lane what its owners have used, with what their turns in flight will take."""
        used_s = {name: owner.used_s for name, owner in self._owners.items()}
        for lane in in_flight:
            for name, part in _parts(lane, self.lanes[lane]):
                used_s[name] += part * self._owners[name].kinds(sampling=lane.sampling)[0].turn_s
        return {
            lane: sum(part * used_s[name] for name, part in _parts(lane, names)) for lane, names in self.lanes.items()
        }

    def _kind_s(self, lane: Lane) -> float:
        """Return what the owners of a lane have used of its kind."""
        if len(names := self.lanes[lane]) == 1:
            return self._owners[names[0]].kinds(sampling=lane.sampling)[0].used_s
        parts = _parts(lane, names)
        return sum(part * self._owners[name].kinds(sampling=lane.sampling)[0].used_s for name, part in parts)


def _parts(lane: Lane, names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the owners who have a part in a lane's turns, and that part; equal ones where none has any yet."""
    if len(names) == 1:
        return [(names[0], 1.0)]
    shares = {name: lane.shares.get(name, 0.0) for name in names}
    total = sum(shares.values())
    if not total:
        return [(name, 1 / len(names)) for name in names]
    return [(name, share / total) for name, share in shares.items() if share]
