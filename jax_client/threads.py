"""Which threads work for the package, and when do they end? Daemon threads, which the exit steps join.

The pools of `concurrent.futures` are shut when the main module ends, though a thread of the user's may still train,
and their threads are waited for without limit. These threads serve until the exit step ENGINES.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from jax_client import interpreter_end, process
from jax_client.process import Step

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")


def start_thread(name: str, function: Callable[[], object]) -> threading.Thread:
    """Run `function` on a new daemon thread, which the exit joins; its owner tells it to end.

    Raises:
        RuntimeError: Python starts no thread any more: 3.12.0 to 3.12.2 after the end of the main module.
    """

    def run() -> None:
        try:
            function()
        except Exception:
            # While the program ends, nothing is left for it to work with.
            if not process.ending():
                raise
        finally:
            process.untrack(thread)

    thread = threading.Thread(target=run, name=name, daemon=True)
    process.track(thread)
    try:
        thread.start()
    except RuntimeError as error:
        process.untrack(thread)
        raise RuntimeError(
            f"the thread {name} cannot be started ({error}). Python 3.12.0 to 3.12.2 start none once the main module "
            "has ended: make the client before, wait for your thread in the main module, or use another version."
        ) from error
    return thread


def pools_serve() -> bool:
    """Whether the pools of `concurrent.futures` take work, and Python starts threads: until the main module's end."""
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int)
    except RuntimeError:
        return False
    return True


@dataclass(slots=True)
class _Jobs:
    """What the threads of a pool share. They do not refer to the pool, so that a forgotten pool ends."""

    queue: SimpleQueue[tuple[Future[Any], Callable[[], object]] | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    idle: int = 0
    threads: list[threading.Thread] = field(default_factory=list)
    closed: bool = False

    def work(self) -> None:
        """Run jobs until told to end."""
        while (job := self.queue.get()) is not None:
            complete(*job)
            del job  # a thread that waits must not keep the last job's arrays
            with self.lock:
                self.idle += 1

    def restart(self) -> None:
        """Begin anew in a forked process, where the threads are not."""
        self.queue, self.lock, self.idle, self.threads = SimpleQueue(), threading.Lock(), 0, []

    def dismiss(self) -> None:
        """End the threads after the jobs so far. Takes no lock: a destructor calls it."""
        self.closed = True
        for _ in self.threads:
            self.queue.put(None)


class Workers:
    """A pool of at most `most` threads, each started when a job finds none idle.

    It ends by `close`, with the block of a `with`, when it is forgotten, or at exit; jobs that it was given by then are
    run. In a forked process it is empty. Thread-safe.

    Args:
        name: of the threads.
        most: threads.
        ready: how many are started at once, for the time in which Python starts none.
    """

    def __init__(self, name: str, most: int, *, ready: int = 0) -> None:
        self._name = name
        self._most = most
        self._jobs = _Jobs()
        self.grow_to(ready)
        weakref.finalize(self, _Jobs.dismiss, self._jobs).atexit = False
        self._register()

    def _register(self) -> None:
        steps = {Step.ENGINES: Workers.dismiss}
        process.register(self._name, "a pool of threads", owner=self, at_exit=steps, after_fork=Workers._restart)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on a thread of the pool; return the future of its result.

        Where Python starts no thread any more and the pool has none, the caller runs it. Once the exit has ended the
        pool, the future stays pending.

        Raises:
            RuntimeError: the pool is closed.
        """
        future: Future[T] = Future()
        job = partial(function, *args, **kwargs)
        jobs = self._jobs
        with jobs.lock:
            if jobs.closed:
                if process.ending():
                    return future
                raise RuntimeError(f"the threads {self._name} have ended; nothing can be given to them")
            if jobs.idle:
                jobs.idle -= 1
            elif len(jobs.threads) < self._most:
                self._grow()
            if jobs.threads:
                jobs.queue.put((future, job))
                return future
        complete(future, job)
        return future

    def map(self, function: Callable[[A], T], items: Iterable[A]) -> list[T]:
        """Run a function for each item; return the results in order. Raises what the first that failed raises."""
        futures = [self.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def grow_to(self, ready: int) -> None:
        """Start threads until there are `ready` of them, or Python starts no more."""
        with self._jobs.lock:
            while len(self._jobs.threads) < ready and self._grow():
                self._jobs.idle += 1

    def runs_this_thread(self) -> bool:
        """Whether the calling thread is one of the pool."""
        return threading.current_thread() in self._jobs.threads

    def close(self, *, wait: bool, cancel: bool = False) -> None:
        """Take no more jobs; end the threads after those so far.

        Args:
            wait: for the threads' end.
            cancel: the jobs that have not begun.
        """
        jobs = self._jobs
        while cancel:
            try:
                job = jobs.queue.get_nowait()
            except Empty:
                break
            if job is not None:
                job[0].cancel()
        self.dismiss()
        process.unregister(self)
        if wait:
            for thread in jobs.threads:
                thread.join()

    def dismiss(self) -> None:
        """Take no more jobs; end the threads after those so far, without waiting."""
        with self._jobs.lock:
            if not self._jobs.closed:
                self._jobs.dismiss()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(wait=True)

    def _grow(self) -> bool:
        """With the lock held: start a thread if Python does; return whether it did."""
        try:
            self._jobs.threads.append(start_thread(f"{self._name}-{len(self._jobs.threads)}", self._jobs.work))
        except RuntimeError:
            return False
        return True

    def _restart(self) -> None:
        self._jobs.restart()
        self._register()


class InTurn:
    """A pool whose jobs have owners: each time that a thread is free, it runs one of the next owner's. Thread-safe.

    However many jobs one owner has, those of the others wait for one of them each.

    Args:
        name, most, ready: as of `Workers`.
    """

    def __init__(self, name: str, most: int, *, ready: int = 0) -> None:
        self._workers = Workers(name, most, ready=ready)
        self._begin()
        process.register(f"{name} queue", "jobs by owner", owner=self, after_fork=InTurn._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, deque[tuple[Future[Any], Callable[[], object]]]] = OrderedDict()

    def submit(self, owner: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on a thread of the pool, after what its owner gave before. Returns and raises as `Workers`."""
        future: Future[T] = Future()
        with self._lock:
            self._jobs.setdefault(owner, deque()).append((future, partial(function, *args, **kwargs)))
        self._workers.submit(self._run_next)
        return future

    def close(self) -> None:
        """Take no more jobs; end the threads after those so far, without waiting."""
        self._workers.close(wait=False)
        process.unregister(self)

    def _run_next(self) -> None:
        # One call for each job, though not for which: it is chosen now.
        with self._lock:
            owner, jobs = self._jobs.popitem(last=False)
            job = jobs.popleft()
            if jobs:  # behind the other owners
                self._jobs[owner] = jobs
        complete(*job)


class LoopExecutor(ThreadPoolExecutor):
    """`Workers` as the default executor of a library's event loop; asyncio takes no other kind.

    Args:
        workers: that do the work.
    """

    def __init__(self, workers: Workers) -> None:
        super().__init__(1)
        self._workers = workers

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on a thread of the workers."""
        return self._workers.submit(fn, *args, **kwargs)


class _End:
    """The last item: the thread ends."""


class BatchWriter(Generic[T]):
    """Calls `write(items)`, on a thread of its own, with what other threads have put. Thread-safe.

    Args:
        name: of the thread.
        write: `f(items) -> None`, in the order of the puts. What it raises is logged once.
        seconds: that a batch may grow.
        most: items of a batch.
        capacity: items that may wait; what is more is dropped. None for any number.
        tick: `f() -> None`, called on the thread after each `tick_seconds` without an item. What it raises is logged.
        tick_seconds: None never calls it.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], None],
        *,
        seconds: float,
        most: int,
        capacity: int | None = None,
        tick: Callable[[], None] | None = None,
        tick_seconds: float | None = None,
    ) -> None:
        self._name = name
        self._tick = tick
        self._tick_seconds = tick_seconds
        self._write = write
        self._seconds = seconds
        self._most = most
        self._capacity = capacity
        self._reported = False
        self._begin()

    def _begin(self) -> None:
        # An event is set once everything that was put before it is written.
        self._queue: SimpleQueue[T | threading.Event | _End] = SimpleQueue()
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, which the first `put` does otherwise.

        Raises:
            RuntimeError: Python starts no thread any more.
        """
        with self._lock:
            if self._thread is None:
                self._thread = start_thread(self._name, self._loop)

    def put(self, item: T) -> bool:
        """Take an item and return at once; False if it is dropped: the queue is full, or no thread can be started."""
        if self._capacity is not None and self._queue.qsize() >= self._capacity:
            return False
        if self._thread is None:
            try:
                self.start()
            except RuntimeError:
                return False
        self._queue.put(item)
        return True

    def waiting(self) -> int:
        """Return how many items no batch has taken yet."""
        return self._queue.qsize()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was put so far is written, `timeout` seconds at most; return whether it is."""
        if self._thread is None or not self._thread.is_alive():
            return self._queue.empty()
        written = threading.Event()
        self._queue.put(written)
        self._hurry.set()
        return written.wait(timeout)

    def end(self) -> None:
        """Have the thread end once all that was put so far is written; do not wait for it."""
        self._queue.put(_End())
        self._hurry.set()

    def close(self) -> None:
        """Write what was put so far, and wait for the end of the thread."""
        self.end()
        if self._thread is not None:
            self._thread.join()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process: what waits is the parent's to write, on a thread that only the parent has."""
        interpreter_end.keep_in_fork(self._queue)
        self._begin()

    def _loop(self) -> None:
        ended = False
        while not ended:
            batch = [self._next()]
            self._hurry.wait(self._seconds)
            self._hurry.clear()
            try:
                while len(batch) < self._most:
                    batch.append(self._queue.get_nowait())
            except Empty:
                pass
            self._hand_on([item for item in batch if not isinstance(item, threading.Event | _End)])
            ended = any(isinstance(item, _End) for item in batch)
            for event in [item for item in batch if isinstance(item, threading.Event)]:
                event.set()
            del batch  # a thread that waits must not keep what the last items refer to

    def _next(self) -> T | threading.Event | _End:
        while True:
            try:
                return self._queue.get(timeout=self._tick_seconds)
            except Empty:
                if self._tick is not None:
                    self._guarded(self._tick)

    def _hand_on(self, items: list[T]) -> None:
        if items:
            self._guarded(lambda: self._write(items))

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            if not self._reported:
                self._reported = True
                logger.warning("%s: a batch was not written", self._name, exc_info=True)


def complete(future: Future[T], function: Callable[[], T]) -> None:
    """Call `function` and give what it returns or raises to a future that has not begun, unless it is cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = function()
    except BaseException as error:
        future.set_exception(error)
        # The error's traceback has this frame: with the future in it, what the call worked on would stay in memory
        # until Python looks for cycles.
        del future
    else:
        future.set_result(value)
