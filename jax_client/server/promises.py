"""Where is an answer between the request and the client that asks for it?

A promise is known by an id that the request decides, so that a request sent twice finds the promise it made the first
time. Requests of a model come numbered, and possibly in another order: they start in the order of their numbers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from jax_client.runs.futures import link

# Answers kept for clients that ask late, or again after a lost answer; requests in flight are always kept.
KEPT = 20_000
# How long a request waits for an earlier one that never came.
GAP_SECONDS = 60.0

Start = Callable[[], Future[Any]]


@dataclass(slots=True, eq=False)
class Promise:
    """One request and its answer to be.

    Attributes:
        request_id: what the client asks with.
        digest: of the request's body, to tell a repetition from another request.
        answer: of the run or sampler.
        since: when it came, by the monotonic clock.
    """

    request_id: str
    digest: bytes
    answer: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def begin(self, start: Start) -> None:
        """Carry the request out; what `start` raises is its answer."""
        try:
            link(start(), self.answer)
        except BaseException as error:
            self.answer.set_exception(error)


class Promises:
    """The promises of a server. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Promise] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, request_id: str, digest: bytes) -> tuple[Promise, bool]:
        """Return the promise of a request, and whether it is new.

        Raises:
            BadRequestError: another request had this number.
        """
        with self._lock:
            known = self._known.get(request_id)
            if known is None:
                promise = self._known[request_id] = Promise(request_id, digest)
                self._forget_the_oldest()
                return promise, True
        if known.digest != digest:
            raise BadRequestError(
                f"request {request_id} was sent before with another body; no number is used twice. Make a new client."
            )
        return known, False

    def get(self, request_id: str) -> Promise:
        """Return a promise.

        Raises:
            NotFoundError: it is not known, or not any more.
        """
        with self._lock:
            promise = self._known.get(request_id)
        if promise is None:
            raise NotFoundError(
                f"request {request_id!r} is unknown or expired; the newest {KEPT} answers are kept. Send it again."
            )
        return promise

    def _forget_the_oldest(self) -> None:
        if len(self._known) <= KEPT:
            return
        for request_id, promise in self._known.items():
            if promise.answer.done():
                del self._known[request_id]
                return


class Sequence:
    """Starts the requests of one model in the order of their numbers, which begin at 1. Thread-safe."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: dict[int, tuple[Promise, Start]] = {}
        self._lock = threading.RLock()

    def submit(self, number: int, promise: Promise, start: Start) -> None:
        """Start a request when its turn has come; what `start` raises fails the promise, and its turn is over."""
        with self._lock:
            self._waiting[number] = promise, start
            self._go_on()

    def give_up(self) -> None:
        """Fail what has waited too long for a request that did not come, and go on after it."""
        with self._lock:
            if not self._waiting:
                return
            first = min(self._waiting)
            promise, _ = self._waiting[first]
            if time.monotonic() - promise.since < GAP_SECONDS:
                return
            missing = str(self._next) if first == self._next + 1 else f"{self._next} to {first - 1}"
            for number in sorted(self._waiting):
                late, _ = self._waiting.pop(number)
                late.answer.set_exception(
                    RequestFailedError(
                        f"request {late.request_id} was not carried out: {missing} of this model did not come within "
                        f"{GAP_SECONDS:.0f} s. Go on from a checkpoint with a new client.",
                    )
                )
                self._next = number + 1

    def _go_on(self) -> None:
        while self._next in self._waiting:
            promise, start = self._waiting.pop(self._next)
            self._next += 1
            promise.begin(start)
