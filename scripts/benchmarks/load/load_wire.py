"""What do the load tests of the server need: a fast HTTP client, and a server whose engine costs nothing."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

KEY = "tml-load"
API = "/api/v1"
NEW_TOKENS = 32


class Wire:
    """One keep-alive connection; asks one thing at a time. What httpx does for a request costs more than the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, path: str, body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
        """Return status and body of an answer."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lower = answer.lower()
        at = lower.index(b"content-length:") + 15
        length = int(lower[at : lower.index(b"\r", at)])
        return int(answer[9:12]), await self._reader.readexactly(length)

    async def post(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what a route of the protocol answers."""
        status, answer = await self.ask(f"{API}/{name}", json.dumps(asked).encode())
        if status != 200:
            raise RuntimeError(f"{name}: {status} {answer[:500]!r}")
        return json.loads(answer)

    async def sampler(self, model: str) -> str:
        """Make a session and a sampler of a base model; return the sampler's id."""
        made = await self.post("create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38"})
        asked = {"session_id": made["session_id"], "sampling_session_seq_id": 0, "base_model": model}
        return (await self.post("create_sampling_session", asked))["sampling_session_id"]

    def close(self) -> None:
        """End the connection."""
        if self._writer is not None:
            self._writer.close()


def sample_body(sampler_id: str, number: int, tokens: list[int]) -> bytes:
    """The request for one sample, as the SDK writes it."""
    asked = {
        "sampling_session_id": sampler_id,
        "seq_id": number,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "sampling_params": {"max_tokens": NEW_TOKENS, "seed": 1, "temperature": 1.0, "stop": []},
        "type": "sample",
    }
    return json.dumps(asked).encode()


class StandIn:
    """The part of an engine's surface that sampling needs, without the work.

    Args:
        hold: keep the answers until `release`.
    """

    def __init__(self, hold: bool) -> None:
        from jax_client.engine.core.requests import GeneratedRow, GenerationResult

        self.model = SimpleNamespace(vocab_size=50_000, max_context=8192, family="llama", eos_token_ids=(2,))
        self.monitor = self
        tokens, logprobs = np.arange(NEW_TOKENS, dtype=np.int32), np.full(NEW_TOKENS, -1.0, np.float32)
        self._result = GenerationResult(rows=[GeneratedRow(tokens=tokens, logprobs=logprobs, stop_reason="length")])
        self._held: list[Future[Any]] | None = [] if hold else None
        self._lock = threading.Lock()
        self.generated = 0

    def generate(self, snapshot: Any, request: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        with self._lock:
            self.generated += 1
            if self._held is not None:
                self._held.append(answer)
                return answer
        answer.set_result(self._result)
        return answer

    def release(self) -> None:
        with self._lock:
            held, self._held = self._held or [], None
        for answer in held:
            answer.set_result(self._result)

    def health(self) -> dict[str, Any]:
        return {"state": "idle", "waiting": 0, "stalled_seconds": 0.0, "compiling": []}

    def close(self) -> None:
        pass


def serve(hold: bool) -> None:
    """Serve stand-ins for any model, say on which port, and go on until the standard input ends."""
    from jax_client.cli.serve import listen, uvicorn_server
    from jax_client.config import EngineConfig
    from jax_client.engine.protocol import Engine
    from jax_client.runs.lifecycle.base_models import BaseModels, Loader
    from jax_client.server import LOOPBACK
    from jax_client.server.app import build_app
    from jax_client.server.state.request_log import RequestLog
    from jax_client.server.state.server import Server
    from jax_client.weights.read.source import ModelSource

    engine = StandIn(hold)
    loader = Loader(
        resolve=lambda name: ModelSource(name=name, path=Path("/none") / name, kind="hf"),
        open_engine=lambda source, config: (cast(Engine, engine), "none"),
        stamp=lambda source: (),
        identity=lambda source: "none",
    )
    with tempfile.TemporaryDirectory() as home:
        server = Server(EngineConfig(state_dir=home), log=RequestLog(Path(home)), base_models=BaseModels(loader))
        app = build_app(server, api_key=KEY, hosts=LOOPBACK)

        async def beside(scope: Any, receive: Any, send: Any) -> None:
            if scope.get("path") not in ("/generated", "/release"):
                await app(scope, receive, send)
                return
            if scope["path"] == "/release":
                engine.release()
            body = str(engine.generated).encode()
            headers = [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        listening = listen("127.0.0.1", 0)
        http = uvicorn_server(beside)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not http.started:
            time.sleep(0.01)
        print(listening.getsockname()[1], flush=True)
        sys.stdin.read()
        http.should_exit = True
        thread.join()
        server.close(5)


if __name__ == "__main__":
    serve(hold=sys.argv[1] == "held")
