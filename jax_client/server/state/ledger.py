"""Where is an answer between the request and the client that asks for it?

A promise is known by an id that the request decides, so that a request sent twice finds the promise it made the first
time. Requests of a model come numbered, and possibly in another order: they start in the order of their numbers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from jax_client.runs.lifecycle.futures import settled
from jax_client.server.state.request_log import Entry, RequestLog
from jax_client.server.wire import answers
from jax_client.server.wire.answers import Answer

# Answers in memory for clients that ask late, or again after a lost answer; what is older is in the journal.
KEPT_BYTES = 64 * 2**20
KEPT = 20_000
# How long a model's requests wait for an earlier one that never came, from the newest arrival on: a call of many parts
# may take longer to arrive.
GAP_SECONDS = 60.0

Start = Callable[[], Future[Any]]


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request and its answer to be.

    Attributes:
        request_id: what the client asks with.
        digest: of the request's body, to tell a repetition from another request.
        kind: "sample" may be asked again without harm, "train" may not.
        answer: as it will be sent; failures are answers too.
        begun: whether it is being carried out.
    """

    request_id: str
    digest: bytes
    kind: str
    answer: Future[Answer] = field(default_factory=Future)
    begun: bool = False
    _settled: bool = False
    _work: Future[Any] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, start: Start) -> None:
        """Carry the request out, unless it was cancelled; what `start` raises is its answer."""
        try:
            with self._lock:
                if self._settled:
                    return
                self.begun = True
                self._work = work = start()
        except BaseException as error:
            self.settle(answers.failure(error))
        else:
            work.add_done_callback(self._encode)

    def _encode(self, done: Future[Any]) -> None:
        try:
            answer = answers.success(done.result())
        except BaseException as error:
            answer = answers.failure(error)
        self.settle(answer)

    def settle(self, answer: Answer) -> None:
        """Answer, unless it is answered already."""
        with self._lock:
            if self._settled:
                return
            self._settled = True
        self.answer.set_result(answer)

    def cancel(self) -> None:
        """Stop the work, if it can be stopped, and free what it holds."""
        with self._lock:
            work = self._work
        if work is None:
            self.settle(answers.refusal("the request was cancelled.", "user"))
        else:
            work.cancel()


class RequestLedger:
    """The promises of a server. Thread-safe.

    Args:
        journal: keeps them over a restart; None keeps them in memory only.
        lost: from a promise that an earlier server did not answer to what the client is told.
    """

    def __init__(self, journal: RequestLog | None = None, lost: Callable[[str, Entry], Answer] | None = None) -> None:
        self._journal = journal
        self._lost = lost
        self._open: dict[str, PendingRequest] = {}
        self._answered: OrderedDict[str, PendingRequest] = OrderedDict()
        self._bytes = 0
        self._closing = False
        self._lock = threading.Lock()

    def make(self, request_id: str, digest: bytes, kind: str) -> tuple[PendingRequest, bool]:
        """Return the promise of a request, and whether it is new.

        Raises:
            BadRequestError: another request had this number.
        """
        promise = PendingRequest(request_id, digest, kind)
        with self._lock:
            known = self._open.get(request_id) or self._answered.get(request_id)
            if known is None:
                self._open[request_id] = promise
        if known is None:
            known = self._of_journal(request_id)
            if known is None:
                if self._journal is not None:
                    self._journal.promised(request_id, digest, kind)
                promise.answer.add_done_callback(lambda done: self._keep(promise, done.result()))
                return promise, True
            with self._lock:
                del self._open[request_id]
            # A twin that came in between may hold it.
            promise.settle(known.answer.result())
        return _same(known, digest), False

    def find(self, request_id: str, digest: bytes) -> PendingRequest | None:
        """Return the promise of a request that was sent before, None if it is new. Raises as `make`."""
        known = self.in_memory(request_id) or self._of_journal(request_id)
        return None if known is None else _same(known, digest)

    def in_memory(self, request_id: str) -> PendingRequest | None:
        """Return a promise that is in memory, without a look at the disk."""
        with self._lock:
            return self._open.get(request_id) or self._answered.get(request_id)

    def get(self, request_id: str) -> PendingRequest:
        """Return a promise.

        Raises:
            NotFoundError: it is not known, or not any more.
        """
        promise = self.in_memory(request_id) or self._of_journal(request_id)
        if promise is None:
            raise NotFoundError(
                f"request {request_id!r} is unknown or expired; the newest answers are kept. Send it again."
            )
        return promise

    def _of_journal(self, request_id: str) -> PendingRequest | None:
        entry = None if self._journal is None else self._journal.find(request_id)
        if entry is None:
            return None
        answer = entry.answer
        if answer is None:
            # This server would still have it open.
            answer = self._lost(request_id, entry) if self._lost else answers.again("the server was restarted.")
        promise = PendingRequest(request_id, entry.digest, entry.kind)
        promise.settle(answer)
        return promise

    def _keep(self, promise: PendingRequest, answer: Answer) -> None:
        # A future that is done keeps its callbacks, and these keep what was used: samplers, runs.
        promise.answer, promise._work = settled(answer), None
        with self._lock:
            self._open.pop(promise.request_id, None)
            self._answered[promise.request_id] = promise
            self._bytes += len(answer.body)
            while self._answered and (self._bytes > KEPT_BYTES or len(self._answered) > KEPT):
                _, oldest = self._answered.popitem(last=False)
                self._bytes -= len(oldest.answer.result().body)
            dropped = self._closing and (promise.kind == "sample" or not promise.begun)
            journal = None if dropped else self._journal
        if journal is not None:
            journal.answered(promise.request_id, promise.digest, promise.kind, answer)

    def open(self) -> list[PendingRequest]:
        """Return what is not answered yet, in the order in which it came."""
        with self._lock:
            return list(self._open.values())

    def ahead_of(self, promise: PendingRequest) -> int:
        """Return how many requests that came before this one are not answered yet."""
        with self._lock:
            for place, each in enumerate(self._open.values()):
                if each is promise:
                    return place
        return 0

    def finish(self, seconds: float) -> None:
        """Wait for the training that has begun; drop what has not, and sampling, as if the server had been killed."""
        with self._lock:
            self._closing = True
        waiting = []
        for promise in self.open():
            if promise.kind == "sample" or not promise.begun:
                promise.cancel()
            else:
                waiting.append(promise.answer)
        wait(waiting, seconds)


def _same(known: PendingRequest, digest: bytes) -> PendingRequest:
    if known.digest != digest:
        raise BadRequestError(
            f"request {known.request_id} was sent before with another body; no number is used twice. Make a new client."
        )
    return known


class Sequence:
    """Starts the requests of one model in the order of their numbers. Thread-safe.

    Args:
        following: the first number.
    """

    def __init__(self, following: int = 1) -> None:
        self.following = following
        self._waiting: dict[int, tuple[PendingRequest, Start]] = {}
        self._arrived = time.monotonic()
        self._lock = threading.RLock()

    def submit(self, number: int, promise: PendingRequest, start: Start) -> None:
        """Start a request when its turn has come; what `start` raises fails the promise, and its turn is over.

        One whose turn is over fails: others went on without it.
        """
        with self._lock:
            if number < self.following:
                promise.settle(
                    answers.refusal(
                        f"request {promise.request_id} was not carried out: it came after request {self.following - 1} "
                        "of this model had been given up for it. Go on from a checkpoint with a new client.",
                        "user",
                    )
                )
                return
            self._waiting[number] = promise, start
            self._arrived = time.monotonic()
            self._go_on()

    def waits(self) -> str | None:
        """Say which request of the model is missing; None if none is waited for."""
        with self._lock:
            if not self._waiting:
                return None
            first = min(self._waiting)
            return str(self.following) if first == self.following + 1 else f"{self.following} to {first - 1}"

    def give_up(self) -> None:
        """Fail what has waited too long for a request that did not come, and go on after it."""
        with self._lock:
            missing = self.waits()
            if missing is None or time.monotonic() - self._arrived < GAP_SECONDS:
                return
            for number in sorted(self._waiting):
                late, _ = self._waiting.pop(number)
                late.settle(
                    answers.failure(
                        RequestFailedError(
                            f"request {late.request_id} was not carried out: number {missing} of this model did "
                            f"not come within {GAP_SECONDS:g} s. Go on from a checkpoint with a new client.",
                            category="user",
                        )
                    )
                )
                self.following = number + 1

    def _go_on(self) -> None:
        while self.following in self._waiting:
            promise, start = self._waiting.pop(self.following)
            self.following += 1
            promise.begin(start)
