"""In which order do the requests of one run start? In the order in which they were submitted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jax_client.runs.lifecycle.futures import link


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    after: Future[Any] | None
    start: Callable[[], Future[Any]]
    answer: Future[Any]


class RequestOrder:
    """Start requests first in, first out, also when one must first wait for the host.

    The engine's lane keeps the order of what it is given. A request that needs something from the disk before it can be
    given to the lane (`after`) makes the later ones wait here, and not their callers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()

    def submit(self, start: Callable[[], Future[Any]], *, after: Future[Any] | None = None) -> Future[Any]:
        """Call `start` once `after` is done and every earlier request has started; return the future of its answer.

        `start` must only enqueue: it runs under a lock. Without anything to wait for it runs in this call, and what it
        raises is raised here; otherwise that fails the returned future, and later requests go on.
        """
        with self._lock:
            if not self._waiting and (after is None or after.done()):
                return start()
            entry = _Waiting(after=after, start=start, answer=Future())
            self._waiting.append(entry)
        if after is None:
            self._advance()
        else:
            after.add_done_callback(lambda _: self._advance())
        return entry.answer

    def _advance(self) -> None:
        # Answers are completed outside the lock: their callbacks are the user's code and may submit again.
        started: list[tuple[Future[Any] | BaseException, Future[Any]]] = []
        with self._lock:
            while self._waiting and ((after := self._waiting[0].after) is None or after.done()):
                entry = self._waiting.popleft()
                if entry.answer.cancelled():
                    continue
                try:
                    started.append((entry.start(), entry.answer))
                except BaseException as error:
                    started.append((error, entry.answer))
        for outcome, answer in started:
            if isinstance(outcome, Future):
                link(outcome, answer)
            elif answer.set_running_or_notify_cancel():
                answer.set_exception(outcome)
