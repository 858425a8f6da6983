"""How are connections served, so that slow, silent or very many clients cost the others nothing?

A `Connection` closes when its client does not send a request's headers in time, sends too many of them, or does not
read what it asked for. `Connections` bounds what all of them hold together: where that is too much, the connection that
explains it best is closed, not the one that came last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from typing import Any, Literal, NoReturn

import uvicorn
from starlette.types import ASGIApp

# h11, which is written in Python, costs as much time for a small request as everything that this package does.
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jax_client.server.wire.pools import return_memory

# The time from a connection, or a request's first byte, to the end of its headers; their size and number. A trailer is
# a header behind the body, and counts too; so does everything that is sent behind a request without an answer.
HEADER_SECONDS = 20.0
HEADER_BYTES = 64 * 2**10
MAX_HEADERS = 100
# Requests that are sent behind one without an answer.
MAX_PIPELINED = 16
# What the headers of all connections hold together. Those of a connection up to SMALL_HEADERS do not count: the SDK
# sends less than 2 KiB.
MAX_HEADER_BYTES = 16 * 2**20
SMALL_HEADERS = 4 * 2**10
# Of what is received, between two looks at the limits.
PIECE = 16 * 2**10
# A client that does not take LEAST_READ of its answer, or the rest of it, in READ_SECONDS is disconnected; and so is
# the slowest where more than MAX_UNREAD bytes wait for all.
READ_SECONDS = 30.0
LEAST_READ = 64 * 2**10
MAX_UNREAD = 32 * 2**20
# Bytes of an answer that may be unsent without that.
UNWATCHED = 16 * 2**10
# Longer than the SDK keeps an idle connection: otherwise it sometimes writes into one that was just closed.
KEEPALIVE_SECONDS = 75
# Every request that waits for its answer holds a connection, and a client of the SDK may have 2,000 of them.
MAX_CONNECTIONS = 16_384
MAX_FILES = 65_536
# The connections of a crowd; when half of them are gone, memory is returned that much later.
CROWD, CALM_SECONDS = 256, 5.0
# In the scope of a request whose body had arrived when it was first asked for.
WHOLE_BODY = "jax_client.whole_body"
# In the scope of a request whose answer has no end; the end of the server cuts it.
ENDLESS = "jax_client.endless"


class _RefusedError(Exception):
    """What arrives is no request that this server takes; the parser stops."""


class Connections:
    """What the connections of one server hold together, besides bodies. To be used on the event loop's thread."""

    def __init__(self) -> None:
        # In the order in which they began to wait. Without a request so far: others have shown that they are clients.
        self._new: dict[Connection, None] = {}
        self._all: set[Connection] = set()
        self._held: dict[Connection, int] = {}
        self._unread: dict[Connection, int] = {}
        self._bytes = self._unread_bytes = self._most = 0

    def add(self, connection: Connection) -> None:
        """Note a new connection; where there are too many, close the one that has been silent for the longest."""
        self._all.add(connection)
        self._most = max(self._most, len(self._all))
        self._new[connection] = None
        if len(self._all) > MAX_CONNECTIONS:
            silent = next(iter(self._new))
            silent.abort()
            self.remove(silent)

    def served(self, connection: Connection) -> None:
        """Note that a connection has sent a request."""
        self._new.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        """Forget a connection."""
        self._all.discard(connection)
        self._new.pop(connection, None)
        self.read(connection)
        self.hold(connection, 0)
        if self._most >= CROWD and len(self._all) <= self._most // 2:
            # Half of a crowd has left: what it held is free, but still this process's.
            self._most = len(self._all)
            connection.loop.call_later(CALM_SECONDS, return_memory)

    def hold(self, connection: Connection, size: int) -> None:
        """Note how many bytes of headers a connection holds; where all hold too many, close the one with the most."""
        before = self._held.pop(connection, 0)
        if size > SMALL_HEADERS:
            self._held[connection] = size
        self._bytes += self._held.get(connection, 0) - before
        if self._bytes > MAX_HEADER_BYTES:
            largest = max(self._held, key=self._held.__getitem__)
            self._bytes -= self._held.pop(largest)
            largest.abort()

    def unread(self, connection: Connection) -> None:
        """Note that a client does not read as fast as is written; where too much waits, close the slowest."""
        self.read(connection)
        self._unread[connection] = size = connection.unread_bytes()
        self._unread_bytes += size
        if self._unread_bytes > MAX_UNREAD:
            slowest = next(iter(self._unread))
            self.read(slowest)
            slowest.abort()

    def read(self, connection: Connection) -> None:
        """Note that a client has read everything."""
        self._unread_bytes -= self._unread.pop(connection, 0)


class Connection(HttpToolsProtocol):
    """HTTP/1.1 for clients that send their headers in time, not too many, and read; others are disconnected."""

    # With the other connections of the server; `http_server` gives it.
    shared: Connections

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    # Bytes that are held beside bodies: since the last piece of a body that is being read, or the last request's end.
    _held = 0
    _in_head = False
    _in_body = False
    # Of the headers of requests without an answer, which have arrived.
    _unanswered = 0
    _refusal: tuple[int, str] | None = None
    # The request that is being answered; `cycle` is the newest one.
    _current: Any = None
    _not_taken_before = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first request."""
        super().connection_made(transport)
        # Until everything is sent, such a client is watched.
        transport.set_write_buffer_limits(high=UNWATCHED, low=0)
        self.shared.add(self)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; a client in the middle of a request's headers has to finish them in time."""
        for start in range(0, len(data), PIECE):
            piece = data if len(data) <= PIECE else data[start : start + PIECE]
            self._held += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._held > HEADER_BYTES:
                self.refuse(431, f"more than {HEADER_BYTES} bytes of headers, or behind a request without an answer.")
                return
        self.shared.hold(self, self._held + self._unanswered)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """Begin a request's headers."""
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; one behind the body, which could not be checked with the others, is refused."""
        if self._in_body:
            self._stop(400, f"the header {name.decode('latin-1')[:40]!r} is behind the body, where none is taken.")
        if len(self.headers) >= MAX_HEADERS:
            self._stop(431, f"a request has more than {MAX_HEADERS} headers.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request, or let it wait for the one before it."""
        if not self.url.startswith(b"/"):
            self._stop(400, "the target of a request must be a path that begins with '/'.")
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(400, f"more than {MAX_PIPELINED} requests are behind one without an answer.")
        self.shared.served(self)
        self._unanswered += len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        if not self.pipeline or self.pipeline[0][0] is not self.cycle:
            self._current = self.cycle

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body. The rest of one that was refused unread counts as headers do."""
        if self.cycle is self._current and not self.cycle.response_complete:
            self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request's body."""
        self._in_body = False
        if self.cycle is self._current:
            self._held = 0
        self.cycle.scope[WHOLE_BODY] = True  # type: ignore[typeddict-unknown-key]
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin the next request that waits."""
        following = self.pipeline[-1][0] if self.pipeline else None
        # A connection that waits for its next request holds nothing of the last one.
        self._current.scope = {}
        if following is None:
            self._unanswered = 0
            self.shared.hold(self, self._held)
            if not self._in_head:
                self.scope, self.headers = {}, []  # type: ignore[typeddict-item]
        super().on_response_complete()
        if following is not None:
            self._current = following
        self._watch_end()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without a request."""
        super().timeout_keep_alive_handler()
        self._watch_end()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, or was refused while it was."""
        self.refuse(*(self._refusal or (400, "this is no HTTP request.")))

    def _stop(self, status: int, text: str) -> NoReturn:
        self._refusal = status, text
        raise _RefusedError(text)

    def refuse(self, status: int, text: str) -> None:
        """End the connection, with an answer where none has begun."""
        current = self._current
        if current is not None and current.response_started and not current.response_complete:
            self.transport.abort()
            return
        if current is None or not current.response_complete or not self._in_body:
            content = f"{text} Use the SDK, or send one plain request after the other.\n".encode()
            head = b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: "
            self.transport.write(STATUS_LINE[status] + head + str(len(content)).encode() + b"\r\n\r\n" + content)
        self._disconnect_cycles()
        self.transport.close()

    def shutdown(self) -> None:
        """End the connection when its request is answered; one whose answer has no end at once."""
        super().shutdown()
        if self._current is not None and self._current.scope.get(ENDLESS):
            self._disconnect_cycles()
            self.transport.close()

    def _disconnect_cycles(self) -> None:
        """Let every request on the connection find its client gone."""
        for cycle in (self._current, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Start to watch a client that does not read as fast as is written."""
        super().pause_writing()
        self.shared.unread(self)
        if self._reading is None:
            self._watch_reader()

    def resume_writing(self) -> None:
        """End the watch: everything is read."""
        super().resume_writing()
        self.shared.read(self)
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def unread_bytes(self) -> int:
        """Return how many bytes the server holds for the client to read."""
        return self.transport.get_write_buffer_size()

    def _watch_end(self) -> None:
        # A transport that closes waits for the client to read the rest, for ever.
        if self.transport.is_closing() and self._reading is None and self.unread_bytes():
            self._watch_reader()

    def _watch_reader(self) -> None:
        self._not_taken_before = self._not_taken()
        self._reading = self.loop.call_later(READ_SECONDS, self._drop_slow_reader)

    def _drop_slow_reader(self) -> None:
        self._reading = None
        if self._not_taken() > max(0, self._not_taken_before - LEAST_READ):
            # `close` would wait until everything is sent.
            self.abort()
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
        return self.unread_bytes() + in_kernel

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self.shared.remove(self)
        self._stop_timer()
        # The newest request alone would learn of it otherwise.
        self._disconnect_cycles()
        super().connection_lost(exc)
        # uvicorn leaves the timer of a connection that was reset, and with it all that the connection holds.
        self._unset_keepalive_if_required()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._disconnect)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
    own = type(protocol.__name__, (protocol,), {"shared": Connections()})
    settings = uvicorn.Config(
        app,
        http=own,
        loop=loop,
        ws="none",
        # Warnings are of what clients send, which could fill a disk with them.
        log_level="error",
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
