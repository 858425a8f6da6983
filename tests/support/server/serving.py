"""How do the tests get a running server, and what do they ask of it?"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

import jax_client
from jax_client.runs.lifecycle.session import Session
from jax_client.server import LOOPBACK
from jax_client.server.app import build_app
from jax_client.server.state.server import Server
from jax_client.server.wire.connections import http_server
from support.golden_cases import CASES, base_values, sequences
from support.weight_files import write_hf

CASE = CASES["llama_tied"]
KEY = "tml-test"
API = "/api/v1"
ADAM = types.AdamParams(learning_rate=1e-2)


def write_model(directory: Path) -> str:
    """Write the model of these tests; return its name."""
    return str(write_hf(directory / "m", CASE, base_values(CASE)))


@contextlib.contextmanager
def held_model(directory: Path) -> Iterator[str]:
    """Write the model and keep its engine, so that its programs are compiled once for all tests of a file."""
    name = write_model(directory)
    holder = Session(config(directory / "holder"))
    holder.base_model(name).result()
    yield name
    holder.close("success", None).result()


class Running:
    """A server on a port of this process, by default a free one; `between` wraps what it serves."""

    def __init__(self, server: Server, port: int = 0, between: Callable[[Any], Any] = lambda app: app) -> None:
        self.server = server
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = build_app(server, api_key=KEY, hosts=LOOPBACK)
        self.http = http_server(between(app))
        self.http.config.timeout_graceful_shutdown = 1
        self._thread = threading.Thread(target=self.http.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self.http.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.http.should_exit = True
        self._thread.join(30)
        self.server.close(60)


class Between:
    """ASGI middleware of a test: counts requests, and does to them what `act` says."""

    def __init__(self, act: Callable[..., Any] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.act = act

    def __call__(self, served: Any) -> Any:
        async def middle(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.counts[scope["path"].removeprefix(API + "/")] += 1
            if scope["type"] == "http" and self.act is not None:
                await self.act(served, scope, receive, send)
            else:
                await served(scope, receive, send)

        return middle


async def body_of(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def whole_body(body: bytes) -> Callable[[], Any]:
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return sent.pop() if sent else await asyncio.Event().wait()

    return receive


async def nowhere(message: Any) -> None:
    pass


def config(state_dir: Path, **more: Any) -> jax_client.EngineConfig:
    settings: dict[str, Any] = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False}
    return jax_client.EngineConfig(**settings, state_dir=state_dir, autosave_minutes=None, **more)


def forward_backward_body(model_id: str, number: int, datums: list[types.Datum], loss_id: str | None = None) -> bytes:
    """The SDK's own encoding of one chunk, for the cross entropy or an uploaded loss."""
    loss: dict[str, Any] = {"loss_fn": "cross_entropy"}
    if loss_id is not None:
        loss = {"loss_fn": "custom", "loss_fn_config": {"loss_id": loss_id}}
    asked = ForwardBackwardRequest(
        model_id=model_id, seq_id=number, forward_backward_input=ForwardBackwardInput(data=datums, **loss)
    )
    return forward_backward_request_to_proto(asked).SerializeToString()


def data() -> list[types.Datum]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(s["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": s["targets"].tolist(), "weights": s["weights"].tolist()},
        )
        for s in sequences(CASE)
    ]
