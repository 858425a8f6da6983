"""Who traces and compiles uploaded losses? A few threads that do nothing else, for one session after the other.

Python traces and XLA compiles for seconds. No lock, no request and no engine waits for that on its own thread. Sessions
take turns, and none has all of the threads. A job ends early when no one waits for it any more; what XLA has begun it
finishes, and neither its session nor the end of the program waits for that.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, TypedDict

from jax_client import process
from jax_client.process import Step
from jax_client.threads import Workers, complete


class LossCompile(TypedDict):
    """What is traced or compiled now: the loss, for which shapes, and for how many seconds it has been."""

    program: str
    shapes: str
    stage: str
    seconds: float


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One piece of work.

    Attributes:
        owner: whose turn it takes.
        loss, shapes, stage: what is shown of it; the stage is "tracing" or "compiling".
        work: `f(job) -> result`; it calls `check` now and then.
        future: of the result.
        waiting: how many wait for it.
        began: the monotonic time of its start, None before that.
    """

    owner: Hashable
    loss: str
    shapes: str
    stage: str
    work: Callable[[Job], Any]
    future: Future[Any] = field(default_factory=Future)
    waiting: int = 0
    began: float | None = None
    _stopped: bool = False

    def check(self) -> None:
        """Raise CancelledError if no one waits for the result any more."""
        if self._stopped or process.ending():
            raise CancelledError

    def stop(self) -> None:
        """Do not begin, or end at the next `check`."""
        self._stopped = True
        self.future.cancel()


class CompileQueue:
    """Runs jobs on its threads, those of one owner in order, the owners in turn. Thread-safe.

    Args:
        threads: how many there are, two at least.
    """

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._running: set[Job] = set()
        self._most_of_one = max(1, threads // 2)
        self._workers = Workers("jax_client-losses", threads)

    def submit(self, job: Job) -> Job:
        """Queue a job and return it."""
        with self._lock:
            self._waiting.setdefault(job.owner, deque()).append(job)
        self._workers.submit(self._work)
        return job

    def running(self) -> list[LossCompile]:
        """Return what runs now, the longest first."""
        now = time.monotonic()
        jobs = sorted(self._running.copy(), key=lambda job: job.began or now)
        return [
            {
                "program": f"loss {job.loss}",
                "shapes": job.shapes,
                "stage": job.stage,
                "seconds": round(now - (job.began or now), 3),
            }
            for job in jobs
        ]

    def _work(self) -> None:
        while (job := self._take()) is not None:
            complete(job.future, lambda job=job: job.work(job))
            with self._lock:
                self._running.discard(job)
            del job  # a thread that waits must not keep the last job's program

    def _take(self) -> Job | None:
        """Return the next job of the owner whose turn it is, None if there is none."""
        with self._lock:
            for owner in list(self._waiting):
                if sum(job.owner == owner for job in self._running) >= self._most_of_one:
                    continue
                jobs = self._waiting[owner]
                job = jobs.popleft()
                if jobs:
                    self._waiting.move_to_end(owner)
                else:
                    del self._waiting[owner]
                job.began = time.monotonic()
                self._running.add(job)
                return job
        return None

    def drop(self) -> None:
        """Begin nothing more: the program ends. What waits is never answered."""
        with self._lock:
            self._waiting.clear()

    def restart(self) -> None:
        """Begin anew in a forked process, where the threads are not."""
        self._lock, self._waiting, self._running = threading.Lock(), OrderedDict(), set()


# Two, so that one session's losses do not hold up another's; more of them on hosts with many cores.
shared = CompileQueue(max(2, min(8, (os.cpu_count() or 1) // 2)))


# Functions of the module: what is registered outlives it at the interpreter's end, and a method would keep the threads.
def _drop() -> None:
    shared.drop()


def _restart() -> None:
    shared.restart()


process.register(
    "losses", "uploaded losses that are to be compiled", at_exit={Step.REQUESTS: _drop}, after_fork=_restart
)
