"""How do the tests get a page without training anything? A source that says what it is told, served on a port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError
from jax_client.runs.overview.columns import Table, TableRow
from jax_client.server import LOOPBACK
from jax_client.server.dashboard.board import Board
from jax_client.server.dashboard.playground.routes import Playground
from jax_client.server.dashboard.playground.samplers import Samplers
from jax_client.server.dashboard.watching import Watcher
from jax_client.server.public_url import PublicUrl
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.connections import http_server
from jax_client.server.wire.guard import Guard

KEY = "tml-page"
LIMIT = 30.0
HOSTILE = "<script>alert(1)</script>"


@dataclass
class Json:
    fields: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.fields


def row(run: str, **more: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("name", "reason", "step", "loss", "reward", "model", "updated", "note", "last_checkpoint"))
    return {"run": run, "source": "run", "state": "done", "archived": False, "tags": [], **blank, **more}


class FakeSource:
    """Runs, series and configurations as a test sets them; `version` is what `changed` returns."""

    def __init__(self, store: CheckpointStore | None = None) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.points: dict[str, list[tuple[int, float, float]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.device_points: dict[str, dict[str, Any]] = {}
        self.version = 0
        self.reads = 0
        self.store = store

    def set(self, run: str, **fields: Any) -> None:
        self.rows[run] = row(run, **fields)
        self.version += 1

    def add_point(self, run: str, step: int, value: float) -> None:
        self.points.setdefault(run, []).append((step, 100.0 + step, value))
        self.version += 1

    def runs(self) -> list[Json]:
        self.reads += 1
        return [Json(dict(each)) for each in self.rows.values()]

    def run(self, run_id: str) -> Json:
        if run_id not in self.rows:
            raise NotFoundError(f"there is no run {run_id!r}.")
        return Json(self.rows[run_id])

    def config(self, run_id: str) -> dict[str, Any]:
        self.run(run_id)
        return self.configs.get(run_id, {})

    def series(self, run_id: str, names: Collection[str] | None, *, points: int, since: str | None = None) -> Json:
        self.run(run_id)
        found = self.points.get(run_id, [])
        first = int(since.split("-")[-2]) if since else 0
        new = found[first:]
        columns = {
            "kind": "step",
            "step": [step for step, _, _ in new],
            "time": [at for _, at, _ in new],
            "tokens": [8 * step for step, _, _ in new],
            "value": [value for _, _, value in new],
        }
        series = {name: columns for name in ("loss:mean", f"=1+1 {HOSTILE}") if new and (not names or name in names)}
        return Json(
            {
                "run": run_id,
                "series": series,
                "names": list(series),
                "events": self.events,
                "next": f"{len(found)}-0",
                "live": True,
            }
        )

    def table(self, run_id: str, names: Collection[str] | None, *, without: Collection[str] = ()) -> Table:
        found = self.series(run_id, names, points=0).fields["series"]
        rows = [
            TableRow(kind="step", step=step, time=at, tokens=8 * step, values=[value] * len(found))
            for step, at, value in self.points.get(run_id, [])
        ]
        return Table(names=list(found), rows=iter(rows))

    def device(self, run_id: str, *, most: int) -> dict[str, Any]:
        self.run(run_id)
        compiles = [{name: each[name] for name in ("step", "time", "details")} for each in self.events]
        return {"point": self.device_points.get(run_id), "compiles": compiles[-most:]}

    def checkpoints(self, run_id: str | None = None) -> list[Json]:
        records = [] if self.store is None else self.store.list(run_id)
        return [
            Json(
                {
                    "path": str(record.key),
                    "run": record.run_id,
                    "kind": record.kind,
                    "step": record.step,
                    "created": record.created,
                    "expires_at": record.expires_at,
                    "size_bytes": record.size_bytes,
                }
            )
            for record in reversed(records)
        ]

    def rollouts(self, run_id: str, *, offset: int, limit: int) -> dict[str, Any]:
        self.run(run_id)
        groups = [{"step": step, "prompt": HOSTILE, "samples": []} for step in range(5)]
        return {"groups": groups[offset : offset + limit], "total": len(groups)}

    def changed(self) -> str:
        return str(self.version)

    def write_note(self, run: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.run(run)
        self.rows[run] |= fields
        self.version += 1
        return self.rows[run]


def no_session() -> Any:
    raise RuntimeError("the accelerator is not there")


@dataclass
class Parts:
    """What a page is made of, for a test to change."""

    home: Path
    samplers: Samplers = field(default_factory=lambda: Samplers(no_session))
    models: list[str] = field(default_factory=list)
    engines: Callable[[], list[dict[str, Any]]] | None = list

    def __post_init__(self) -> None:
        self.store = CheckpointStore(self.home)
        self.source = FakeSource(self.store)
        self.watcher = Watcher()

    def board(self) -> Board:
        def verify(key: Any) -> dict[str, Any]:
            self.store.verify(key)
            return {"time": 1.0, "ok": True, "error": None}

        return Board(
            home=self.home,
            source=self.source,
            store=self.store,
            verify=verify,
            write_note=self.source.write_note,
            playground=Playground(self.samplers, lambda: self.models, lambda name: name),
            watcher=self.watcher,
            engines=self.engines,
            serving=False,
            logs=False,
        )

    def guard(self, api_key: str | None = KEY, public: PublicUrl | None = None) -> Guard:
        account = Account()
        app = Starlette(routes=self.board().routes())
        return Guard(app, api_key=api_key, hosts=LOOPBACK, account=lambda: account, pages=True, public=public)


class Page:
    """An ASGI application on a free port of this process."""

    def __init__(self, app: Any) -> None:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = http_server(app)
        self.http.config.timeout_graceful_shutdown = 1
        self._thread = threading.Thread(target=self.http.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self.http.started:
            time.sleep(0.01)

    def client(self, key: str | None = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=LIMIT, headers={} if key is None else {"X-API-Key": key})

    def stop(self) -> None:
        self.http.should_exit = True
        self._thread.join(30)


def frames(answer: httpx.Response) -> Iterator[dict[str, str]]:
    """Yield the events of a stream as their fields; comments and `retry` are left out."""
    found: dict[str, str] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line == "":
            if "event" in found:
                yield found
            found = {}
        elif name:
            found[name] = value
