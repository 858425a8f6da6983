"""How does a client get the answer of a request? It asks until the answer is there; each poll waits for a while.

Polls beyond a bound are answered, not refused: the oldest one hears early that the request still waits, and a client
that lives asks again.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker.types import FutureRetrieveRequest

from jax_client.errors import NotFoundError
from jax_client.server.routes.handler import SMALL_LIMIT, parsed, route
from jax_client.server.state.pending import PendingRequest
from jax_client.server.state.server import Server
from jax_client.server.wire import answers
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.admission import load_of
from jax_client.server.wire.answers import Answer
from jax_client.server.wire.bodies import read_json
from jax_client.server.wire.pools import run_cheap

# How long one poll waits. The SDK's own limit is 45 s.
POLL_SECONDS = 30.0
# Polls that wait for the same request; the SDK has one.
MAX_POLLS_OF_REQUEST = 8


class Polls:
    """The polls that wait, the oldest first. To be used on the event loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], PendingRequest] = {}

    def begin(self, request: PendingRequest, account: Account) -> asyncio.Future[None]:
        """Return the future that ends a new poll early; end the oldest polls where there are too many."""
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        account.add(polls=1)
        if request.polls_waiting >= MAX_POLLS_OF_REQUEST:
            self._end(next((poll for poll, each in self._waiting.items() if each is request), None))
        if account.used("polls") > account.limit("polls"):
            self._end(next(iter(self._waiting), None))
        self._waiting[own] = request
        return own

    def end(self, poll: asyncio.Future[None], account: Account) -> None:
        """Forget a poll that has ended."""
        self._waiting.pop(poll, None)
        account.give(polls=1)

    def _end(self, poll: asyncio.Future[None] | None) -> None:
        if poll is not None:
            del self._waiting[poll]
            if not poll.done():
                poll.set_result(None)


def retrieve_route(server: Server) -> Route:
    """Return the route that gives answers, or a 408 with the reason for waiting."""
    polls = Polls()

    async def handler(request: Request) -> Response:
        asked, _ = await read_json(request, FutureRetrieveRequest, limit=SMALL_LIMIT)
        pending = server.ledger.in_memory(asked.request_id)
        if pending is None:
            pending = await run_cheap(_find, server, asked.request_id)
        answer = await _polled(server, polls, request, pending)
        if answer is None:
            reason = await run_cheap(server.waiting_reason, pending)
            if not pending.answer.done():
                state = "active" if reason is None else "paused_capacity"
                return JSONResponse({"queue_state": state, "queue_state_reason": reason or "in progress"}, 408)
            answer = pending.answer.result()
        return Response(answer.body, answer.status, media_type=answer.media_type)

    return route("POST", "/retrieve_future", handler)


def future_routes(server: Server) -> list[Route]:
    """Return the other routes."""
    cancel = lambda asked: server.ledger.get(asked.request_id).cancel()  # noqa: E731
    return [route("POST", "/cancel_future", parsed(FutureRetrieveRequest, cancel, cheap=True))]


def _find(server: Server, request_id: str) -> PendingRequest:
    """Return a request that is not in memory. Raises NotFoundError."""
    try:
        return server.ledger.get(request_id)
    except NotFoundError:
        if not server.sampling.may_have_lost(request_id):
            raise
        lost = PendingRequest(request_id, b"", "sample")
        lost.settle(answers.retry_later("the server does not know this request any more; send it again."))
        return lost


async def _polled(server: Server, polls: Polls, request: Request, pending: PendingRequest) -> Answer | None:
    """Return an answer, or None if the poll's time is over, or its connection."""
    if not pending.answer.done():
        orphans, later = server.orphans, asyncio.get_running_loop().call_later
        account = load_of(request).account
        early = polls.begin(pending, account)
        orphans.poll_began(pending)
        closed = asyncio.ensure_future(_closed(request))
        try:
            await _wait(pending, closed, early, POLL_SECONDS)
        finally:
            polls.end(early, account)
            orphans.poll_ended(pending, later, connected=not closed.done())
            closed.cancel()
    return pending.answer.result() if pending.answer.done() else None


async def _closed(request: Request) -> None:
    """Return once the connection of a request whose body was read is closed."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _wait(
    pending: PendingRequest, closed: asyncio.Future[None], early: asyncio.Future[None], seconds: float
) -> None:
    """Wait for an answer, the connection's end, the end of the poll before its time, or `seconds`."""
    if not pending.answer.done():
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            # The loop is closed when the server has stopped without this answer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(woken.set)

        pending.add_waker(wake)
        closed.add_done_callback(lambda _: woken.set())
        early.add_done_callback(lambda _: woken.set())
        timer = loop.call_later(seconds, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()
            pending.remove_waker(wake)
