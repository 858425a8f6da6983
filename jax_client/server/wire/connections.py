"""How are connections served, so that slow, silent or very many clients cost the others nothing?

A `Connection` closes when its client does not send a request's headers in time, or sends too many of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

# h11, which is written in Python, costs as much time for a small request as everything that this package does.
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# The time from a connection, or a request's first byte, to the end of its headers; and their size.
HEADER_SECONDS = 20.0
HEADER_BYTES = 64 * 2**10
# Longer than the SDK keeps an idle connection: otherwise it sometimes writes into one that was just closed.
KEEPALIVE_SECONDS = 75
# Every request that waits for its answer holds a connection, and a client of the SDK may have 2,000 of them.
MAX_FILES = 65_536


class Connection(HttpToolsProtocol):
    """HTTP/1.1 for clients that send their headers in time, and not too many; others are disconnected."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; a client in the middle of a request's headers has to finish them in time."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
            return
        # The rest of a body that was refused unread counts too.
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_BYTES:
            self.transport.close()
        elif self._timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._disconnect)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._header_bytes = 0

    def _disconnect(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def http_server(
    app: ASGIApp, protocol: type[Connection] = Connection, *, loop: Literal["auto", "asyncio"] = "auto"
) -> uvicorn.Server:
    """Return an HTTP server of an application; it is not started.

    Args:
        app: the application.
        protocol: the class of its connections.
        loop: "asyncio" where a connection's socket itself is needed.
    """
    settings = uvicorn.Config(
        app,
        http=protocol,
        loop=loop,
        ws="none",
        log_level="warning",
        access_log=False,
        # Long polls end with the server: their clients ask again, and find it gone.
        timeout_graceful_shutdown=2,
        timeout_keep_alive=KEEPALIVE_SECONDS,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
    )
    return uvicorn.Server(settings)


def collect_rarely() -> None:
    """Raise the thresholds of the garbage collector: a full collection of many objects stops all threads.

    Removing a model collects explicitly (`server/state/eviction.py`).
    """
    gc.set_threshold(10_000, 20, 20)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may go; every connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        # Some systems allow less than their hard limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
