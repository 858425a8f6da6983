"""How does a page get what is new? By server-sent events, each with an id from which a new connection continues."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jax_client.server.dashboard.answers import api_route
from jax_client.server.dashboard.watching import Page, Watch, Watcher, checked_run
from jax_client.server.queries import cursor, number
from jax_client.server.wire.connections import ENDLESS
from jax_client.server.wire.logins import HEADERS

# A comment after so long: what is between browser and server may close a silent connection.
SILENCE_SECONDS = 15.0
_BEGIN, _ALIVE = b"retry: 1000\n\n", b": alive\n\n"


class _Stream(StreamingResponse):
    """Frames for one page, which is forgotten however the connection ends."""

    def __init__(self, watcher: Watcher, watch: Watch, page: Page) -> None:
        self._leave = lambda: watch.remove(page)
        # A proxy that gathers an answer would show it when it is whole, which it never is.
        headers = {**HEADERS, "X-Accel-Buffering": "no"}
        super().__init__(_frames(page), headers=headers, media_type="text/event-stream")
        watcher.join(watch, page)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until the browser leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _frames(page: Page) -> AsyncIterator[bytes]:
    yield _BEGIN
    while True:
        yield await page.next(SILENCE_SECONDS) or _ALIVE


def stream_route(watcher: Watcher, watch: Watch) -> Route:
    """Return the route of the stream."""

    async def handler(request: Request) -> Response:
        query, last_id = request.query_params, request.headers.get("last-event-id")
        archived = number(request, "archived", 0, 0, 1) == 1
        page = watch.page(checked_run(query.get("run")), cursor(query.get("since")), last_id, archived=archived)
        request.scope[ENDLESS] = True
        return _Stream(watcher, watch, page)

    return api_route("GET", "/stream", handler)
