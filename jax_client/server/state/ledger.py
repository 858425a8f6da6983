"""Which requests has the server accepted, and how was each answered?

The ledger knows a request by an id that the request decides, so a request that is sent twice finds its first answer. It
owns the requests without an answer, the newest answers, the queue of every model, and the request log.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import wait

from jax_client.errors import BadRequestError, NotFoundError, shown
from jax_client.server.state.pending import Kind, ModelQueues, PendingRequest
from jax_client.server.state.request_log import Entry, RequestLog
from jax_client.server.wire import answers
from jax_client.server.wire.answers import Answer

# Answers in memory, for clients that ask late, or again after a lost answer. With a log, which has the older ones, they
# are fewer: an answer takes 2 kB beside its body.
MAX_ANSWER_BYTES = 64 * 2**20
MAX_ANSWERS = 20_000
MAX_LOGGED_ANSWER_BYTES = 32 * 2**20
MAX_LOGGED_ANSWERS = 4_096
# Characters of a request's id: its session's, its model's or sampler's, and its number.
MAX_ID = 200


class RequestLedger:
    """The requests of a server. Thread-safe.

    Attributes:
        queues: the queue of every model.

    Args:
        log: keeps requests and answers over a restart; None keeps them in memory only.
        lost: `lost(request_id, entry) -> answer`, for a request that an earlier server did not answer.
    """

    def __init__(self, log: RequestLog | None = None, lost: Callable[[str, Entry], Answer] | None = None) -> None:
        self.queues = ModelQueues()
        self._log = log
        self._lost = lost
        self._unanswered: dict[str, PendingRequest] = {}
        self._answered: OrderedDict[str, PendingRequest] = OrderedDict()
        self._bytes = 0
        self._most = (MAX_ANSWERS, MAX_ANSWER_BYTES) if log is None else (MAX_LOGGED_ANSWERS, MAX_LOGGED_ANSWER_BYTES)
        self._closing = False
        self._lock = threading.Lock()

    def accept(self, request_id: str, digest: bytes, kind: Kind) -> tuple[PendingRequest, bool]:
        """Return the request of an id, and whether it is new.

        Raises:
            BadRequestError: another request had this id, or it is too long.
        """
        if len(request_id) > MAX_ID:
            raise BadRequestError(
                f"request {shown(request_id)} has an id of {len(request_id):,} characters, the limit is {MAX_ID}; "
                "number requests from 1 on."
            )
        request = PendingRequest(request_id, digest, kind)
        with self._lock:
            known = self._unanswered.get(request_id) or self._answered.get(request_id)
            if known is None:
                self._unanswered[request_id] = request
        if known is None:
            known = self._from_log(request_id)
            if known is None:
                if self._log is not None:
                    self._log.accepted(request_id, digest, kind)
                request.answer.add_done_callback(lambda done: self._keep(request, done.result()))
                return request, True
            with self._lock:
                del self._unanswered[request_id]
            # A repetition that arrived in between may wait for this object.
            request.settle(known.answer.result())
        return _same(known, digest), False

    def find(self, request_id: str, digest: bytes) -> PendingRequest | None:
        """Return a request that was sent before, None if it is new. Raises as `accept`."""
        known = self.in_memory(request_id) or self._from_log(request_id)
        return None if known is None else _same(known, digest)

    def in_memory(self, request_id: str) -> PendingRequest | None:
        """Return a request that is in memory, without reading the disk."""
        with self._lock:
            return self._unanswered.get(request_id) or self._answered.get(request_id)

    def get(self, request_id: str) -> PendingRequest:
        """Return a request.

        Raises:
            NotFoundError: no such request was accepted, or its answer was dropped for newer ones.
        """
        request = self.in_memory(request_id) or self._from_log(request_id)
        if request is None:
            raise NotFoundError(
                f"request {shown(request_id)} is unknown or expired; the newest answers are kept. Send it again."
            )
        return request

    def _from_log(self, request_id: str) -> PendingRequest | None:
        entry = None if self._log is None else self._log.find(request_id)
        if entry is None:
            return None
        answer = entry.answer
        if answer is None:
            # An earlier server accepted it: this one would still have it in memory.
            answer = self._lost(request_id, entry) if self._lost else answers.retry_later("the server was restarted.")
        request = PendingRequest(request_id, entry.digest, entry.kind)
        request.settle(answer)
        return request

    def _keep(self, request: PendingRequest, answer: Answer) -> None:
        request.release()
        with self._lock:
            self._unanswered.pop(request.request_id, None)
            self._answered[request.request_id] = request
            self._bytes += len(answer.body)
            most, most_bytes = self._most
            while self._answered and (self._bytes > most_bytes or len(self._answered) > most):
                _, oldest = self._answered.popitem(last=False)
                self._bytes -= len(oldest.answer.result().body)
            dropped = self._closing and (request.kind == "sample" or not request.begun)
            log = None if dropped else self._log
        if log is not None:
            log.answered(request.request_id, request.digest, request.kind, answer)

    def unanswered(self) -> list[PendingRequest]:
        """Return the requests without an answer, in the order of their arrival."""
        with self._lock:
            return list(self._unanswered.values())

    def ahead_of(self, request: PendingRequest) -> int:
        """Return how many of the requests without an answer arrived before this one."""
        with self._lock:
            for place, each in enumerate(self._unanswered.values()):
                if each is request:
                    return place
        return 0

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` for the training that has begun; cancel everything else.

        The log keeps what was cancelled as unanswered, so that the next server treats it as after a kill.
        """
        with self._lock:
            self._closing = True
        training = []
        for request in self.unanswered():
            if request.kind == "sample" or not request.begun:
                request.cancel()
            else:
                training.append(request.answer)
        wait(training, seconds)

    def close(self) -> None:
        """Write what the log still has to write, and close it."""
        if self._log is not None:
            self._log.close()


def _same(known: PendingRequest, digest: bytes) -> PendingRequest:
    if known.digest != digest:
        raise BadRequestError(
            f"request {known.request_id} was sent before with another body; no number is used twice. Make a new client."
        )
    return known
