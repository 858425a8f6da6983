"""What is in memory now, and can be again later? A run or a sampler that a client knows by its id.

A client never sees the difference: whoever uses a thing that was unloaded waits until it is there again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from jax_client.runs.lifecycle.futures import background, settled

T = TypeVar("T")


class Evictable(Generic[T]):
    """One thing. Thread-safe.

    Args:
        make: brings it into memory; may take long.
        name: of the thread that does.
        made: if it is there, or on its way, already.
    """

    def __init__(self, make: Callable[[], T], name: str, made: Future[T] | None = None) -> None:
        self._make = make
        self._name = name
        self._thing = made
        self._busy = 0
        self._used = time.monotonic()
        self._lock = threading.Lock()
        # Held while it is unloaded: who wants it in that moment waits, then makes it anew.
        self._unloading = threading.Lock()
        if made is not None:
            made.add_done_callback(self._made)

    def use(self, until: Future[Any] | None = None) -> Future[T]:
        """Return the thing, making it again if need be, and keep it in memory until `until` is done.

        What could not be made is tried again by the next use.
        """
        with self._lock:
            self._used = time.monotonic()
            thing = self._thing
            new = None
            if thing is None or (thing.done() and thing.exception() is not None):
                thing = self._thing = new = background(self._again, self._name)
            if until is not None:
                self._busy += 1
        if new is not None:
            new.add_done_callback(self._made)
        if until is not None:
            until.add_done_callback(lambda _: self._unused())
        return thing

    def _made(self, thing: Future[T]) -> None:
        """Keep the thing in a new future: the one that was waited for keeps its callbacks, and these whole requests."""
        with self._lock:
            if self._thing is thing and not thing.cancelled() and thing.exception() is None:
                self._thing = settled(thing.result())

    def _again(self) -> T:
        with self._unloading:
            return self._make()

    def _unused(self) -> None:
        with self._lock:
            self._busy -= 1
            self._used = time.monotonic()

    @property
    def there(self) -> T | None:
        """The thing, if it is in memory and ready."""
        with self._lock:
            thing = self._thing
        return thing.result() if thing is not None and thing.done() and thing.exception() is None else None

    @property
    def loading(self) -> bool:
        """Whether it is on its way into memory."""
        with self._lock:
            return self._thing is not None and not self._thing.done()

    @property
    def failed(self) -> bool:
        """Whether it could not be made."""
        with self._lock:
            return self._thing is not None and self._thing.done() and self._thing.exception() is not None

    @property
    def wanted(self) -> bool:
        """Whether it is in memory or on its way."""
        return self.loading or self.there is not None

    @property
    def busy(self) -> bool:
        """Whether something uses it."""
        with self._lock:
            return self._busy > 0

    @property
    def used(self) -> float:
        """When it was used last, by the monotonic clock; now, while it is in use."""
        with self._lock:
            return time.monotonic() if self._busy else self._used

    def idle_since(self) -> float | None:
        """Return when it was used last, by the monotonic clock; None while it is in use or not in memory."""
        there = self.there
        with self._lock:
            return None if there is None or self._busy else self._used

    def unload(self, free: Callable[[T], Callable[[], T] | None]) -> bool:
        """Free an idle thing.

        Args:
            free: frees it and returns what makes it again, or None (or raises) when it has to stay.

        Returns:
            Whether it was freed.
        """
        with self._lock:
            thing = self._thing
            if self._busy or thing is None or not thing.done() or thing.exception() is not None:
                return False
            self._thing = None
            self._unloading.acquire()
        there = thing.result()
        make: Callable[[], T] | None = None
        try:
            make = free(there)
        finally:
            with self._lock:
                if make is not None:
                    self._make = make
                elif self._thing is None:
                    self._thing = settled(there)
                else:
                    self._make = lambda: there
            self._unloading.release()
        return make is not None
