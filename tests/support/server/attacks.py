"""How does a client attack a server? `Attack` starts threads; each sends one kind of what no honest client sends.

Each kind is one that once made a server hold gigabytes: headers behind a request without an answer, trailers,
compressed bodies that grow, sessions, polls and names without end, and answers that are never read.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import zstandard

API = "/api/v1"
PIECE = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1_000) for i in range(60))


KINDS = (
    *("headers", "trailers", "frames", "sessions", "polls", "names"),
    *("slow_readers", "slow_bodies", "silence"),
)


class Attack:
    """Threads that attack a server until `stop`.

    Attributes:
        counts: how often each kind was tried.

    Args:
        port: of the server, on this machine.
        key: its key.
        model: a base model that it serves.
        scale: how much each thread holds at once; 1 is a full attack.
        kinds: names of methods; none for all.
    """

    def __init__(self, port: int, key: str, model: str, scale: float = 1.0, kinds: Sequence[str] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self._port, self._key, self._model, self._scale = port, key, model, scale
        self._stopped = threading.Event()
        self._pending = ""
        methods = [getattr(self, kind) for kind in kinds or KINDS]
        self._threads = [
            threading.Thread(target=self._repeat, args=(kind,), daemon=True) for kind in (*methods, self._keep_pending)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)

    def _repeat(self, kind: Callable[[], None]) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                kind()
                self.counts[kind.__name__] += 1
            # An attacker has a machine of its own; here it would only take the processor from the server.
            self._stopped.wait(0.05)

    def many(self, number: int) -> range:
        return range(max(2, int(number * self._scale)))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.settimeout(5)
        return connection

    def head(self, method: str, path: str, *headers: str) -> bytes:
        lines = [f"{method} {API}/{path} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {self._key}", *headers]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def whole(self, path: str, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        return self.head("POST", path, f"Content-Length: {len(data)}") + data

    def post(self, path: str, body: dict[str, Any], client: http.client.HTTPConnection | None = None) -> dict[str, Any]:
        own = client or http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        own.request("POST", f"{API}/{path}", json.dumps(body), {"X-API-Key": self._key})
        try:
            return json.loads(own.getresponse().read() or b"{}")
        finally:
            if client is None:
                own.close()

    def hold(self, connections: list[socket.socket], seconds: float) -> None:
        self._stopped.wait(seconds)
        for connection in connections:
            connection.close()

    def flood(self, connection: socket.socket, piece: bytes, most: int = 64 * 2**20) -> None:
        with connection, contextlib.suppress(OSError):
            for _ in range(most // len(piece)):
                connection.sendall(piece)

    def session(self, **more: Any) -> str:
        about = {"tags": [], "user_metadata": None, "sdk_version": "0"} | more
        return self.post("create_session", about)["session_id"]

    def _keep_pending(self) -> None:
        """Have a request that waits for one that never comes; polls for it wait."""
        session = self.session()
        model = {"session_id": session, "model_seq_id": 0, "base_model": self._model, "lora_config": {"rank": 1}}
        made = self.post("create_model", model)["request_id"]
        while self.post("retrieve_future", {"request_id": made}).get("queue_state"):
            pass
        for number in range(5, 10**6, 5):
            step = {"model_id": f"{session}:train:0", "seq_id": number, "adam_params": {}, "type": "optim_step"}
            self._pending = self.post("optim_step", step)["request_id"]
            for _ in range(4):
                self.post("session_heartbeat", {"session_id": session})
                if self._stopped.wait(10):
                    return

    def headers(self) -> None:
        """Headers without end: first, behind a poll, as many small ones, as one large one, and held at the limit."""
        poll = self.whole("retrieve_future", {"request_id": self._pending})
        for before in (b"", poll + b"GET / HTTP/1.1\r\n"):
            for piece in (PIECE, b"a" * 60_000, b"a:\r\n" * 10_000):
                connection = self.connect()
                connection.sendall((before or b"GET / HTTP/1.1\r\n") + b"X: ")
                self.flood(connection, piece)
        held = []
        for _ in self.many(300):
            held.append(self.connect())
            held[-1].sendall(b"GET / HTTP/1.1\r\n" + PIECE[:60_000])
        self.hold(held, 5)

    def trailers(self) -> None:
        """Headers behind a body."""
        for piece in (PIECE, b"a" * 60_000):
            connection = self.connect()
            chunked = self.head("POST", "telemetry", "Transfer-Encoding: chunked")
            connection.sendall(chunked + b"2\r\n{}\r\n0\r\nX: ")
            self.flood(connection, piece)

    def frames(self) -> None:
        """Compressed bodies that grow: unfinished ones, and whole ones, of every limit."""
        size = 60 << 20
        compressor = zstandard.ZstdCompressor().compressobj()
        begun = compressor.compress(b" " * size) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        frames = [
            zstandard.ZstdCompressor(write_content_size=claims).compress(b"[]," * (size // 3)) for claims in (0, 1)
        ]
        held = []
        for path in ("asample", "forward_backward", "retrieve_future", "optim_step", "copy_weights"):
            for _ in self.many(20):
                held.append(self.connect())
                held[-1].sendall(self.head("POST", path, "Content-Encoding: zstd", "Content-Length: 9000000") + begun)
            for frame in frames:
                held.append(self.connect())
                length = f"Content-Length: {len(frame)}"
                held[-1].sendall(self.head("POST", path, "Content-Encoding: zstd", length) + frame)
        self.hold(held, 5)

    def sessions(self) -> None:
        """Sessions that are never closed, with as much metadata as there may be, and with too much."""
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        about = {"tags": [], "user_metadata": {"a": "x" * 60_000}, "sdk_version": "0", "display_name": "y" * 1_000}
        for i in self.many(500):
            self.post("create_session", about | ({"display_name": "y" * 900_000} if i % 10 == 0 else {}), client)
        client.close()

    def polls(self) -> None:
        """Polls that wait, far more than there are requests, and polls for what is not there."""
        held = []
        for i in self.many(1_000):
            held.append(self.connect())
            held[-1].sendall(
                self.whole("retrieve_future", {"request_id": self._pending if i % 2 else f"x{i}:sample:0:1"})
            )
        self.hold(held, 3)

    def names(self) -> None:
        """Names of what does not exist, long and many, in every place that takes one."""
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        session = self.session()
        for i in self.many(200):
            long = f"{time.monotonic_ns()}-{i}" + "x" * 300_000 * (i % 4 == 0)
            self.post("retrieve_future", {"request_id": long}, client)
            self.post("join_sampling_session", {"sampling_session_id": f"{long}:sample:0"}, client)
            self.post("session_heartbeat", {"session_id": long}, client)
            self.post("get_info", {"model_id": long}, client)
            sampler = {"session_id": session, "sampling_session_seq_id": i, "base_model": f"/no/{long}"}
            self.post("create_sampling_session", sampler, client)
            self.post("create_sampling_session", sampler | {"base_model": self._model}, client)
            client.request("GET", f"{API}/samplers/{long[:9_000]}", headers={"X-API-Key": self._key})
            client.getresponse().read()
        client.close()

    def slow_readers(self) -> None:
        """Large answers that are never read, or a few bytes at a time."""
        session = self.session(user_metadata={"a": "x" * 60_000})
        held = []
        for _ in self.many(200):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self._port))
            connection.sendall(self.head("GET", f"sessions/{session}") * 16)
            held.append(connection)
        for _ in range(20):
            if self._stopped.wait(0.5):
                break
            for connection in held[::2]:
                with contextlib.suppress(OSError):
                    connection.settimeout(0.001)
                    connection.recv(10)
        self.hold(held, 0)

    def slow_bodies(self) -> None:
        """Bodies that come a byte at a time."""
        held = []
        for _ in self.many(100):
            held.append(self.connect())
            held[-1].sendall(self.head("POST", "forward_backward", "Content-Length: 9000000") + b"x" * 500_000)
        for _ in range(10):
            if self._stopped.wait(1):
                break
            for connection in held:
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")
        self.hold(held, 0)

    def silence(self) -> None:
        """Connections that send nothing."""
        self.hold([self.connect() for _ in self.many(1_500)], 5)
