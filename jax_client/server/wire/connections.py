"""How are connections served, so that slow, silent and very many clients cost nobody else anything?"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from typing import Any, Literal

import uvicorn

# h11, which is written in Python, costs as much of a small request as all that this package does with it.
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# From a connection, or a first byte, to the end of a request's headers; and how many bytes they may have.
HEADER_SECONDS = 20.0
HEADER_BYTES = 64 * 2**10
# Longer than the SDK keeps an idle connection: else it would sometimes write into one that was just closed.
KEEPALIVE_SECONDS = 75
# Every request of the SDK that waits for its answer holds a connection, and a client may have 2,000.
MAX_FILES = 65_536


class Connection(HttpToolsProtocol):
    """HTTP/1.1 for clients that send their headers in time, and not too many; others are cut off."""

    _late: asyncio.TimerHandle | None = None
    _unfinished = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take what came; whoever is in the middle of a request's headers has to finish them."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            return
        # Also the rest of a body that was refused unread.
        self._unfinished += len(data)
        if self._unfinished > HEADER_BYTES:
            self.transport.close()
        elif self._late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEADER_SECONDS, self._cut_off)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._unfinished = 0

    def _cut_off(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def http_server(
    app: Any, protocol: type[Connection] = Connection, *, loop: Literal["auto", "asyncio"] = "auto"
) -> uvicorn.Server:
    """Return the HTTP server of an application, which has not begun.

    Args:
        app: the application.
        protocol: of its connections.
        loop: "asyncio" where a connection's socket itself is needed.
    """
    settings = uvicorn.Config(
        app,
        http=protocol,
        loop=loop,
        ws="none",
        log_level="warning",
        access_log=False,
        # Long polls end when the server does: their clients ask again, and see that it is gone.
        timeout_graceful_shutdown=2,
        timeout_keep_alive=KEEPALIVE_SECONDS,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
    )
    return uvicorn.Server(settings)


def collect_rarely() -> None:
    """Have the collector of cycles look less often: with answers and programs in memory, each look stops all threads.

    A model that goes makes it look at once (`Holdings`).
    """
    gc.set_threshold(10_000, 20, 20)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may; every connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        # Some systems allow less than they say.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
