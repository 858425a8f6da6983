"""Who keeps this process in a Ray cluster, and when does it leave? The samplers of all engines, until the last closes.

A local cluster's processes are killed by the kernel when the thread that started them ends. So a thread that outlives
every load joins the cluster, waits, and leaves it.
"""

from __future__ import annotations

import sys
import threading
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import ModuleType

from jax_client import process
from jax_client.engine.hosts import ray_cluster
from jax_client.process import Step
from jax_client.threads import start_thread


@dataclass(slots=True, eq=False)
class _Stay:
    users: int = 0
    joined: Future[ModuleType] = field(default_factory=Future)
    end: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def run(self) -> None:
        # A program that has joined by itself leaves by itself.
        ours = not _initialized()
        try:
            with warnings.catch_warnings():
                # Ray's children replace themselves right after the fork of which jax warns.
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                ray = ray_cluster.connect(start=True)
        except BaseException as error:
            self.joined.set_exception(error)
            return
        self.joined.set_result(ray)
        self.end.wait()
        if ours:
            ray.shutdown()


_lock = threading.Lock()
_stay: _Stay | None = None


def _initialized() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def join() -> ModuleType:
    """Join the cluster, or start one of this host; return the module `ray`. Each call has its `leave`.

    Raises:
        BadRequestError, RequestFailedError: as `ray_cluster.connect`.
    """
    global _stay
    with _lock:
        if (stay := _stay) is None:
            stay = _stay = _Stay()
            stay.thread = start_thread("jax_client-ray", stay.run)
        stay.users += 1
    try:
        return stay.joined.result()
    except BaseException:
        leave()
        raise


def leave() -> None:
    """Undo a `join`; the last one leaves the cluster, ends it if this process started it, and waits for that."""
    global _stay
    with _lock:
        if (stay := _stay) is None:
            return
        stay.users -= 1
        if stay.users:
            return
        _stay = None
        stay.end.set()
        if stay.thread is not None:
            stay.thread.join()


def _at_exit() -> None:
    if (stay := _stay) is not None:
        stay.end.set()


def _after_fork() -> None:
    global _lock, _stay
    _lock, _stay = threading.Lock(), None


process.register(
    "Ray", "this process's membership in a cluster", at_exit={Step.ENGINES: _at_exit}, after_fork=_after_fork
)
