"""What do clients that go away, are slow, or lie cost the server and the other clients?"""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from functools import partial
from typing import Any

import httpx
import pytest
import tinker

from jax_client.server.routes import polling
from jax_client.server.wire import bodies, connections
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT
from support.server import served_fake, serving
from support.server.served_fake import LIMIT, connect, in_use, poll, raw, received, sample_body, sent, wait_for
from support.server.serving import API, KEY, Between, Running

LARGE = 32 * 2**20

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


def test_clients_that_go_away_leave_nothing_behind(start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.5)
    running = start()
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    wait_for(lambda: in_use(running)[0] == 0)
    before, files = in_use(running), len(os.listdir("/proc/self/fd"))
    loaded[0].gate.clear()
    with raw(running) as http:
        request_id = http.post("/asample", json=sample_body(running, 77)).json()["request_id"]
    for _ in range(20):
        half = f"POST {API}/forward_backward HTTP/1.1\r\nContent-Length: 100000"
        sent(running, half, b"\r\n" + b"x" * 50_000).close()
        asked = json.dumps({"request_id": request_id}).encode()
        waiting = f"POST {API}/retrieve_future HTTP/1.1\r\nContent-Length: {len(asked)}"
        sent(running, waiting, b"\r\n" + asked).close()
    loaded[0].gate.set()
    wait_for(lambda: in_use(running) == before)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files)
    with raw(running) as http:
        assert poll(http, request_id).headers["content-type"] == "application/x-protobuf"


def test_slow_and_lying_clients_are_cut_off(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "MAX_BYTES", 10_000)
    running = start()
    post = f"POST {API}/forward_backward HTTP/1.1"
    silent = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    cases = {
        b"": silent,
        b" 408 ": sent(running, f"{post}\r\nContent-Length: 100", b"\r\nten bytes."),
        b" 400 ": sent(running, f"{post}\r\nContent-Length: -1", b"\r\n"),
        b" 413 ": sent(running, f"{post}\r\nTransfer-Encoding: chunked", b"\r\n"),
    }
    with pytest.raises(OSError):
        for _ in range(10_000):
            cases[b" 413 "].sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    for status, connection in cases.items():
        answer = received(connection)
        assert status in answer[:20] or status == b" 413 ", (status, answer)
        assert b"Traceback" not in answer
    loris = sent(running, f"GET {API}/healthz HTTP/1.1")
    with pytest.raises(OSError):
        for _ in range(100):
            loris.sendall(b"X-More: 1\r\n")
            time.sleep(0.1)
    loris.close()
    large = sent(running, f"GET {API}/healthz HTTP/1.1")
    with pytest.raises(OSError):
        for _ in range(1_000):
            large.sendall(b"X-Large: " + b"x" * 10_000)
    large.close()
    for start_line in (
        "GET http://[::1 HTTP/1.1",
        "GET * HTTP/1.1",
        "G\0T / HTTP/1.1",
        "GET /%ff%00 HTTP/9.9",
        "\x16\x03\x01",
    ):
        with sent(running, start_line, b"Connection: close\r\n\r\n") as odd:
            assert odd.recv(13)[9:10] == b"4", start_line
    smuggled = received(
        sent(running, f"{post}\r\nContent-Length: 1", b"\r\nxGET /evil HTTP/1.1\r\nConnection: close\r\n\r\n")
    )
    assert smuggled.count(b"HTTP/1.1 4") == 2, "a body, and a request without a host"
    wait_for(lambda: in_use(running) == (0, 0, 0, 0))


def alive(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())


def unread(running: Running, path: str, requests: int) -> socket.socket:
    """Return a connection that asks, and never reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(LIMIT)
    connection.connect(("127.0.0.1", running.port))
    ask = f"GET {API}/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n\r\n".encode()
    for _ in range(requests):
        connection.sendall(ask)
    return connection


@pytest.mark.parametrize(
    ("loop", "pieces"),
    [
        ("auto", 512),
        ("asyncio", 1),
        pytest.param("auto", 1, marks=pytest.mark.full),
        pytest.param("asyncio", 512, marks=pytest.mark.full),
    ],
)
def test_a_client_that_never_reads_its_answer_is_dropped(
    start: Any, monkeypatch: pytest.MonkeyPatch, pieces: int, loop: str
) -> None:
    """Of an answer in one piece, which lies in the server's memory, and of one that comes piece by piece, as a file."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    monkeypatch.setattr(serving, "http_server", partial(connections.http_server, loop=loop))
    begun = 0

    async def act(served: Any, scope: Any, receive: Any, send: Any) -> None:
        nonlocal begun
        if not scope["path"].endswith("/large"):
            await served(scope, receive, send)
            return
        begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
        for left in reversed(range(pieces)):
            await send({"type": "http.response.body", "body": b"x" * (LARGE // pieces), "more_body": left > 0})

    running = start(Between(act))
    with raw(running) as http:
        assert len(http.get("/large").content) == LARGE, "a client that reads gets all of it"
        clients, state = [], running.http.server_state
        for attack in range(1, 4):
            clients += [unread(running, "large", 1) for _ in range(4)]
            wait_for(lambda attack=attack: begun == 1 + 4 * attack)
            wait_for(lambda: len(state.connections) <= 1 and not state.tasks)
            # What is unsent hangs on the connection. The process's memory says little: its allocator keeps some.
            wait_for(lambda: gc.collect() >= 0 and alive(connections.Connection) <= 1)
        assert http.get("/healthz").status_code == 200
    for client in clients:
        client.close()


def test_a_client_that_reads_slowly_keeps_its_connection(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each period brings progress, and the answer is whole, though the client never takes all that is there."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.4)
    monkeypatch.setattr(connections, "LEAST_READ", 1)

    async def act(served: Any, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
        await send({"type": "http.response.body", "body": b"x" * LARGE})

    with unread(start(Between(act)), "large", 1) as connection:
        found = 0
        while found < LARGE:
            piece = len(connection.recv(2**21))
            assert piece, f"closed after {found} bytes"
            found += piece
            time.sleep(0.0005)


@pytest.mark.parametrize("of", ["training_runs/{}", "training_runs/{}/checkpoints", "samplers/{}", "sessions/{}"])
def test_names_in_paths_are_only_looked_up(start: Any, of: str) -> None:
    with raw(start()) as http:
        for name in ("..%2f..%2fetc%2fpasswd", "%00", "%2e%2e", "%ff%fe", "a%0d%0ab", "x" * 5_000, "%252e"):
            answer = http.get("/" + of.format(name))
            assert answer.status_code in (400, 404), (name, answer.text)
            assert "/jax_client/" not in answer.text
        kinds = "/training_runs/x/checkpoints/{}/{}"
        for kind, name in (("weights", "%00"), ("%2e%2e", "%2e%2e"), ("sampler_weights", "%2e%2e")):
            assert http.delete(kinds.format(kind, name)).status_code in (400, 404)
            assert http.put(kinds.format(kind, name) + "/ttl", json={"ttl_seconds": 1}).status_code in (400, 404)


def test_pages_are_numbers_in_range(start: Any) -> None:
    with raw(start()) as http:
        for path in ("training_runs", "checkpoints", "sessions"):
            for query in (
                "limit=-1",
                "limit=1000000000000",
                "limit=a",
                "offset=-1",
                "limit=1e3",
                "offset=٣",
                "limit=",
                "limit=--5",
            ):
                answer = http.get(f"/{path}?{query}")
                assert answer.status_code == 400 and query.split("=")[0] in answer.text, (path, query, answer.text)
        assert http.get("/training_runs?limit=5&offset=3").status_code == 200
        assert httpx.get(f"{http.base_url}training_runs?X-API-Key={KEY}", timeout=LIMIT).status_code == 401


def test_deleting_a_checkpoint_leaves_open_samplers_alone(start: Any) -> None:
    service = connect(start())
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    path = client.save_weights_for_sampler("s").result(LIMIT).path
    sampler = service.create_sampling_client(path)
    first = sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result(LIMIT)
    assert sampler.sample(PROMPT, 1, PARAMS).result(LIMIT).sequences[0].tokens == first.sequences[0].tokens
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(path).result(LIMIT)
