"""What is a page made of? A `Board`: what it shows, what it changes, its playground and its stream, for one owner."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError
from jax_client.server.dashboard.answers import api_route, json_answer, page_route
from jax_client.server.dashboard.checkpoint_routes import Checkpoints, Verify
from jax_client.server.dashboard.device import Devices
from jax_client.server.dashboard.pages import page_routes
from jax_client.server.dashboard.playground.routes import Playground
from jax_client.server.dashboard.runs_routes import WriteNote, runs_routes
from jax_client.server.dashboard.source import Source
from jax_client.server.dashboard.stream import stream_route
from jax_client.server.dashboard.watching import Watch, Watcher
from jax_client.server.wire.pools import run_work
from jax_client.values import JsonObject


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """The parts of a page.

    Attributes:
        home: the state directory.
        source: what is shown of it.
        store: its checkpoints, which are changed; of the owner.
        verify, write_note: what keeps the result of a check, and a note.
        playground: to sample with.
        watcher: looks for changes, for all pages of the process.
        engines: what the engines of this process say; None where the viewer may see none of it.
        serving: whether this process serves the SDK too.
        logs: whether directories of logs are among the runs.
    """

    home: Path
    source: Source
    store: CheckpointStore
    verify: Verify
    write_note: WriteNote
    playground: Playground
    watcher: Watcher
    engines: Callable[[], Sequence[JsonObject]] | None
    serving: bool
    logs: bool

    def routes(self) -> list[Route]:
        """Return every route of the page."""
        devices = Devices(self.source, self.engines)
        checkpoints = Checkpoints(self.source, self.store, self.home, self.verify)

        async def state(request: Request) -> Response:
            return json_answer(await run_work(self._state))

        async def device(request: Request) -> Response:
            return json_answer(await run_work(devices.shown))

        return [
            *page_routes(self.source),
            api_route("GET", "/state", state),
            api_route("GET", "/device", device),
            *runs_routes(self.source, self.write_note),
            *checkpoints.routes(),
            *self.playground.routes(),
            stream_route(self.watcher, Watch(self.source, devices)),
            page_route("GET", "/dashboard/{rest:path}", _nothing),
        ]

    def _state(self) -> JsonObject:
        return {
            "version": metadata.version("jax_client"),
            "home": str(self.home),
            "host": socket.gethostname(),
            "time": time.time(),
            "serving": self.serving,
            "can_act": os.access(self.home, os.W_OK),
            "logs": self.logs,
            "playground": self.playground.describe(),
        }


async def _nothing(request: Request) -> Response:
    raise NotFoundError("the page has nothing there.")
