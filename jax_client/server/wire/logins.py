"""How does a browser show who it is? By a cookie, which it gets for a key, or for a one-time token in an address.

A cookie opens what the key that it was got for opens, and the paths of the page only. The server keeps hashes of tokens
and cookies, in memory: they end with it.
"""

from __future__ import annotations

import hashlib
import html
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from jax_client.errors import JaxClientError
from jax_client.server.wire.bodies import read_body

E = TypeVar("E")

HOME, BELOW, LOGIN = "/", "/dashboard/", "/dashboard/login"
# Answered in JSON, for scripts; the other paths are for people.
SCRIPTS = ("/dashboard/api/", "/dashboard/static/")
COOKIE = "jax_client_session"
COOKIE_SECONDS = 14 * 24 * 3600
# Of one server; the oldest goes. Tokens, because each use prints another.
MOST_COOKIES, MOST_TOKENS = 512, 16
MAX_FORM = 4096
# No script and no style but the server's own files: what a model says, or a run is called, stays text.
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Of a page with a form: without a referrer a browser says that the origin of a form is "null", which the guard refuses.
FORM_HEADERS: Mapping[str, str] = {**HEADERS, "Referrer-Policy": "same-origin"}
# Without an action a form goes to its page's address, with the fragment, which names a view: the browser keeps it over
# the redirect, and no script is needed.
_FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>jax_client: log in</title></head>
<body><main><h1>jax_client</h1><p>{text}</p>
<form method="post"{action}>
<p><label>Key <input type="password" name="key" autocomplete="current-password" required autofocus></label>
<button>Log in</button></p></form>
<p>The terminal in which the server was started shows an address that logs in once.</p>
</main></body></html>
"""


class Logins(Generic[E]):
    """The one-time tokens and the cookies of one server; an ASGI application that answers who has neither.

    To be used on the event loop's thread, `announce` before it runs.

    Args:
        enter: `enter(key) -> what the key opens`, None for a wrong key.
        secure: whether browsers may send the cookie by TLS only.
    """

    def __init__(self, enter: Callable[[bytes], E | None], *, secure: bool = False) -> None:
        self._enter, self._secure = enter, secure
        self._tokens: OrderedDict[bytes, E] = OrderedDict()
        self._cookies: OrderedDict[bytes, tuple[E, float]] = OrderedDict()
        self._show: Callable[[str], object] | None = None

    def announce(self, entry: E, show: Callable[[str], object]) -> None:
        """Make a token that logs in once, and call `show(token)`; and again whenever one was used."""
        self._show = show
        show(self.new_token(entry))

    def new_token(self, entry: E) -> str:
        """Return a token that logs in once."""
        token = secrets.token_urlsafe(32)
        self._tokens[_digest(token)] = entry
        if len(self._tokens) > MOST_TOKENS:
            self._tokens.popitem(last=False)
        return token

    def answers(self, scope: Scope) -> bool:
        """Return whether a request logs in, whatever else it carries."""
        path = scope["path"]
        by_form = path == LOGIN or (path == HOME and scope["method"] == "POST")
        return by_form or (path == HOME and b"token=" in scope.get("query_string", b""))

    def of_cookie(self, headers: Mapping[bytes, bytes]) -> E | None:
        """Return what a request's cookie opens, None without one."""
        sent = headers.get(b"cookie")
        if sent is None:
            return None
        for value in _values(sent, _cookie_name(headers).encode()):
            found = self._cookies.get(_digest(value))
            if found is not None and found[1] >= time.monotonic():
                return found[0]
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Log a browser in, or answer with status 401 and how to log in."""
        request = Request(scope, receive, send)
        if scope["path"] == LOGIN or (scope["path"] == HOME and request.method == "POST"):
            answer = await self._by_form(request)
        elif self.answers(scope):
            answer = self._by_token(request)
        elif scope["path"].startswith(SCRIPTS):
            detail = "log in at / with the key of this server, or send it as X-API-Key."
            answer = JSONResponse({"detail": detail}, 401, headers=HEADERS)
        else:
            answer = _form("This page is behind a key.", home=scope["path"] == HOME)
        await answer(scope, receive, send)

    async def _by_form(self, request: Request) -> Response:
        if request.method != "POST":
            return JSONResponse({"detail": "POST the field key as a form."}, 405, headers=HEADERS)
        try:
            fields = parse_qs((await read_body(request, MAX_FORM)).decode("utf-8", "replace"))
        except JaxClientError as error:
            return _form(str(error))
        entry = self._enter(fields.get("key", [""])[0].strip().encode())
        return _form("That is no key of this server.") if entry is None else self._logged_in(request, entry)

    def _by_token(self, request: Request) -> Response:
        if request.method != "GET":
            return JSONResponse({"detail": "GET the address."}, 405, headers=HEADERS)
        entry = self._tokens.pop(_digest(request.query_params.get("token", "")), None)
        if entry is None:
            return _form("This address has logged in once already, or is of an earlier server.")
        if self._show is not None:
            self._show(self.new_token(entry))
        return self._logged_in(request, entry)

    def _logged_in(self, request: Request, entry: E) -> Response:
        value = secrets.token_urlsafe(32)
        self._cookies[_digest(value)] = entry, time.monotonic() + COOKIE_SECONDS
        if len(self._cookies) > MOST_COOKIES:
            self._cookies.popitem(last=False)
        answer = Response(status_code=303, headers={**HEADERS, "Location": HOME})
        name = _cookie_name(dict(request.scope["headers"]))
        answer.set_cookie(
            name, value, max_age=COOKIE_SECONDS, path="/", secure=self._secure, httponly=True, samesite="strict"
        )
        return answer


def _form(text: str, *, home: bool = True) -> Response:
    action = "" if home else f' action="{LOGIN}"'
    return HTMLResponse(_FORM.format(text=html.escape(text), action=action), 401, headers=FORM_HEADERS)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _cookie_name(headers: Mapping[bytes, bytes]) -> str:
    """Return the cookie's name: with the port, for browsers send each cookie of a host to all of its ports."""
    port = headers.get(b"host", b"").rpartition(b":")[2]
    return f"{COOKIE}_{port.decode()}" if port.isdigit() else COOKIE


def _values(sent: bytes, name: bytes) -> Iterator[str]:
    """Yield what a request says under a name; other programs of the host set cookies, in any form."""
    for part in sent.split(b";"):
        found, separator, value = part.partition(b"=")
        if separator and found.strip() == name:
            yield value.strip().decode("latin-1")
