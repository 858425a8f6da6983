"""In which order do the requests of one run start? In the order in which they were submitted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from jax_client.runs.lifecycle.futures import link

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    """A request that waits for its turn.

    Attributes:
        is_ready: `f() -> bool`, whether it may start.
        start: `f() -> g`: starts it; `g()` completes its answer, and is called outside the lock.
    """

    is_ready: Callable[[], bool]
    start: Callable[[], Callable[[], None]]


class RequestOrder:
    """Start requests first in, first out, also when one must first wait for the host.

    The engine's lane keeps the order of what it is given. A request that needs something from the disk before it can be
    given to the lane (`after`) makes the later ones wait here, and not their callers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()

    def submit(self, start: Callable[[], Future[T]], *, after: Future[A] | None = None) -> Future[T]:
        """Call `start` once `after` is done and every earlier request has started; return the future of its answer.

        `start` must only enqueue: it runs under a lock. Without anything to wait for it runs in this call, and what it
        raises is raised here; otherwise that fails the returned future, and later requests continue.
        """
        with self._lock:
            if not self._waiting and (after is None or after.done()):
                return start()
            answer: Future[T] = Future()
            is_ready = _always if after is None else after.done
            self._waiting.append(_Waiting(is_ready=is_ready, start=partial(_start, start, answer)))
        if after is None:
            self._advance()
        else:
            after.add_done_callback(lambda _: self._advance())
        return answer

    def _advance(self) -> None:
        # Answers are completed outside the lock: their callbacks are the user's code and may submit again.
        started = []
        with self._lock:
            while self._waiting and self._waiting[0].is_ready():
                started.append(self._waiting.popleft().start())
        for complete in started:
            complete()


def _always() -> bool:
    return True


def _start(start: Callable[[], Future[T]], answer: Future[T]) -> Callable[[], None]:
    """Start a request, unless it was cancelled; return the function that completes its answer."""
    if answer.cancelled():
        return lambda: None
    try:
        return partial(link, start(), answer)
    except BaseException as error:
        return partial(_fail, answer, error)


def _fail(answer: Future[T], error: BaseException) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
