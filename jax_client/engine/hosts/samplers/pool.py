"""How do requests reach the replicas, and what becomes of them when a replica is lost?

One thread takes requests, answers, losses and freed versions as events, one after the other, and waits for nothing
else. A request that was lost with its replica is given to another one: (seed, sample, position) decide what it draws,
so its tokens are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jax_client import interpreter_end, process
from jax_client.engine.hosts.samplers.members import Flight, Member, choose
from jax_client.engine.hosts.samplers.messages import Answer, Opened, Opening, Replica, ReplicaLostError, Report
from jax_client.engine.hosts.samplers.prefixes import Prefixes, chain, extended
from jax_client.engine.hosts.samplers.versions import Versions
from jax_client.engine.sample.pages import PAGE
from jax_client.errors import JaxClientError, RequestFailedError
from jax_client.process import Step
from jax_client.threads import start_thread

if TYPE_CHECKING:
    from jax_client.engine.core.adapters import Snapshot
    from jax_client.engine.core.programs import CompileRecord
    from jax_client.engine.core.requests import GenerationRequest, GenerationResult
    from jax_client.values import AdapterState, LoraSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")
# f(snapshot, request) -> future of the answer, as `protocol.Engine.generate`.
Generate = Callable[["Snapshot | None", "GenerationRequest"], "Future[GenerationResult]"]
MAX_WAITING = 65_536  # rows, as of one engine
PING_S = 1.0
# Without an answer to a ping: after that a replica is lost.
HANG_S = 30.0
# The same for a process that Ray has yet to start.
FIRST_ANSWER_S = 300.0
# Before each new start since a replica's last answer. After these it is given up.
RESTART_S = (0.0, 5.0, 30.0)
# Replicas that one request may take with it.
MOST_LOSSES = 3
# For a replica to end, before it is ended by force.
END_S = 1.0
CLOSED = "the engine was closed before this request was carried out."


class SamplerPool:
    """The replicas, and the requests that they have. Thread-safe.

    Args:
        replicas: none of which has been started.
        opening: what they open their engines with.
        share: `f(state) -> weights` as `Versions` takes it.
        trainer: serves what no replica can: once all are given up.
        hang_s: seconds without an answer to a ping after which a replica is lost.

    Attributes:
        members: what is known of each replica.
        opened: done once all replicas can sample, failed with the error of one that cannot.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        opening: Opening,
        share: Callable[[AdapterState], object],
        trainer: Generate,
        *,
        hang_s: float = HANG_S,
    ) -> None:
        self.members = [Member(replica=replica, index=i) for i, replica in enumerate(replicas)]
        self.opened: Future[None] = Future()
        self._opening = opening
        self._trainer = trainer
        self._hang_s = hang_s
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._versions = Versions(share, lambda number: self._events.put(partial(self._freed, number)))
        self._prefixes = Prefixes()
        self._flights: dict[int, Flight] = {}
        self._waiting: list[Flight] = []  # for a replica that is being started
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the next two
        self._rows = 0
        self._closed = False
        self._ticked = time.monotonic()
        for member in self.members:
            self._events.put(partial(self._start, member))
        process.register(
            "samplers",
            "the replicas that sample beside a trainer, and their requests",
            owner=self,
            at_exit={Step.SAMPLING: SamplerPool.end},
            after_fork=SamplerPool._keep_in_fork,
        )
        self._thread = start_thread("jax_client-samplers", self._run)

    @property
    def rows(self) -> int:
        """Rows without an answer."""
        return self._rows

    def __len__(self) -> int:
        """Return the number of requests without an answer."""
        return len(self._flights)

    def generate(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Send a request to a replica; return the future of its answer. Cancelling it frees the request's rows there.

        Raises:
            RequestFailedError: the pool is closed, or too many rows wait already.
        """
        rows = max(1, request.num_samples)
        with self._lock:
            if self._closed:
                raise RequestFailedError("the engine is closed; create a new ServiceClient.", category="user")
            if self._rows + rows > MAX_WAITING and self._rows:
                raise RequestFailedError(
                    f"sample: {self._rows} samples wait already, and {rows} more would pass the limit of "
                    f"{MAX_WAITING}. Wait for some answers, then send this request again.",
                    category="user",
                )
            self._rows += rows
            number = next(self._numbers)
            future: Future[GenerationResult] = Future()
            future.add_done_callback(partial(self._left, number, rows))
            pages = chain(request.owner, 0 if snapshot is None else snapshot.number, request.tokens_T)
            flight = Flight(number=number, snapshot=snapshot, request=request, future=future, pages=pages)
            self._events.put(partial(self._receive, flight))  # with the lock held: before the end
        return future

    def warm(self, spec: LoraSpec) -> list[Future[list[CompileRecord]]]:
        """Have every replica that can sample compile what such an adapter needs; return a future of each."""
        return [member.replica.warm(spec) for member in self.members if member.state == "ready"]

    def end(self) -> None:
        """Fail all requests and kill the replicas; does not wait for that."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._events.put(None)

    def close(self) -> None:
        """Fail all requests, kill the replicas, and wait until the processes of this host have ended."""
        self.end()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        process.unregister(self)

    def _keep_in_fork(self) -> None:
        """Fork rule: the replicas are the parent's."""
        interpreter_end.keep_in_fork(self)

    # What follows runs on the pool's thread, but for `_left`.

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=PING_S)
            except Empty:
                self._tick()
                continue
            if event is None:
                break
            try:
                event()
            except Exception:
                logger.exception("a sampler's event failed")
            del event  # a thread that waits must not keep the last request's weights
            if time.monotonic() - self._ticked > 2 * PING_S:  # events may never pause
                self._tick()
        self._end()

    def _end(self) -> None:
        error = RequestFailedError(CLOSED)
        for flight in list(self._flights.values()):
            self._fail(flight, error)
        for member in self.members:
            member.replica.kill()
        for member in self.members:
            member.replica.wait_ended(END_S)
        self._versions.close()
        with contextlib.suppress(InvalidStateError):
            self.opened.set_exception(error)

    def _start(self, member: Member) -> None:
        member.start_at = None
        future = member.replica.start(self._opening)
        future.add_done_callback(self._event(self._started, member, member.starts))

    def _started(self, member: Member, start: int, done: Future[Opened]) -> None:
        if start != member.starts or member.state == "lost":
            return
        if (error := done.exception()) is not None:
            if not self.opened.done() and isinstance(error, JaxClientError):
                self.opened.set_exception(error)
            self._lose(member, str(error))
            return
        member.opened, member.state = done.result(), "ready"
        member.counts = member.opened.counts
        waiting, self._waiting = self._waiting, []
        for flight in waiting:
            self._dispatch(flight)
        if all(each.opened is not None for each in self.members):
            with contextlib.suppress(InvalidStateError):
                self.opened.set_result(None)

    def _receive(self, flight: Flight) -> None:
        if not flight.future.cancelled():
            self._flights[flight.number] = flight
            self._dispatch(flight)

    def _dispatch(self, flight: Flight) -> None:
        """Give a request to a replica: after its weights are shared, and bound there."""
        if flight.number not in self._flights:  # cancelled
            return
        ready = [member for member in self.members if member.state == "ready"]
        flight.attempt += 1
        if not ready:
            if all(member.state == "lost" for member in self.members):
                self._give_to_trainer(flight)
            else:
                flight.member = None
                self._waiting.append(flight)
            return
        member = choose(ready, flight, self._prefixes)
        member.take(flight)
        if flight.snapshot is None:
            self._send(flight.number, flight.attempt)
        else:
            shared = self._versions.shared(flight.snapshot)
            shared.add_done_callback(self._event(self._bind, flight.number, flight.attempt))

    def _bind(self, number: int, attempt: int, shared: Future[object]) -> None:
        if (current := self._current(number, attempt)) is None:
            return
        flight, member = current
        if (error := shared.exception()) is not None:
            self._fail(flight, error)
            return
        version = flight.version
        bound = member.bound.get(version)
        if bound is None or (bound.done() and bound.exception() is not None):
            bound = member.bound[version] = member.replica.bind(version, shared.result())
        bound.add_done_callback(self._event(self._send, number, attempt))

    def _send(self, number: int, attempt: int, bound: Future[None] | None = None) -> None:
        if (current := self._current(number, attempt)) is None:
            return
        flight, member = current
        if bound is not None and (error := bound.exception()) is not None:
            self._failed(flight, member, error)
            return
        answer = member.replica.generate(number, flight.version, flight.request)
        answer.add_done_callback(self._event(self._answered, number, attempt))

    def _answered(self, number: int, attempt: int, done: Future[Answer]) -> None:
        if (current := self._current(number, attempt)) is None:
            return
        flight, member = current
        if (error := done.exception()) is not None:
            self._failed(flight, member, error)
            return
        answer = done.result()
        member.counts, member.failures = answer.counts or member.counts, 0
        if answer.result is None:
            self._fail(flight, answer.error or RequestFailedError("the sampler gave this request up."))
            return
        request, pages = flight.request, flight.pages
        tail_T = request.tokens_T[(len(pages) - 1) * PAGE :]
        for row in answer.result.rows:  # a next turn begins with it
            self._prefixes.note(extended(pages, np.concatenate([tail_T, row.tokens]))[len(pages) - 1 :], member.key)
        self._forget(flight)
        if flight.future.set_running_or_notify_cancel():
            flight.future.set_result(answer.result)

    def _failed(self, flight: Flight, member: Member, error: BaseException) -> None:
        """Fail a request with an error of its own; a replica that is gone is lost with all that it has."""
        if isinstance(error, ReplicaLostError):
            self._lose(member, str(error))
        else:
            self._fail(flight, error)

    def _lose(self, member: Member, reason: str) -> None:
        """Kill a replica, start it anew unless that has failed too often, and give its requests to others."""
        flights = member.end_process()
        member.replica.kill(hung=True)
        member.reason = reason
        logs = "" if member.opened is None or not member.opened.logs else f" Ray's logs there: {member.opened.logs}."
        member.starts += 1  # answers of the old process are ignored
        if member.opened is None:  # it never ran: the user should hear why, now
            member.state, member.start_at = "lost", None
            where = f"sampler {member.index} on {member.replica.host} did not start: {reason}"
            with contextlib.suppress(InvalidStateError):
                self.opened.set_exception(RequestFailedError(where))
        elif member.failures < len(RESTART_S):
            member.state, member.start_at = "restarting", time.monotonic() + RESTART_S[member.failures]
            logger.warning(
                "sampler %d on %s is lost and is started again; its %d requests are sent to others. %s%s",
                member.index, member.replica.host, len(flights), reason, logs,
            )  # fmt: skip
        else:
            member.state, member.start_at = "lost", None
            logger.error(
                "sampler %d on %s is given up after %d starts. %s%s",
                member.index, member.replica.host, member.failures, reason, logs,
            )  # fmt: skip
        member.failures += 1
        waiting, self._waiting = self._waiting, []
        for flight in flights:
            flight.losses += 1
            if flight.losses >= MOST_LOSSES:
                where = f"sampler {member.index} on {member.replica.host}"
                self._fail(
                    flight,
                    RequestFailedError(
                        f"{flight.losses} samplers were lost while they computed this request, {where} last: "
                        f"{reason}{logs} If it is long, send less at a time."
                    ),
                )
        for flight in (*flights, *waiting):
            self._dispatch(flight)

    def _give_to_trainer(self, flight: Flight) -> None:
        flight.member = None
        try:
            flight.inner = self._trainer(flight.snapshot, flight.request)
        except JaxClientError as error:
            self._fail(flight, error)
            return
        flight.inner.add_done_callback(self._event(self._trainer_answered, flight.number))

    def _trainer_answered(self, number: int, done: Future[GenerationResult]) -> None:
        if (flight := self._flights.get(number)) is None or done.cancelled():
            return
        if (error := done.exception()) is not None:
            self._fail(flight, error)
            return
        self._forget(flight)
        if flight.future.set_running_or_notify_cancel():
            flight.future.set_result(done.result())

    def _left(self, number: int, rows: int, done: Future[GenerationResult]) -> None:
        """Count a request that is answered or cancelled; runs on whichever thread completed it."""
        with self._lock:
            self._rows -= rows
        if done.cancelled():
            self._events.put(partial(self._cancelled, number))

    def _cancelled(self, number: int) -> None:
        if (flight := self._flights.get(number)) is None:
            return
        member, inner = flight.member, flight.inner
        self._forget(flight)
        if member is not None:
            member.replica.cancel(number)
        if inner is not None:
            inner.cancel()

    def _freed(self, version: int) -> None:
        self._versions.forget(version)
        for member in self.members:
            if member.bound.pop(version, None) is not None:
                member.replica.free(version)

    def _fail(self, flight: Flight, error: BaseException) -> None:
        self._forget(flight)
        if flight.future.set_running_or_notify_cancel():
            flight.future.set_exception(error)

    def _forget(self, flight: Flight) -> None:
        self._flights.pop(flight.number, None)
        if flight.member is not None:
            flight.member.drop(flight)
        if flight in self._waiting:
            self._waiting.remove(flight)

    def _current(self, number: int, attempt: int) -> tuple[Flight, Member] | None:
        """Return a request and who computes it, None if this is not its newest attempt, or it is not wanted any more.

        Events name requests by their numbers: a future keeps its callbacks, and these must not keep any weights.
        """
        flight = self._flights.get(number)
        if flight is None or flight.attempt != attempt or flight.member is None:
            return None
        return flight, flight.member

    def _event(self, function: Callable[..., None], *arguments: object) -> Callable[[Future[T]], None]:
        """Return a callback of a future that has the pool's thread call the function, with the future last."""
        put, event = self._events.put, partial(function, *arguments)
        return lambda done: put(partial(event, done))

    def _tick(self) -> None:
        now = time.monotonic()
        late, self._ticked = now - self._ticked > 5 * PING_S, now
        for member in self.members:
            if member.start_at is not None and now >= member.start_at:
                self._start(member)
            if member.state == "lost" or member.start_at is not None:
                continue
            if member.asked is None:
                member.asked, member.asked_at = member.replica.ping(), now
                member.asked.add_done_callback(self._event(self._pinged, member, member.asked))
            elif late:
                member.asked_at = now  # this process was stopped itself; answers may have come by now
            elif now - member.asked_at > (limit := self._hang_s if member.heard else FIRST_ANSWER_S):
                self._lose(member, f"It has not answered for {limit:.0f} s.")

    def _pinged(self, member: Member, ping: Future[Report], done: Future[Report]) -> None:
        if ping is not member.asked:
            return
        member.asked = None
        if (error := done.exception()) is not None:
            self._lose(member, str(error))
            return
        member.heard, member.report = True, done.result()
        member.counts = member.report.counts or member.counts
