"""How do the tests get a server over the fake engine, and what do they send to it?"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

import jax_client
from jax_client.server.state.request_log import RequestLog
from jax_client.server.state.server import Server
from support.server.serving import (
    API,
    KEY,
    Running,
)

# What the SDK may take for its reaction; a hang is a failure.
LIMIT = 60


@pytest.fixture
def start(loaded: Any, models: Any, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers over the fake engine; they are stopped at the end."""
    started: list[Running] = []

    def begin(between: Callable[[Any], Any] = lambda app: app) -> Running:
        log = RequestLog(tmp_path) if not started else None
        server = Server(jax_client.EngineConfig(state_dir=tmp_path), log=log, base_models=models)
        started.append(Running(server, between=between))
        return started[-1]

    yield begin
    for engine in loaded:
        engine.gate.set()
    for running in started:
        running.stop()


def connect(running: Running) -> Any:
    return tinker.ServiceClient(base_url=running.url, api_key=KEY)


def raw(running: Running) -> httpx.Client:
    return httpx.Client(base_url=running.url + API, headers={"X-API-Key": KEY}, timeout=LIMIT)


def poll(http: httpx.Client, request_id: str) -> httpx.Response:
    return http.post("/retrieve_future", json={"request_id": request_id})


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def sample_body(running: Running, number: int, **more: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": running.server.live.samplers.items()[0][0],
        "seq_id": number,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4},
        **more,
    }


def sent(running: Running, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    connection.sendall(f"{head}\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n".encode() + body)
    return connection


def received(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        # A server that closes before it has read everything resets the connection.
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:
            pass
    return found


def in_use(running: Running) -> tuple[int, int, int, int]:
    state = running.http.server_state
    used = running.server.account.used
    return len(state.tasks), len(state.connections), used("bytes"), used("sampling_requests")
