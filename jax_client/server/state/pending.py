"""What happens to a request between its arrival and its answer? It waits for its number, begins, and is settled once.

A `PendingRequest` is one request with the future of its answer. Requests of a model come numbered, in any order; the
model's `RequestQueue` begins them in the order of their numbers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from jax_client.errors import RequestFailedError
from jax_client.runs.lifecycle.futures import settled
from jax_client.server.wire import answers
from jax_client.server.wire.answers import Answer

# How long a model's requests wait for an earlier one that never came, counted from the newest arrival: a call of many
# parts may take longer to arrive.
GAP_SECONDS = 60.0

Kind = Literal["sample", "train"]
Start = Callable[[], Future[Any]]


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request and the future of its answer. Thread-safe.

    Attributes:
        request_id: the id under which the client asks for the answer.
        digest: hash of the request's body, which tells a repetition from another request.
        kind: "sample" is idempotent, "train" is not.
        answer: what the client will get; a failure is an answer too.
        begun: whether the work was started.
        waits_for: `f() -> what the work waits for`, in words, None while it waits for nothing.
        polls_waiting, polls_begun: of the client's polls for the answer, how many wait, and how many there have been.
    """

    request_id: str
    digest: bytes
    kind: Kind
    answer: Future[Answer] = field(default_factory=Future)
    begun: bool = False
    waits_for: Callable[[], str | None] | None = None
    polls_waiting: int = 0
    polls_begun: int = 0
    _settled: bool = False
    _cancelled: bool = False
    _work: Future[Any] | None = None
    _wakers: set[Callable[[], None]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, start: Start) -> None:
        """Start the work, unless the request is settled already.

        Args:
            start: `start() -> future of a response`; an exception that it raises settles the request.
        """
        with self._lock:
            if self._settled:
                return
            self.begun = True
        # Without the lock: it may take long, and who cancels or asks does not wait for it.
        try:
            work = start()
        except BaseException as error:
            self.settle(answers.failure(error))
            return
        with self._lock:
            self._work = work
            cancelled = self._cancelled
        work.add_done_callback(self._encode)
        if cancelled:
            work.cancel()

    def _encode(self, done: Future[Any]) -> None:
        try:
            answer = answers.success(done.result())
        except BaseException as error:
            answer = answers.failure(error)
        self.settle(answer)

    def settle(self, answer: Answer) -> None:
        """Give the answer; later calls change nothing."""
        with self._lock:
            if self._settled:
                return
            self._settled = True
        self.answer.set_result(answer)

    def add_waker(self, wake: Callable[[], None]) -> None:
        """Have `wake` called once the request is settled, at once if it is, perhaps twice; on any thread."""
        with self._lock:
            first, self._wakers = self._wakers is None, self._wakers or set()
            self._wakers.add(wake)
        if first:  # one callback for all polls: a future keeps those of polls that ended long ago
            self.answer.add_done_callback(self._wake)
        elif self.answer.done():
            wake()

    def remove_waker(self, wake: Callable[[], None]) -> None:
        """Undo `add_waker`."""
        with self._lock:
            if self._wakers is not None:
                self._wakers.discard(wake)

    def _wake(self, _: Future[Answer]) -> None:
        with self._lock:
            wakers, self._wakers = self._wakers, set()
        for wake in wakers or ():
            wake()

    def cancel(self, answer: Answer | None = None) -> None:
        """Cancel the work and free its memory; a request that has not begun never begins.

        Args:
            answer: what a client is told that asks nevertheless; None says that the request was cancelled.
        """
        with self._lock:
            self._cancelled, work = True, self._work
            starting = self.begun and work is None
        if (work is None and not starting) or answer is not None:
            self.settle(answer or answers.refusal("the request was cancelled.", "user"))
        if work is not None:
            work.cancel()

    def release(self) -> None:
        """Keep only the answer of a settled request.

        The work's future and the callbacks on the answer would keep the run or the sampler in memory.
        """
        self.answer, self._work, self.waits_for = settled(self.answer.result()), None, None


class RequestQueue:
    """Begins the requests of one model in the order of their numbers. Thread-safe.

    Attributes:
        next_number: the number that begins next.

    Args:
        next_number: the first number.
    """

    def __init__(self, next_number: int = 1) -> None:
        self.next_number = next_number
        self._waiting: dict[int, tuple[PendingRequest, Start]] = {}
        self._newest_arrival = time.monotonic()
        self._beginning = False
        self._lock = threading.Lock()

    def submit(self, number: int, request: PendingRequest, start: Start) -> None:
        """Begin the request when every smaller number has begun.

        A request whose number is past fails: the queue gave its number up, and later requests have changed the model.

        Args:
            number: the request's number.
            request: the request.
            start: as `PendingRequest.begin` takes it; a request whose `start` raises has had its turn.
        """
        with self._lock:
            late = self.next_number - 1 if number < self.next_number else None
            if late is None:
                self._waiting[number] = request, start
                self._newest_arrival = time.monotonic()
                if self._beginning:
                    return
                self._beginning = True
        if late is None:
            self._begin_in_order()
            return
        request.settle(
            answers.refusal(
                f"request {request.request_id} was not carried out: it came after request {late} of this model had "
                "been given up for it. Go on from a checkpoint with a new client.",
                "user",
            )
        )

    def _begin_in_order(self) -> None:
        """Begin the requests whose number has come, on the one thread that does this now; the others do not wait."""
        while True:
            with self._lock:
                ready = self._waiting.pop(self.next_number, None)
                if ready is None:
                    self._beginning = False
                    return
                self.next_number += 1
            request, start = ready
            request.begin(start)

    def missing(self) -> str | None:
        """Return the missing numbers that the queue waits for, such as "3" or "3 to 5"; None if it waits for none."""
        with self._lock:
            return self._missing()

    def _missing(self) -> str | None:
        if not self._waiting or self._beginning:
            return None
        first = min(self._waiting)
        return str(self.next_number) if first == self.next_number + 1 else f"{self.next_number} to {first - 1}"

    def give_up(self) -> None:
        """Fail the requests that have waited GAP_SECONDS for a missing number, and skip that number."""
        with self._lock:
            missing = self._missing()
            if missing is None or time.monotonic() - self._newest_arrival < GAP_SECONDS:
                return
            late = [request for _, (request, _) in sorted(self._waiting.items())]
            self.next_number = max(self._waiting) + 1
            self._waiting.clear()
        for request in late:
            request.settle(
                answers.failure(
                    RequestFailedError(
                        f"request {request.request_id} was not carried out: number {missing} of this model did not "
                        f"come within {GAP_SECONDS:g} s. Go on from a checkpoint with a new client.",
                        category="user",
                    )
                )
            )


class ModelQueues:
    """The queue of every model. Thread-safe."""

    def __init__(self) -> None:
        self._queues: dict[str, RequestQueue] = {}
        self._lock = threading.Lock()

    def of(self, model_id: str, next_number: int = 1) -> RequestQueue:
        """Return a model's queue; a new one begins with `next_number`."""
        with self._lock:
            queue = self._queues.get(model_id)
            if queue is None:
                queue = self._queues[model_id] = RequestQueue(next_number)
            return queue

    def give_up(self) -> None:
        """Give up the missing numbers of every model, as `RequestQueue.give_up`."""
        with self._lock:
            queues = list(self._queues.values())
        for queue in queues:
            queue.give_up()

    def forget(self, session_id: str) -> None:
        """Forget the queues of a session's models."""
        with self._lock:
            for model_id in [key for key in self._queues if key.startswith(f"{session_id}:")]:
                del self._queues[model_id]
