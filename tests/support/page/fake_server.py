"""Which server do tests of the page need? One with the dashboard's routes over made data, that a test can change."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jax_client.server import dashboard
from support.page import made

STATIC = Path(dashboard.__file__).parent / "static"
CSP = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; object-src 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class FakeDashboard:
    """Serves from a thread until `close()`; `runs`, `deleted` and the switches may be changed meanwhile."""

    def __init__(self, *, empty: bool = False, port: int = 0) -> None:
        now = time.time()
        self.runs = [] if empty else made.rows(now)
        self.checkpoints = [] if empty else made.checkpoints(now)
        self.device = {"engines": [], "points": {}, "compiles": [], "hosts": []} if empty else made.device(now)
        self.series = {str(row["run"]): made.series(str(row["run"]), now) for row in self.runs}
        self.csv: dict[str, str] = {}
        self.asked: list[str] = []
        self.deleted: dict[str, float] = {}
        self.posts: list[tuple[str, made.Json]] = []
        self.logged_out = False
        self._streams: list[asyncio.Queue[tuple[str, made.Json]]] = []
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(self._app(), port=self.port, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def close(self) -> None:
        self._server.should_exit = True
        self.send("end", {})
        self._thread.join(10)

    def drop(self) -> None:
        """End every page's stream; the pages come back."""
        streams, self._streams = self._streams, []
        for queue in streams:
            self._loop.call_soon_threadsafe(queue.put_nowait, ("end", {}))

    def wait_for_streams(self) -> None:
        """Wait until a page follows."""
        end = time.monotonic() + 10
        while not self._streams:
            assert time.monotonic() < end, "no page has come within 10 s"
            time.sleep(0.01)

    def send(self, event: str, data: made.Json) -> None:
        """Send an event to every page."""
        for queue in list(self._streams):
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(queue.put_nowait, (event, data))

    def step(self, run: str, step: int, loss: float) -> None:
        """Let a run take a step."""
        row = next(row for row in self.runs if row["run"] == run)
        row |= {"step": step, "loss": loss, "updated": time.time()}
        points = {"kind": "step", "step": [step], "time": [time.time()], "tokens": [5926 * step], "value": [loss]}
        self.send("runs", {"runs": [row]})
        self.send(
            "points", {"run": run, "series": {"loss:mean": points}, "events": [], "next": f"{step}-9", "live": True}
        )

    def _serve(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._server.serve())
        self._loop.close()

    def _app(self) -> Starlette:
        api = "/dashboard/api"
        routes = [
            Route("/", self._page),
            Route("/dashboard/tables", lambda _: PlainTextResponse("tables")),
            Mount("/dashboard/static", StaticFiles(directory=STATIC)),
            Route(f"{api}/state", self._json(self._state)),
            Route(f"{api}/runs", self._json(self._listed)),
            Route(f"{api}/device", self._json(lambda _: self.device)),
            Route(f"{api}/checkpoints", self._json(self._checkpoints)),
            Route(f"{api}/compare", self._json(self._compare)),
            Route(f"{api}/stream", self._stream),
            Route(f"{api}/runs/{{run}}", self._json(self._run)),
            Route(f"{api}/runs/{{run}}/series", self._json(self._series)),
            Route(f"{api}/runs/{{run}}/series.csv", lambda r: PlainTextResponse(self.csv[r.path_params["run"]])),
            Route(f"{api}/runs/{{run}}/rollouts", self._json(lambda _: made.rollouts())),
            Route(f"{api}/{{action:path}}", self._action, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _json(self, answer):
        async def respond(request: Request) -> Response:
            if self.logged_out:
                return JSONResponse({"detail": "no key"}, 401)
            try:
                return JSONResponse(answer(request))
            except (KeyError, StopIteration):
                return JSONResponse({"detail": "there is no such run"}, 404)

        return respond

    async def _page(self, request: Request) -> Response:
        if self.logged_out:
            return PlainTextResponse("log in", 401)
        return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": CSP})

    def _state(self, _: Request) -> made.Json:
        playground = {"available": True, "reason": None, "models": [made.MODEL]}
        return {
            "version": "0",
            "home": "/home/me/.local/state/jax_client",
            "host": "box",
            "time": time.time(),
            "serving": True,
            "can_act": True,
            "logs": True,
            "playground": playground,
        }

    def _listed(self, request: Request) -> made.Json:
        shown = [row for row in self.runs if request.query_params["archived"] == "1" or not row["archived"]]
        return {"runs": shown[: int(request.query_params["limit"])], "total": len(shown), "changed": "1"}

    def _series(self, request: Request) -> made.Json:
        self.asked.append(request.url.query)
        return self.series[request.path_params["run"]]

    def _run(self, request: Request) -> made.Json:
        row = next(row for row in self.runs if row["run"] == request.path_params["run"])
        return {
            "row": row,
            "config": {
                "model": row["model"],
                "spec": {"rank": 16, "alpha": 32},
                "script": "rl.py",
                "hostile": made.HOSTILE,
            },
        }

    def _compare(self, request: Request) -> made.Json:
        ids = request.query_params.getlist("runs")
        return {
            "differences": [
                {"field": "rank", "values": {run: 8 * (i + 1) for i, run in enumerate(ids)}},
                {"field": made.HOSTILE, "values": {ids[0]: made.HOSTILE}},
            ]
        }

    def _checkpoints(self, _: Request) -> made.Json:
        shown = [row for row in self.checkpoints if row["path"] not in self.deleted]
        return {
            "checkpoints": shown,
            "total": len(shown),
            "deleted": [{"path": p, "until": t} for p, t in self.deleted.items()],
        }

    async def _action(self, request: Request) -> Response:
        action, body = request.path_params["action"], json.loads(await request.body())
        self.posts.append((action, body))
        name = action.rpartition("/")[2]
        path = str(body.get("path"))
        if name == "delete":
            self.deleted[path] = time.time() + 600
            return JSONResponse({"path": path, "until": self.deleted[path]})
        if name == "undelete":
            self.deleted.pop(path)
        if name == "sample":
            return JSONResponse(made.sampled(body))
        if name == "score":
            return JSONResponse({"tokens": [{"id": i, "text": "", "logprob": -0.5 * (i % 7)} for i in body["ids"]]})
        if name == "export":
            return JSONResponse({"command": f"jax_client checkpoint export {path} --format {body['format']}"})
        if name == "verify":
            return JSONResponse({"verified": {"time": time.time(), "ok": True, "error": None}})
        return JSONResponse({})

    async def _stream(self, request: Request) -> Response:
        if self.logged_out:
            return JSONResponse({"detail": "no key"}, 401)
        queue: asyncio.Queue[tuple[str, made.Json]] = asyncio.Queue()
        self._streams.append(queue)

        async def events() -> AsyncIterator[str]:
            yield ": hello\n\n"
            number = 0
            while True:
                event, data = await queue.get()
                if event == "end":
                    return
                number += 1
                yield f"id: {number}\nevent: {event}\ndata: {json.dumps(data)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    fake = FakeDashboard(port=8123)
    print(fake.url, flush=True)
    step = 812
    while True:
        time.sleep(2)
        step += 1
        fake.step("s1:train:0", step, 1.2)
