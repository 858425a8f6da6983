"""Who launches device programs, in which order? One thread per engine; lanes take turns, each in its own order.

There are two kinds of lanes, training and sampling, and where both have work each gets half of the device's time,
however long a turn of either takes and however many lanes it has: the kind that has used less goes first, and the other
one is held back for as long as it is ahead. Within a kind the lanes go round robin.

Two threads that launch programs with collectives can deadlock, so nothing else launches. A task is a generator that
runs on this thread and yields: a callable, to have it run elsewhere and be resumed with its result (waiting for the
device, packing, the user's loss function), or None, to let the other lanes go first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, TypeVar

from jax_client import process
from jax_client.errors import RequestFailedError
from jax_client.process import Step
from jax_client.threads import Workers, start_thread

logger = logging.getLogger(__name__)
T = TypeVar("T")
Task = Generator[Callable[[], Any] | None, Any, T]
# Started with the dispatcher: Python 3.12.0 to 3.12.2 start no more of them once the main module has ended.
READY_WORKERS = 4


class Kind:
    """One kind of work: the seconds that its turns have taken, and how many of its lanes have tasks."""

    def __init__(self) -> None:
        self.used_s = 0.0
        self.lanes = 0


class Lane:
    """The tasks of one client, first come first served.

    Args:
        sampling: whether it is of the sampling kind, and not of the training kind.
    """

    def __init__(self, *, sampling: bool = False) -> None:
        self.sampling = sampling
        self.ready_at = 0.0
        self.turn_began = 0.0
        self.tasks: deque[tuple[Task[Any], Future[Any]]] = deque()
        self.resume: tuple[bool, Any] = (True, None)  # what the head task is resumed with: (is a value, value)

    @property
    def waited_s(self) -> float:
        """Seconds from when the head task was ready for the turn that it has now to the turn."""
        return self.turn_began - self.ready_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """How a dispatcher does.

    Attributes:
        alive: whether its thread runs; False also after `close`.
        waiting: tasks that have not finished.
        stalled_s: seconds without progress: nothing arrived, ran or finished; 0 when no task waits.
    """

    alive: bool
    waiting: int
    stalled_s: float


class Dispatcher:
    """Runs the tasks of all lanes on one thread, round robin.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._turn = threading.Condition()
        self._ready: deque[Lane] = deque()
        self._lanes: set[Lane] = set()
        self._closed = False
        self._dropped = False
        self._kinds = (Kind(), Kind())  # training, sampling
        self._last_end = 0.0
        self._moved_at = time.monotonic()  # plainly written by several threads: a float is replaced at once
        self._death: RequestFailedError | None = None
        self.workers = Workers(f"{name}-worker", 64, ready=READY_WORKERS)
        self.thread = start_thread(f"{name}-dispatch", self._run)
        process.register(
            f"{name}-dispatch",
            "an engine's queue of requests, and the thread that launches its programs",
            owner=self,
            at_exit={Step.REQUESTS: Dispatcher.drop_requests},
            after_fork=Dispatcher.lost_in_fork,
        )

    def submit(self, lane: Lane, task: Task[T]) -> Future[T]:
        """Queue a task at the end of its lane; return at once."""
        future: Future[T] = Future()
        with self._turn:
            if self._dropped:
                return future
            self.check_open()
            if not self._lanes:
                self._moved_at = time.monotonic()
            lane.tasks.append((task, future))
            if lane not in self._lanes:
                self._lanes.add(lane)
                kind, other = self._kinds[lane.sampling], self._kinds[not lane.sampling]
                if not kind.lanes:  # what it did not use while it had nothing to do is not saved up
                    kind.used_s = max(kind.used_s, other.used_s)
                kind.lanes += 1
            if len(lane.tasks) == 1:
                self._make_ready(lane)
        return future

    def check_open(self) -> None:
        """Raise RequestFailedError after `close`, and after the thread has died; not while the process ends."""
        if self._dropped:
            return
        if self._death is not None:
            # One of its own: each raise makes its traceback longer.
            raise RequestFailedError(self._death.message, category=self._death.category)
        if self._closed:
            raise RequestFailedError("the engine is closed; create a new ServiceClient.", category="user")

    def liveness(self) -> Liveness:
        """Return how it does, without waiting for anything."""
        waiting = sum(len(lane.tasks) for lane in self._lanes.copy())
        stalled_s = max(0.0, time.monotonic() - self._moved_at) if waiting else 0.0
        return Liveness(alive=self.thread.is_alive() and self._death is None, waiting=waiting, stalled_s=stalled_s)

    def close(self) -> None:
        """Stop after the step in hand; tasks that have not finished fail."""
        abandoned = self._stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()
        _fail(abandoned, RequestFailedError("the engine was closed before this request was carried out."))
        self.workers.close(wait=False)
        process.unregister(self)

    def drop_requests(self) -> None:
        """Stop after the step in hand; what waits, and what comes from now on, is never answered.

        The process ends: an error in place of the answer would only be printed by a thread that is of no use any more.
        """
        self._dropped = True
        self._stop()

    def lost_in_fork(self) -> None:
        """Refuse all work in a forked process: the thread is not there, and a lock may be held for ever."""
        self._turn = threading.Condition()
        self._death = RequestFailedError(
            f"this engine runs in process {os.getppid()}, of which this one is a fork. Make a ServiceClient here, or "
            "leave the work to that process.",
            category="user",
        )

    def _stop(self) -> list[Future[Any]]:
        """Take no more tasks; return the futures of those that have not finished."""
        with self._turn:
            self._closed = True
            self._ready.clear()
            self._turn.notify()
            return [future for lane in self._lanes for _, future in lane.tasks]

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # Tasks fail on their own: this is the loop itself, and nobody would answer those who wait.
            self._death = death = RequestFailedError(
                f"the engine's dispatch thread died ({type(error).__name__}: {error}), and this engine does no more "
                "work. Start the process again and go on from the last checkpoint; its log has the traceback."
            )
            logger.exception("the engine's dispatch thread died")
            _fail(self._stop(), death)

    def _make_ready(self, lane: Lane) -> None:
        lane.ready_at = time.perf_counter()
        self._ready.append(lane)
        self._turn.notify()

    def _loop(self) -> None:
        while True:
            with self._turn:
                lane, hold_s = self._next()
                while lane is None and not self._closed:
                    self._turn.wait(hold_s)
                    lane, hold_s = self._next()
                if lane is None or self._closed:
                    return
                self._ready.remove(lane)
            lane.turn_began = time.perf_counter()
            self._moved_at = time.monotonic()
            self._step(lane)
            self._moved_at = time.monotonic()

    def _next(self) -> tuple[Lane | None, float | None]:
        """Return the lane whose turn it is, or None and the seconds for which those that are ready are held back.

        A kind is ahead of one that has work in flight by a known number of seconds. It is not held for longer than
        that: what the other kind waits for may be on the host, or even for a lane of this kind.
        """
        waits = []
        for lane in sorted(self._ready, key=lambda lane: self._kinds[lane.sampling].used_s):
            kind, other = self._kinds[lane.sampling], self._kinds[not lane.sampling]
            in_flight = other.lanes > sum(ready.sampling != lane.sampling for ready in self._ready)
            ahead_s = kind.used_s - other.used_s if in_flight else 0.0
            wait_s = lane.ready_at + ahead_s - time.perf_counter()
            if ahead_s <= 0 or wait_s <= 0:
                return lane, None
            waits.append(wait_s)
        return None, min(waits, default=None)

    def _charge(self, lane: Lane) -> None:
        """Add a turn that has come to its end to what its kind has used. Turns overlap only in waiting."""
        now = time.perf_counter()
        self._kinds[lane.sampling].used_s += now - max(lane.turn_began, self._last_end)
        self._last_end = now

    def _step(self, lane: Lane) -> None:
        task, future = lane.tasks[0]
        if not future.running() and not future.set_running_or_notify_cancel():
            task.close()
            self._leave(lane)
            return
        is_value, value = lane.resume
        lane.resume = (True, None)
        try:
            request = task.send(value) if is_value else task.throw(value)
        except StopIteration as stop:
            self._finish(lane, future, result=stop.value)
            return
        except BaseException as error:  # a KeyboardInterrupt of the user's loss reaches the user through its future
            self._finish(lane, future, error=error)
            return
        finally:
            del value  # an error that came back would keep this frame, and this frame it
        if request is None:
            with self._turn:
                self._charge(lane)
                self._make_ready(lane)
            return
        self.workers.submit(self._elsewhere, lane, request)

    def _elsewhere(self, lane: Lane, request: Callable[[], Any]) -> None:
        try:
            resume = (True, request())
        except BaseException as error:
            resume = (False, error)
        self._moved_at = time.monotonic()
        with self._turn:
            self._charge(lane)
            lane.resume = resume
            del resume  # as above
            if not self._closed:
                self._make_ready(lane)

    def _finish(
        self, lane: Lane, future: Future[Any], *, result: Any = None, error: BaseException | None = None
    ) -> None:
        self._leave(lane)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _leave(self, lane: Lane) -> None:
        with self._turn:
            lane.tasks.popleft()
            if lane.tasks:
                self._make_ready(lane)
            else:
                self._lanes.discard(lane)
                self._kinds[lane.sampling].lanes -= 1


def _fail(futures: list[Future[Any]], error: RequestFailedError) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # cancelled, or answered
            future.set_exception(error)
