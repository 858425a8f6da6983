"""How are connections served, so that slow, silent or very many clients cost the others nothing?

A `Connection` closes when its client does not send a request's headers in time, sends too many of them, or does not
read its answer.
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
# A client has to take this much of its answer, or the rest of it, in every such period.
SEND_SECONDS = 60.0
SEND_BYTES = 64 * 2**10
# Longer than the SDK keeps an idle connection: otherwise it sometimes writes into one that was just closed.
KEEPALIVE_SECONDS = 75
# Every request that waits for its answer holds a connection, and a client of the SDK may have 2,000 of them.
MAX_FILES = 65_536


class Connection(HttpToolsProtocol):
    """HTTP/1.1 for clients that send few headers, in time, and read their answers; others are disconnected."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    # Set while the kernel does not take what is to be sent, and how much that was when it was set.
    _send_timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` from the first byte that the kernel does not take
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
        """Stop the timers."""
        self._stop_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start to watch how fast the client reads."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Take note that the kernel has taken everything."""
        self._stop_send_timer()
        super().resume_writing()

    def _watch_reader(self) -> None:
        self._unsent = self._not_taken()
        self._send_timer = self.loop.call_later(SEND_SECONDS, self._check_reader)

    def _check_reader(self) -> None:
        if self._not_taken() > max(0, self._unsent - SEND_BYTES):
            # `close` would wait until everything is sent.
            self.transport.abort()
        else:
            self._watch_reader()

    def _not_taken(self) -> int:
        """Return the bytes that the client has not taken. A kernel holds megabytes, and asks in large steps."""
        in_kernel = 0
        with contextlib.suppress(ImportError, OSError, ValueError):
            import fcntl
            import termios

            found = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            in_kernel = int.from_bytes(found, sys.byteorder)
        return self.transport.get_write_buffer_size() + in_kernel

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

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
