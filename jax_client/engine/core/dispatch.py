"""Who launches device programs, in which order? One thread per engine; `turns` says which lane is next.

Two threads that launch programs with collectives can deadlock, so nothing else launches. A task is a generator that
runs on this thread and yields: a callable, to have it run elsewhere and be resumed with its result (waiting for the
device, the user's loss function); a future, to be resumed with its result, for which no owner is charged (packing);
`Elsewhere`, for a future that takes long (compiling); None, to let the other lanes go first; or `Unawaited`, one of
these beside programs that still run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from jax_client import process
from jax_client.engine.core.turns import Elsewhere, Lane, Queued, Request, Task, Turns, Unawaited
from jax_client.errors import RequestFailedError
from jax_client.process import Step
from jax_client.threads import Workers, start_thread

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Started with the dispatcher: Python 3.12.0 to 3.12.2 start no more of them once the main module has ended.
READY_WORKERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """How a dispatcher does.

    Attributes:
        alive: whether its thread runs; False also after `close`.
        closed: whether `close` was called.
        waiting: tasks that have not finished.
        stalled_s: seconds without progress: nothing arrived, ran or finished; 0 when no task waits.
    """

    alive: bool
    closed: bool
    waiting: int
    stalled_s: float


class Dispatcher:
    """Runs the tasks of all lanes on one thread.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._turn = threading.Condition()
        self._turns = Turns()
        self._closed = False  # takes no more tasks: closed, or dead
        self._close_called = False
        self._dropped = False
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
            if not self._turns.lanes:
                self._moved_at = time.monotonic()
            lane.tasks.append(Queued(task, future))
            if len(lane.tasks) == 1:
                self._turns.enter(lane)
                self._make_ready(lane)
        return future

    def follow(self, lane: Lane) -> None:
        """Take note of the owners that a lane has now, other than at the end of its turn."""
        with self._turn:
            if self._turns.follow(lane):
                self._turn.notify()  # the thread may hold the lane back for what another owner has used

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
        """Return how the dispatcher does; never waits."""
        waiting = sum(len(lane.tasks) for lane in self._turns.lanes.copy())
        stalled_s = max(0.0, time.monotonic() - self._moved_at) if waiting else 0.0
        alive = self.thread.is_alive() and self._death is None
        return Liveness(alive=alive, closed=self._close_called, waiting=waiting, stalled_s=stalled_s)

    def device_s(self) -> dict[str, float]:
        """Return the seconds that each owner's turns have taken so far; never waits."""
        return self._turns.device_s()

    def close(self) -> None:
        """Stop after the step in hand; tasks that have not finished fail."""
        self._close_called = True
        abandoned = self._stop()
        # A thread that waits for a host that is lost does not end.
        if threading.current_thread() is not self.thread and self._death is None:
            self.thread.join()
        _fail(abandoned, RequestFailedError("the engine was closed before this request was carried out."))
        self.workers.close(wait=False)
        process.unregister(self)

    def die(self, error: RequestFailedError) -> None:
        """Fail all tasks, and refuse those that come, with this error; waits for nothing."""
        self._death = error
        _fail(self._stop(), error)

    def drop_requests(self) -> None:
        """Stop after the step in hand; what waits, and what comes from now on, is never answered.

        The process ends: an error in place of the answer would only be printed by a thread that is of no use any more.
        """
        self._dropped = True
        self._stop()

    def lost_in_fork(self) -> None:
        """Refuse all work in a forked process: its thread is missing, and a lock may be held for ever."""
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
            self._turns.forget_ready()
            self._turn.notify()
            return [queued.future for lane in self._turns.lanes for queued in lane.tasks]

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # Tasks fail on their own: this is the loop itself, and waiting requests would have no answer.
            self._death = death = RequestFailedError(
                f"the engine's dispatch thread died ({type(error).__name__}: {error}), and this engine does no more "
                "work. Start the process again and continue from the last checkpoint; its log has the traceback."
            )
            logger.exception("the engine's dispatch thread died")
            _fail(self._stop(), death)

    def _make_ready(self, lane: Lane) -> None:
        self._turns.make_ready(lane, time.perf_counter())
        self._turn.notify()

    def _loop(self) -> None:
        while True:
            with self._turn:
                lane, hold_s = self._turns.take(time.perf_counter())
                while lane is None and not self._closed:
                    self._turn.wait(hold_s)
                    lane, hold_s = self._turns.take(time.perf_counter())
                if lane is None or self._closed:
                    return
            self._moved_at = time.monotonic()
            self._step(lane)
            self._moved_at = time.monotonic()

    def _step(self, lane: Lane) -> None:
        task, future = lane.tasks[0].task, lane.tasks[0].future
        if not future.running() and not future.set_running_or_notify_cancel():
            task.close()
            self._leave(lane)
            return
        value, error = lane.resume
        lane.resume = (None, None)
        try:
            request: Request = task.send(value) if error is None else task.throw(error)
        except StopIteration as stop:
            self._leave(lane)
            future.set_result(stop.value)
            return
        except BaseException as raised:  # a KeyboardInterrupt of the user's loss reaches the user through its future
            self._leave(lane)
            if not self._dropped:  # a compile, for one, fails once jax has been torn down around it
                future.set_exception(raised)
            del future  # as below
            return
        finally:
            del value, error  # an error would keep this frame, and this frame it, with the arrays of the task
        if isinstance(request, Unawaited):
            with self._turn:
                request = request.after_wait if self._turns.shared() else request.request
        elif isinstance(request, Elsewhere):
            with self._turn:
                self._turns.wait_elsewhere(lane)
            request = request.future
        if request is None:
            with self._turn:
                self._turns.charge(lane, time.perf_counter())
                self._make_ready(lane)
        elif isinstance(request, Future):
            # No thread waits: those of `workers` are for what keeps the device busy.
            request.add_done_callback(partial(self._resume_from, lane))
        else:
            self.workers.submit(self._resume_with, lane, request)

    def _resume_from(self, lane: Lane, done: Future[Any]) -> None:
        # Not raised here: the error would keep this frame, and this frame its future.
        error = CancelledError() if done.cancelled() else done.exception()
        self._resume(lane, (done.result(), None) if error is None else (None, error), charged=False)

    def _resume_with(self, lane: Lane, request: Callable[[], object]) -> None:
        resume: tuple[object, BaseException | None]
        try:
            resume = (request(), None)
        except BaseException as error:
            resume = (None, error)
        self._resume(lane, resume, charged=True)
        del resume  # as above

    def _resume(self, lane: Lane, resume: tuple[object, BaseException | None], *, charged: bool) -> None:
        self._moved_at = time.monotonic()
        with self._turn:
            if charged:
                self._turns.charge(lane, time.perf_counter())
            lane.resume = resume
            if not self._closed:
                self._make_ready(lane)

    def _leave(self, lane: Lane) -> None:
        """Take the head task, which has ended, out of its lane."""
        with self._turn:
            lane.tasks.popleft()
            if lane.tasks:
                self._make_ready(lane)
            else:
                self._turns.leave(lane)


def _fail(futures: list[Future[Any]], error: RequestFailedError) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # cancelled, or answered
            future.set_exception(error)
