"""Whose turn is it on the device? The owner who has used less of it; then training or sampling, then lanes in turn.

Owners who have work share the time equally, however many lanes each has; without keys there is one owner. Within an
owner, training and sampling get half of the time each, and the lanes of a kind go round robin. A lane that samples for
several owners goes when the first of them would, and each pays its part. An owner or a kind that is ahead is held back
while another one's work is in flight, however long a turn of either takes. Only bookkeeping: the caller has the lock,
the threads and the clock.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# The owner of whatever has none.
NO_OWNER = ""
# For how long an owner whose work has ended counts among those who share: it may send more at once.
RECENT_S = 10.0
# What is less than this is no time: sums of the same turns in another order differ by it.
LEAST_S = 1e-6


@dataclass(frozen=True, slots=True)
class Unawaited:
    """What a task yields that leaves programs running: `request`, as a task without them would yield it.

    While owners share the device, `wait` is called before: else the turn would end before its work, and who waits for
    the device next would pay for it.

    Attributes:
        request: `f() -> result`, or None.
        wait: `f()` returns when the programs have ended, or raises what they did.
    """

    request: Callable[[], object] | None
    wait: Callable[[], object]

    def after_wait(self) -> object:
        """Wait for the programs, then return the result of the request."""
        self.wait()
        return None if self.request is None else self.request()


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What a task yields that waits long for what no turn does, such as a compile.

    Meanwhile its lane has no part in the turns: no one is held back for it, and it saves nothing up.
    """

    future: Future[Any]


# What a task yields is described in `dispatch`; it is sent the result of what it yielded, hence Any.
Request = Callable[[], object] | Future[Any] | Unawaited | Elsewhere | None
Task = Generator[Request, Any, T]


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
    left_at: float = -math.inf

    def kinds(self, *, sampling: bool) -> tuple[_Use, _Use]:
        """Return one kind and the other one."""
        return (self.sampling, self.training) if sampling else (self.training, self.sampling)


class Lane:
    """The tasks of one client, first come first served.

    Attributes:
        shares: by owner, which part of its present turn each one pays. The owners of all that waits in it are named,
            those with no part in this turn too.
        due: of those without a part, whom the next turn can serve.
        alone: whether no other lane had tasks when its present turn began.

    Args:
        owner: whose lane it is.
        sampling: whether it is of the sampling kind, and not of the training kind.
    """

    def __init__(self, owner: str = NO_OWNER, *, sampling: bool = False) -> None:
        self.owner = owner
        self.shares: Mapping[str, float] = {owner: 1.0}
        self.due: Collection[str] = ()
        self.sampling = sampling
        self.ready_at = 0.0
        self.turn_began = 0.0
        self.alone = False
        self.tasks: deque[Queued[Any]] = deque()
        # The value or the error that the head task is resumed with.
        self.resume: tuple[object, BaseException | None] = (None, None)

    @property
    def waited_s(self) -> float:
        """Seconds that the head task was ready before its present turn began."""
        return self.turn_began - self.ready_at

    def expect(self, owner: str) -> None:
        """Name an owner whom the next turn can serve. The mappings are replaced: other threads read them."""
        if owner not in self.shares:
            self.shares = {**self.shares, owner: 0.0}
        if owner not in self.due:
            self.due = {*self.due, owner}


@dataclass(slots=True, eq=False)
class _Group:
    """Lanes of one kind that serve the same owners: ready, in flight, or waiting elsewhere; the first came first."""

    owners: tuple[str, ...]
    sampling: bool
    ready: dict[Lane, None] = field(default_factory=dict)
    in_flight: dict[Lane, None] = field(default_factory=dict)
    elsewhere: dict[Lane, None] = field(default_factory=dict)


class Turns:
    """The lanes that have tasks, those of them that are ready, and what each owner has used. Times are seconds.

    A turn is chosen among groups of lanes, of which there are about two for each owner, however many lanes there are.

    Attributes:
        lanes: that have tasks, each with its owners.
    """

    def __init__(self) -> None:
        self.lanes: dict[Lane, tuple[str, ...]] = {}
        self._groups: dict[tuple[tuple[str, ...], bool], _Group] = {}
        self._group_of: dict[Lane, _Group] = {}
        self._owners: dict[str, _Owner] = {}
        self._last_end = 0.0

    def enter(self, lane: Lane) -> None:
        """Add a lane that has its first task."""
        shares = lane.shares or {lane.owner: 1.0}
        self.lanes[lane] = tuple(shares)
        for name in self.lanes[lane]:
            self._join(name, sampling=lane.sampling)
        group = self._group(lane, shares)
        group.in_flight[lane] = None
        self._group_of[lane] = group

    def leave(self, lane: Lane) -> None:
        """Remove a lane that has no task left."""
        for name in self.lanes.pop(lane):
            self._part(name, sampling=lane.sampling)
        self._remove(lane, self._group_of.pop(lane))

    def follow(self, lane: Lane) -> bool:
        """Take note of the owners that a lane has now; return whether that changes whose turn it may be."""
        return lane in self.lanes and bool(lane.shares) and self._follow(lane, lane.shares)

    def wait_elsewhere(self, lane: Lane) -> None:
        """Leave a lane out whose turn is over and whose task waits elsewhere, until it is made ready."""
        group = self._group_of[lane]
        del group.in_flight[lane]
        group.elsewhere[lane] = None
        for name in self.lanes[lane]:
            self._part(name, sampling=lane.sampling)

    def make_ready(self, lane: Lane, now: float) -> None:
        """Queue a lane whose head task can run."""
        group = self._group_of[lane]
        if lane in group.elsewhere:
            del group.elsewhere[lane]
            group.in_flight[lane] = None
            for name in self.lanes[lane]:
                self._join(name, sampling=lane.sampling)
        self.follow(lane)
        lane.ready_at = now
        group = self._group_of[lane]
        group.in_flight.pop(lane, None)
        group.ready[lane] = None

    def forget_ready(self) -> None:
        """Give no more turns to the lanes that are ready."""
        for group in self._groups.values():
            group.ready.clear()

    def take(self, now: float) -> tuple[Lane | None, float | None]:
        """Give the next lane its turn; return it, or None and the seconds for which all that are ready are held back.

        An owner, or a kind of one owner, is ahead of another that has work in flight by a known number of seconds. It
        is not held for longer than that, from when the other's turn began: what the other waits for may be on the host,
        or even for a lane of this one.
        """
        used_s = self._used_s()
        of_group = {
            key: min(used_s[name] for name in group.owners)
            for key, group in self._groups.items()
            if group.ready or group.in_flight
        }
        # Of each group the turn that began last: the others are behind it.
        flying = [
            (next(reversed(group.in_flight)).turn_began, of_group[key])
            for key, group in self._groups.items()
            if group.in_flight
        ]
        ready = []
        for key, group in self._groups.items():
            if group.ready:
                lane = next(iter(group.ready))
                # Where the first of several owners is level with one who has a lane of its own, the others decide.
                mean_s, kind_s = self._means_s(lane, group, used_s)
                ready.append((of_group[key], mean_s, kind_s, lane.ready_at, len(ready), lane, group))
        waits = []
        for own_s, _, _, _, _, lane, group in sorted(ready):
            wait_s = max((began - now + (own_s - other_s) for began, other_s in flying), default=0.0)
            if (wait_s := max(wait_s, self._kind_wait_s(lane, group, now))) <= LEAST_S:
                del group.ready[lane]
                group.in_flight[lane] = None
                lane.turn_began, lane.alone = now, len(self.lanes) == 1
                return lane, None
            waits.append(wait_s)
        return None, min(waits, default=None)

    def charge(self, lane: Lane, now: float) -> None:
        """Add a turn that has come to its end to what its owners have used. Turns overlap only in waiting."""
        shares = lane.shares or dict.fromkeys(self.lanes[lane], 1.0)
        self._follow(lane, shares)
        seconds = now - max(lane.turn_began, self._last_end)
        for name, part in _parts(shares):
            owner = self._owners[name]
            kind = owner.kinds(sampling=lane.sampling)[0]
            kind.turn_s += (seconds - kind.turn_s) / 8
            for use in (owner, kind):
                use.used_s += seconds * part
            owner.device_s += seconds * part
        self._last_end = now

    def shared(self) -> bool:
        """Whether more than one owner has work, or had some a moment ago."""
        recent = self._last_end - RECENT_S
        return sum(owner.lanes > 0 or owner.left_at > recent for owner in self._owners.values()) > 1

    def device_s(self) -> dict[str, float]:
        """Return the seconds that each owner's turns have taken so far."""
        return {name: owner.device_s for name, owner in self._owners.copy().items()}

    def _follow(self, lane: Lane, shares: Mapping[str, float]) -> bool:
        before, now = self.lanes[lane], tuple(shares)
        old, new = self._group_of[lane], self._group(lane, shares)
        if before != now:
            if lane not in old.elsewhere:
                for name in set(now) - set(before):
                    self._join(name, sampling=lane.sampling)
                for name in set(before) - set(now):
                    self._part(name, sampling=lane.sampling)
            self.lanes[lane] = now
        if new is old:
            return False
        of_both = (old.ready, new.ready), (old.in_flight, new.in_flight), (old.elsewhere, new.elsewhere)
        for lanes, others in of_both:
            if lane in lanes:
                others[lane] = None
        self._remove(lane, old)
        self._group_of[lane] = new
        return True

    def _group(self, lane: Lane, shares: Mapping[str, float]) -> _Group:
        """Return the group of a lane: by those who have a part in its turn or will have; all, if no one has yet."""
        served = (
            tuple(shares)
            if len(shares) == 1
            else tuple(sorted(name for name, share in shares.items() if share or name in lane.due)) or tuple(shares)
        )
        return self._groups.setdefault((served, lane.sampling), _Group(served, lane.sampling))

    def _remove(self, lane: Lane, group: _Group) -> None:
        group.ready.pop(lane, None)
        group.in_flight.pop(lane, None)
        group.elsewhere.pop(lane, None)
        if not (group.ready or group.in_flight or group.elsewhere):
            self._groups.pop((group.owners, group.sampling), None)

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
        if not owner.lanes:
            owner.left_at = self._last_end

    def _used_s(self) -> dict[str, float]:
        """Return what each owner has used, with what its turns in flight will take."""
        used_s = {name: owner.used_s for name, owner in self._owners.items()}
        for group in self._groups.values():
            if group.in_flight and len(group.owners) == 1:
                name = group.owners[0]
                used_s[name] += len(group.in_flight) * self._owners[name].kinds(sampling=group.sampling)[0].turn_s
                continue
            for lane in group.in_flight:
                for name, part in self._parts_of(lane):
                    used_s[name] += part * self._owners[name].kinds(sampling=group.sampling)[0].turn_s
        return used_s

    def _means_s(self, lane: Lane, group: _Group, used_s: Mapping[str, float]) -> tuple[float, float]:
        """Return what the owners of a lane have used, by their parts in it: of everything, and of its kind."""
        parts = [(group.owners[0], 1.0)] if len(group.owners) == 1 else self._parts_of(lane)
        kind_s = sum(part * self._owners[name].kinds(sampling=group.sampling)[0].used_s for name, part in parts)
        return sum(part * used_s[name] for name, part in parts), kind_s

    def _parts_of(self, lane: Lane) -> list[tuple[str, float]]:
        """Return the parts in a lane's turn; another thread may have named an owner that is not noted yet."""
        return [(name, part) for name, part in _parts(lane.shares) if name in self._owners]

    def _kind_wait_s(self, lane: Lane, group: _Group, now: float) -> float:
        """Return for how long a lane is held back because its owner's other kind has work in flight and used less."""
        if len(group.owners) != 1:
            return 0.0
        beside = self._groups.get((group.owners, not group.sampling))
        if beside is None or not beside.in_flight:
            return 0.0
        kind, other = self._owners[group.owners[0]].kinds(sampling=group.sampling)
        ahead_s = kind.used_s - other.used_s
        return lane.ready_at + ahead_s - now if ahead_s > 0 else 0.0


def _parts(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the owners who have a part in a turn, and that part; equal ones where none has any yet."""
    total = sum(shares.values())
    if not total:
        return [(name, 1 / len(shares)) for name in shares]
    return [(name, share / total) for name, share in shares.items() if share]


def ring(news: Future[None]) -> None:
    """Complete a future that others wait for, unless it is."""
    with contextlib.suppress(InvalidStateError):
        news.set_result(None)
