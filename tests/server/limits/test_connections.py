"""Is everything that a connection makes the server hold bounded, and is an honest client beside it served?"""

from __future__ import annotations

import gc
import json
import socket
import struct
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from jax_client.server.wire import connections
from jax_client.server.wire.connections import HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED, Connections
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, raw, received, sample_body, sent, wait_for
from support.server.serving import API, KEY

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start

HEAD = f"Host: 127.0.0.1\r\nX-API-Key: {KEY}\r\n"


def waiting(running: Any, loaded: Any) -> socket.socket:
    """A connection whose poll has no answer."""
    connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    with raw(running) as http:
        request_id = http.post("/asample", json=sample_body(running, 10**6)).json()["request_id"]
    body = json.dumps({"request_id": request_id}).encode()
    connection = sent(running, f"POST {API}/retrieve_future HTTP/1.1\r\nContent-Length: {len(body)}", b"\r\n" + body)
    request = running.server.ledger.in_memory(request_id)
    wait_for(lambda: request.polls_waiting > 0)
    return connection


def most_sent(connection: socket.socket, piece: bytes, most: int = 40 * 2**20) -> int:
    """The bytes that a server takes before it closes the connection."""
    taken = 0
    with connection:
        try:
            while taken < most:
                connection.sendall(piece)
                taken += len(piece)
        except OSError:
            pass
    return taken


@pytest.mark.parametrize(
    "piece", [b"X-1: " + b"a" * 1_000 + b"\r\n", b"a" * 1_000, b"a:\r\n"], ids=["many", "one", "tiny"]
)
@pytest.mark.parametrize("place", ["first", "behind a poll", "trailer"])
def test_headers_are_bounded_wherever_they_are(start: Any, loaded: Any, place: str, piece: bytes) -> None:
    running = start()
    if place == "behind a poll":
        connection = waiting(running, loaded)
        connection.sendall(b"GET / HTTP/1.1\r\nX-First: ")
    elif place == "trailer":
        connection = sent(
            running, f"POST {API}/telemetry HTTP/1.1\r\nTransfer-Encoding: chunked", b"\r\n2\r\n{}\r\n0\r\nX: "
        )
    else:
        connection = sent(running, f"GET {API}/healthz HTTP/1.1", b"X-First: ")
    # What the kernels of both sides hold comes on top.
    assert most_sent(connection, piece * 64) < 16 * 2**20
    wait_for(lambda: not running.http.server_state.connections or place == "behind a poll")
    assert raw(running).get("/healthz").status_code == 200


def test_too_many_headers_are_refused_with_the_limit(start: Any) -> None:
    running = start()
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(MAX_HEADERS))
    answer = received(sent(running, f"GET {API}/healthz HTTP/1.1", many + b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 431 ") and b"more than 100 headers" in answer
    large = received(sent(running, f"GET {API}/healthz HTTP/1.1", b"X: " + b"a" * (HEADER_BYTES + 1)))
    assert large.startswith(b"HTTP/1.1 431 ") and b"65536 bytes" in large


def test_requests_behind_one_another_are_answered_in_order_up_to_a_bound(start: Any) -> None:
    running = start()
    one = f"GET {API}/healthz HTTP/1.1\r\n{HEAD}\r\n".encode()
    last = one.replace(b"Host", b"Connection: close\r\nHost")
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    connection.sendall(one * MAX_PIPELINED + last)
    assert received(connection).count(b"HTTP/1.1 200 OK") == MAX_PIPELINED + 1
    flood = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    flood.sendall(one * 3_000)
    assert received(flood).count(b"HTTP/1.1 ") <= MAX_PIPELINED + 2
    wait_for(lambda: not running.http.server_state.connections)


def test_a_large_body_in_small_chunks_is_no_attack(start: Any) -> None:
    running = start()
    connection = sent(
        running, f"POST {API}/telemetry HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked", b"\r\n"
    )
    for _ in range(200):
        connection.sendall(b"".join(b"4\r\nabcd\r\n" for _ in range(200)))
    connection.sendall(b"0\r\n\r\n")
    assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_a_reader_that_never_reads_is_dropped(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    running = start()
    with raw(running) as http:
        body = {"tags": [], "user_metadata": {"a": "x" * 60_000}, "sdk_version": "0"}
        session = http.post("/create_session", json=body).json()["session_id"]
    one = f"GET {API}/sessions/{session} HTTP/1.1\r\n{HEAD}\r\n".encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", running.port))

    def ask() -> bool:
        """Ask without reading, until the connection is gone."""
        try:
            slow.settimeout(0.2)
            slow.sendall(one)
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    wait_for(ask)
    wait_for(lambda: not running.http.server_state.connections)
    assert raw(running).get(f"/sessions/{session}").json()["user_metadata"] == body["user_metadata"]


class Held:
    """A connection of `Connections`, as far as that knows it."""

    def __init__(self, unread: int = 0) -> None:
        self.unread, self.aborted = unread, False

    def unread_bytes(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.aborted = True


def test_where_all_hold_too_much_the_one_with_the_most_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_HEADER_BYTES", 100_000)
    monkeypatch.setattr(connections, "MAX_UNREAD", 100)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    shared: Any = Connections()
    honest, small, large = Held(), Held(), Held()
    for each, size in ((honest, 2_000), (small, 45_000), (large, 50_000), (small, 51_000)):
        shared.hold(each, size)
    assert (honest.aborted, small.aborted, large.aborted) == (False, True, False)
    shared.remove(small)
    shared.remove(large)
    shared.hold(large, 99_000)
    assert not large.aborted, "what is gone does not count"
    first, second = Held(60), Held(60)
    shared.unread(first)
    shared.unread(second)
    assert (first.aborted, second.aborted) == (True, False), "the one that has not read for the longest"
    others = [Held() for _ in range(3)]
    shared.add(client := Held())
    shared.served(client)
    for each in others:
        shared.add(each)
    assert [each.aborted for each in (client, *others)] == [False, True, False, False], "a silent one, not a client"


def test_memory_is_returned_when_a_crowd_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CROWD", 4)
    later: list[Any] = []
    shared: Any = Connections()
    crowd: list[Any] = [Held() for _ in range(6)]
    for each in crowd:
        each.loop = SimpleNamespace(call_later=lambda seconds, call: later.append(call))
        shared.add(each)
    for left, each in enumerate(crowd):
        assert later == ([connections.return_memory] if left >= 3 else [])
        shared.remove(each)


def test_a_connection_that_is_reset_is_forgotten(start: Any) -> None:
    running = start()
    client = sent(running, f"GET {API}/healthz HTTP/1.1", b"\r\n")
    client.recv(2**16)
    (connection,) = map(weakref.ref, running.http.server_state.connections)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, in place of an end
    client.close()

    def forgotten() -> bool:
        gc.collect()
        return connection() is None

    wait_for(forgotten)


def test_a_client_is_served_beside_thousands_of_silent_connections(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 100)
    running = start()
    with raw(running) as http:
        http.get("/healthz")
        silent = [socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT) for _ in range(300)]
        started = time.monotonic()
        assert http.get("/healthz").status_code == 200 == raw(running).get("/healthz").status_code
        assert time.monotonic() - started < 5 and len(running.http.server_state.connections) <= 101
    for connection in silent:
        connection.close()
