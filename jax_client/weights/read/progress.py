"""How far is a model's download or load? The code that moves the bytes counts them and calls the requester's observer.

The observer is a context variable, so that it need not be handed through every function between the two. A counter
reads it on the thread that asked; any thread may then use the counter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Stage = Literal["downloading", "loading"]
_UNITS = ((1e9, "GB", 1), (1e6, "MB", 0), (1e3, "kB", 0), (1.0, "B", 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Bytes that are there, of how many; `total` is 0 while that is not known."""

    stage: Stage
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        if not self.total:
            return self.stage
        size, unit, digits = next(each for each in _UNITS if self.total >= each[0])
        return f"{self.stage} {self.done / size:.{digits}f}/{self.total / size:.{digits}f} {unit}"


Observer = Callable[[Progress], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer`, from any thread, whenever what the body loads has advanced."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class Counter:
    """Counts the bytes of one stage for the observer of this thread, if there is one. Thread-safe."""

    def __init__(self, stage: Stage, total: int = 0) -> None:
        self._observer = _observer.get()
        self._lock = threading.Lock()
        self._stage: Stage = stage
        self._done = 0
        self._total = total
        self.set(0, total)

    def add(self, n_bytes: int) -> None:
        """Count bytes that have come."""
        with self._lock:
            self._done += n_bytes
            self._tell()

    def set(self, done: int, total: int) -> None:
        """Say where it stands, where another counts; what has been reached is not taken back."""
        with self._lock:
            self._done, self._total = max(done, self._done), max(total, self._total)
            self._tell()

    def _tell(self) -> None:
        if self._observer is not None:
            self._observer(Progress(stage=self._stage, done=min(self._done, self._total), total=self._total))
