"""How does an object leave memory and come back when a client needs it? A run or a sampler that a client knows by id.

An `Evictable` is evicted, loading, live, or failed. Pinning loads it again; a client only notices the time that takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from jax_client.runs.lifecycle.futures import background, settled
from jax_client.runs.lifecycle.run import Run
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle

T = TypeVar("T")
R = TypeVar("R", Run, SamplerHandle)
State = Literal["evicted", "loading", "live", "failed"]


class Evictable(Generic[T]):
    """One object that may be in memory. Thread-safe.

    Args:
        make: `make() -> object` loads the object; may take long.
        free: `free(object) -> make` evicts the object and returns what loads it again; None, or an exception, if the
            object has to stay.
        name: name of the thread that loads.
        made: the object's future, if it is live or loading already.
    """

    def __init__(
        self,
        make: Callable[[], T],
        free: Callable[[T], Callable[[], T] | None],
        name: str,
        made: Future[T] | None = None,
    ) -> None:
        self._make = make
        self._free = free
        self._name = name
        self._future = made
        self._pins = 0
        self._last_used = time.monotonic()
        self._lock = threading.Lock()
        # Held during an eviction: a pin in that moment waits, then loads the object anew.
        self._evicting = threading.Lock()
        if made is not None:
            made.add_done_callback(self._loaded)

    def pin(self, until: Future[Any] | None = None) -> Future[T]:
        """Return the object's future, loading it if need be; a load that failed is tried again.

        Args:
            until: the object stays in memory until this future is done; None for no longer than the caller holds it.
        """
        with self._lock:
            self._last_used = time.monotonic()
            future = self._future
            new = None
            if future is None or (future.done() and future.exception() is not None):
                future = self._future = new = background(self._load, self._name)
            if until is not None:
                self._pins += 1
        if new is not None:
            new.add_done_callback(self._loaded)
        if until is not None:
            until.add_done_callback(lambda _: self._unpin())
        return future

    def _loaded(self, future: Future[T]) -> None:
        """Move the object to a new future: a future keeps its callbacks, and these keep whole requests in memory."""
        with self._lock:
            if self._future is future and not future.cancelled() and future.exception() is None:
                self._future = settled(future.result())

    def _load(self) -> T:
        with self._evicting:
            return self._make()

    def _unpin(self) -> None:
        with self._lock:
            self._pins -= 1
            self._last_used = time.monotonic()

    @property
    def state(self) -> State:
        """The object's state; "failed" is evicted after a load that did not succeed."""
        with self._lock:
            future = self._future
        if future is None:
            return "evicted"
        if not future.done():
            return "loading"
        return "live" if future.exception() is None else "failed"

    @property
    def value(self) -> T | None:
        """The object, None if it is not live."""
        with self._lock:
            future = self._future
        return None if future is None or not future.done() or future.exception() is not None else future.result()

    @property
    def in_use(self) -> bool:
        """Whether the object is in memory or loading."""
        return self.state in ("loading", "live")

    @property
    def pinned(self) -> bool:
        """Whether a request uses the object."""
        with self._lock:
            return self._pins > 0

    @property
    def last_used(self) -> float:
        """The monotonic time of the last use; now, while the object is pinned."""
        with self._lock:
            return time.monotonic() if self._pins else self._last_used

    def idle_since(self) -> float | None:
        """Return the monotonic time of the last use; None for an object that is pinned or not live."""
        value = self.value
        with self._lock:
            return None if value is None or self._pins else self._last_used

    def evict(self) -> bool:
        """Evict the object if it is live and not pinned, and return whether it was evicted.

        Raises what `free` raises; the object then stays.
        """
        with self._lock:
            future = self._future
            if self._pins or future is None or not future.done() or future.exception() is not None:
                return False
            self._future = None
            self._evicting.acquire()
        value = future.result()
        make: Callable[[], T] | None = None
        try:
            make = self._free(value)
        finally:
            with self._lock:
                if make is not None:
                    self._make = make
                elif self._future is None:
                    self._future = settled(value)
                else:
                    # A pin came during the eviction and waits for `_make`.
                    self._make = lambda: value
            self._evicting.release()
        return make is not None


@dataclass(slots=True, eq=False, kw_only=True)
class Served(Generic[R]):
    """A run or a sampler that clients know by id.

    Attributes:
        session_id: the session that it belongs to.
        evictable: the run or the sampler itself.
        base_model: the base model's name in the session; None if only the checkpoint tells it.
        ephemeral: whether this is a sampler of weights that were never saved; newer ones push it out.
        remakable: whether this is a sampler that its record makes again.
    """

    session_id: str
    evictable: Evictable[R]
    base_model: str | None
    ephemeral: bool = False
    remakable: bool = False

    @property
    def base_model_name(self) -> str | None:
        """The base model's name in the session, None while it is not known."""
        value = self.evictable.value
        return self.base_model if value is None else value.model_ref.name
