"""How does a test ask an ASGI application without a connection? It hands over a request, and gets the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote


async def ask(
    app: Any, method: str, raw_path: str, pieces: Iterable[bytes], headers: Iterable[tuple[bytes, bytes]], query: bytes
) -> tuple[int, bytes]:
    """Return status and body of the answer to a request whose body comes in pieces."""
    *before, last = pieces
    events = [{"type": "http.request", "body": piece, "more_body": True} for piece in before]
    events.append({"type": "http.request", "body": last, "more_body": False})
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return events.pop(0) if events else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path),  # as from a connection: no lone surrogates
        "raw_path": raw_path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])
