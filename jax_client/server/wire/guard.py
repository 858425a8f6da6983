"""Who may talk to the server? `Guard` checks key, host and origin in front of every route, also of the health check.

A web page can make a browser send requests to a loopback port. So the server answers under listed names only, and
refuses requests that come from other sites' pages.
"""

from __future__ import annotations

import functools
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

KEY_HEADER = b"x-api-key"
# Paths below it carry a signature in place of the key.
SIGNED = "/api/v1/downloads/"


class Guard:
    """ASGI middleware that checks key, host and origin before it reads anything else.

    Args:
        app: the application behind it.
        api_key: the key that every request must carry, None for none.
        hosts: names and addresses under which the server may be called, without ports.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: Iterable[str]) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(host.lower() for host in hosts)  # as `urlsplit` gives them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope) if scope["type"] == "http" else (403, "only HTTP is served")
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, detail = refusal
        await JSONResponse({"detail": detail}, status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        # A Unix socket has no name to rebind.
        if scope.get("server", ("", 0))[1] is not None and _name(f"//{host}") not in self._hosts:
            return 403, "this server is not called by that name; see --allow-host."
        origin = headers.get(b"origin")
        if origin is not None and _name(origin.decode("latin-1")) not in self._hosts:
            return 403, "requests from web pages of other sites are refused."
        keyed = self._api_key is not None and not scope["path"].startswith(SIGNED)
        if keyed and not hmac.compare_digest(headers.get(KEY_HEADER, b""), self._api_key or b""):
            return 401, "the X-API-Key header is missing or wrong; set TINKER_API_KEY."
        return None


@functools.lru_cache(maxsize=64)
def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
