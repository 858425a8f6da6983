"""Who launches device programs, in which order? One thread per engine; lanes take turns, each in its own order.

Two threads that launch programs with collectives can deadlock, so nothing else launches. A task is a generator that
runs on this thread and yields: a callable, to have it run elsewhere and be resumed with its result (waiting for the
device, packing, the user's loss function), or None, to let the other lanes go first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from jax_client.errors import RequestFailedError

T = TypeVar("T")
Task = Generator[Callable[[], Any] | None, Any, T]


class Lane:
    """The tasks of one client, first come first served."""

    def __init__(self) -> None:
        self.tasks: deque[tuple[Task[Any], Future[Any]]] = deque()
        self.resume: tuple[bool, Any] = (True, None)  # what the head task is resumed with: (is a value, value)


class Dispatcher:
    """Runs the tasks of all lanes on one thread, round robin."""

    def __init__(self, name: str) -> None:
        self._turn = threading.Condition()
        self._ready: deque[Lane] = deque()
        self._lanes: set[Lane] = set()
        self._closed = False
        self.workers = ThreadPoolExecutor(max_workers=64, thread_name_prefix=f"{name}-worker")
        self._thread = threading.Thread(target=self._loop, name=f"{name}-dispatch", daemon=True)
        self._thread.start()

    def submit(self, lane: Lane, task: Task[T]) -> Future[T]:
        """Queue a task at the end of its lane; return at once."""
        future: Future[T] = Future()
        with self._turn:
            if self._closed:
                raise RequestFailedError("the engine is closed; create a new ServiceClient.", category="user")
            lane.tasks.append((task, future))
            self._lanes.add(lane)
            if len(lane.tasks) == 1:
                self._make_ready(lane)
        return future

    def close(self) -> None:
        """Stop after the step in hand; tasks that have not finished fail."""
        with self._turn:
            self._closed = True
            abandoned = [entry for lane in self._lanes for entry in lane.tasks]
            self._ready.clear()
            self._turn.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for _, future in abandoned:
            if not future.done():
                future.set_exception(RequestFailedError("the engine was closed before this request was carried out."))
        self.workers.shutdown(wait=False)

    def _make_ready(self, lane: Lane) -> None:
        self._ready.append(lane)
        self._turn.notify()

    def _loop(self) -> None:
        while True:
            with self._turn:
                while not self._ready and not self._closed:
                    self._turn.wait()
                if self._closed:
                    return
                lane = self._ready.popleft()
            self._step(lane)

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
        if request is None:
            with self._turn:
                self._make_ready(lane)
            return
        self.workers.submit(self._elsewhere, lane, request)

    def _elsewhere(self, lane: Lane, request: Callable[[], Any]) -> None:
        try:
            resume = (True, request())
        except BaseException as error:
            resume = (False, error)
        with self._turn:
            lane.resume = resume
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
