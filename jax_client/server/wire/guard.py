"""Who may talk to the server? `Guard` checks key, host and origin in front of every route, also of the health check.

A web page can make a browser send requests to a loopback port. So the server answers under listed names only, and
refuses requests of pages that it did not serve itself, those of another port of this machine included. A browser, which
cannot send a key, shows a cookie for the paths of the server's own page: see `logins`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_client.errors import shown
from jax_client.server.public_url import PORTS, PublicUrl
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.admission import Load
from jax_client.server.wire.logins import BELOW, HOME, Logins

KEY_HEADER = b"x-api-key"
# Paths below it carry a signature in place of the key.
SIGNED = "/api/v1/downloads/"
# What decides who is let in; a second one could mean another thing to what is in front of the server.
ONCE = (b"host", b"origin", b"sec-fetch-site", KEY_HEADER)
# A name, an IPv4 address, or an IPv6 address in brackets; then a port.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
# What a browser says of a request: of a page of this very server, or of the user, who typed the address.
_OWN_SITES = (b"same-origin", b"none")

_Headers: TypeAlias = dict[bytes, bytes]
_Refusal: TypeAlias = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a key opens: an application, and the account of its clients."""

    app: ASGIApp
    account: Account


class Guard:
    """ASGI middleware that checks key, host and origin before it reads anything else, and counts what follows.

    Args:
        app: the application behind it; with several keys, the one that answers signed links.
        api_key: the key that every request must carry, None for none.
        hosts: names and addresses under which the server may be called, without ports.
        account: `account() -> Account` of the clients that the key lets in.
        by_key: with several keys, `by_key(key) -> Entry` of a request that carries it, None for a wrong one.
        pages: whether the application has a page, so that browsers may log in.
        public: the address under which browsers reach a proxy before the server, None without one.

    Attributes:
        logins: of browsers; None without a page.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Iterable[str],
        account: Callable[[], Account],
        by_key: Callable[[bytes], Entry | None] | None = None,
        pages: bool = False,
        public: PublicUrl | None = None,
    ) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(host.lower() for host in (*hosts, *([public.host] if public else ())))
        self._public = public
        self._account = account
        self._by_key = by_key
        self.logins: Logins[Entry] | None = None
        if pages:
            secure = public is not None and public.secure
            self.logins = Logins(lambda key: self._behind(key, signed=False), secure=secure)

    def announce_page(self, show: Callable[[str], object]) -> None:
        """Call `show(query)` with what makes the page's address one that logs in, and again when that was used.

        The query is "" where no login is needed, and with several keys, whose holders log in with theirs.
        """
        if self.logins is None or self._api_key is None:
            show("")
            return
        self.logins.announce(Entry(self._app, self._account()), lambda token: show(f"?token={token}"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        found = self.check(scope) if scope["type"] == "http" else (403, "only HTTP is served.")
        if isinstance(found, Entry):
            found.account.note(requests=1)
            with Load(found.account) as load:
                load.attach(scope)
                await found.app(scope, receive, send)
            return
        status, detail = found
        await JSONResponse({"detail": detail}, status)(scope, receive, send)

    def check(self, scope: Scope) -> Entry | _Refusal:
        """Return what is behind the guard for a request, or status and words of why it is not let in."""
        sent = scope["headers"]
        headers: _Headers = dict(sent)
        if len(headers) < len(sent):
            names = [name for name, _ in sent]
            for name in ONCE:
                if names.count(name) > 1:
                    return 400, f"the header {name.decode()} is there twice; send it once."
        # A Unix socket has no name to rebind.
        named = scope.get("server", ("", 0))[1] is not None
        return (
            self._host_refusal(headers, named=named)
            or _page_refusal(headers, scope, self._public)
            or self._entry(headers, scope)
            or (401, "the X-API-Key header is missing or wrong; set TINKER_API_KEY.")
        )

    def _host_refusal(self, headers: _Headers, *, named: bool) -> _Refusal | None:
        if not named:
            return None
        host = headers.get(b"host", b"")
        place = _place(host, 80)
        if place is None:
            return 400, f"the header host is {_text(host)}; send the name or address of this server, and its port."
        if place[0] not in self._hosts:
            return 403, f"this server is not called {_text(host)}; start it with --allow-host, or use another name."
        return None

    def _entry(self, headers: _Headers, scope: Scope) -> Entry | None:
        path, logins = scope["path"], self.logins
        locked = self._api_key is not None or self._by_key is not None
        if locked and logins is not None and (path == HOME or path.startswith(BELOW)):
            if logins.answers(scope):
                return Entry(logins, self._account())
            # Who has neither key nor cookie is told there how to log in.
            found = self._behind(headers.get(KEY_HEADER), signed=False) or logins.of_cookie(headers)
            return found or Entry(logins, self._account())
        return self._behind(headers.get(KEY_HEADER), signed=path.startswith(SIGNED))

    def _behind(self, key: bytes | None, *, signed: bool) -> Entry | None:
        """Return what is behind a key, None for a wrong one."""
        if self._by_key is not None and not signed:
            return None if key is None else self._by_key(key)
        if self._api_key is not None and not signed and not hmac.compare_digest(key or b"", self._api_key):
            return None
        return Entry(self._app, self._account())


def _page_refusal(headers: _Headers, scope: Scope, public: PublicUrl | None) -> _Refusal | None:
    """Refuse requests of pages that this server did not serve: its origin is its scheme, its name and its port.

    That of its public address is its own, too, whatever name the proxy calls it by.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None and site not in _OWN_SITES:
        return (
            403,
            f"requests from web pages of other sites are refused (sec-fetch-site is {_text(site)}); use the SDK.",
        )
    if origin is None:
        return None
    scheme, separator, host = origin.partition(b"://")
    own, named = scope.get("scheme", "http"), headers.get(b"host", b"")
    if public is not None:
        place, port = (public.host, public.port), PORTS[public.scheme]
        if separator and scheme == public.scheme.encode() and _place(host, port) == place:
            return None
        own = public.scheme if _place(named, port) == place else own
    port = PORTS.get(own, 80)
    known = _place(named, port)
    if not separator or scheme != own.encode() or known is None or _place(host, port) != known:
        return 403, f"requests from web pages of other sites are refused (origin is {_text(origin)}); use the SDK."
    return None


def _place(host: bytes, default_port: int) -> tuple[str, int] | None:
    """Return the name, in small letters, and the port of a Host header; None if it is none."""
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    port = default_port if found[2] is None else int(found[2])
    return (found[1].decode().lower().strip("[]"), port) if port <= 65535 else None


def _text(value: bytes) -> str:
    return shown(value.decode("latin-1")[:100])
