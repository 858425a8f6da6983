"""What does a call return? A future that can be awaited or waited for, any number of times, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import tinker

from jax_client.clients.sdk_errors import StaysInProcess, translate
from jax_client.errors import UnsupportedError
from jax_client.runs.lifecycle.futures import link, on_answer_thread, settled

T = TypeVar("T")
A = TypeVar("A")
C = TypeVar("C")


class LocalFuture(StaysInProcess, tinker.APIFuture[T]):
    """The API's future over a request that this process carries out.

    The work is on other threads, so that `result()` inside a running event loop blocks that loop but cannot deadlock.
    A timeout, or cancelling one awaiting task, leaves the request and the other waiters alone; `future().cancel()`
    cancels the request if it has not started.

    Args:
        source: the future of the request; its errors become the SDK's classes too.
        convert: `f(value) -> value`, called with the result.
    """

    def __init__(self, source: Future[A], convert: Callable[[A], T] | None = None) -> None:
        self._future: Future[T] = Future()
        self._process = os.getpid()
        link(source, self._future, convert, error=translate)

    @classmethod
    def of(cls, value: T) -> LocalFuture[T]:
        """Return a future that already has its value."""
        return cls(settled(value))

    def result(self, timeout: float | None = None) -> T:
        """Wait for the answer.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: no answer in time; the request continues.
            RuntimeError: called in a done callback, where waiting for another request would never end.
            UnsupportedError: called in a fork of the process that carries out the request, which is not finished.
        """
        self._refuse_fork()
        if not self._future.done() and on_answer_thread():
            raise RuntimeError(
                "result() of an unfinished request was called in a done callback, on the thread that completes all "
                "requests: it would never end. Wait on a thread of your own."
            )
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Await the answer; as `result`."""
        self._refuse_fork()
        if not self._future.done():
            loop = asyncio.get_running_loop()
            woken = loop.create_future()

            def wake() -> None:
                if not woken.done():
                    woken.set_result(None)

            def done(_: Future[T]) -> None:
                # On a closed loop no task waits any more.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(wake)

            self._future.add_done_callback(done)
            async with asyncio.timeout(timeout):
                await woken
        return self._future.result()

    def _refuse_fork(self) -> None:
        # No thread of a forked process completes what was pending: waiting would never end.
        if os.getpid() != self._process and not self._future.done():
            raise translate(
                UnsupportedError(
                    f"this future came from process {self._process} by a fork, and its request is carried out there. "
                    "Wait for it before the fork, and give the result to this process."
                )
            )

    def future(self) -> Future[T]:
        """Return the answer's `concurrent.futures.Future`; cancelling it cancels a request that has not started."""
        return self._future

    # Not for type checkers, to which every attribute would then be there.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            problem = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_"):
                problem += f": it is the future of an answer. Call .result() first, or await it: x.result().{name}"
            raise AttributeError(problem, name=name, obj=self)

        # A loop over a future, or unpacking it, comes here too.
        def __getitem__(self, key: object) -> NoReturn:
            raise TypeError(
                f"a {type(self).__name__} has no items: it is the future of an answer. Call .result() first, or await "
                "it."
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._state()}>"

    def _state(self) -> str:
        if not self._future.done():
            return "pending"
        if self._future.cancelled():
            return "cancelled"
        error = self._future.exception()
        return repr(self._future.result()) if error is None else f"failed: {error!r}"


class SampleFuture(LocalFuture[T]):
    """The future of a sampling request, which is cancelled with the last task that awaits it.

    A timeout of the await counts, as with the SDK's futures: the samples then leave the device at the next block. Other
    tasks, and threads in `result()`, that still wait keep the request alive; a timeout of `result()` leaves it alone.
    """

    def __init__(self, source: Future[A], convert: Callable[[A], T] | None = None) -> None:
        super().__init__(source, convert)
        self._waiters = 0
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the answer, as `LocalFuture.result`."""
        self._refuse_fork()  # before the lock, which another thread may have held at the fork
        with self._waiting():
            return super().result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Await the answer; the last await that is cancelled, or times out, cancels the request."""
        self._refuse_fork()
        try:
            with self._waiting():
                return await super().result_async(timeout)
        except (asyncio.CancelledError, TimeoutError):
            if not self._waiters:
                self._future.cancel()  # nothing happens if it has failed with such an error itself
            raise

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._lock:
            self._waiters += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiters -= 1


class ClientFuture(LocalFuture[C], Generic[C]):
    """The future of a client, which is also the client: each use as the client waits until it is made.

    A subclass adds the client's class; the inherited methods find the client's attributes through `__getattr__`.
    """

    def __getattr__(self, name: str) -> Any:
        # Python's own look-ups (copy, pickle, inspection) must not wait, nor loop before __init__ has run.
        if name == "_future" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.result(), name)

    async def _ready(self) -> C:
        return await self.result_async()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._state()}>"
