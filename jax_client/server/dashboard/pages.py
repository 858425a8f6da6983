"""Which files make up the page? Those of the folder `static`, in memory; and tables for browsers without scripts."""

from __future__ import annotations

import gzip
import hashlib
import html
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jax_client.errors import NotFoundError, shown
from jax_client.server.dashboard.answers import Handler, page_route
from jax_client.server.dashboard.source import Source
from jax_client.server.wire.logins import HEADERS
from jax_client.server.wire.pools import run_work
from jax_client.values import JsonObject

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}
PLAIN = "text/plain; charset=utf-8"
INDEX = "index.html"
MOST_IN_TABLES = 500
# A browser asks again each time, and is told that it has the newest.
_STATIC_HEADERS = {**HEADERS, "Cache-Control": "no-cache"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticFile:
    """A file of the page, as it is sent."""

    data: bytes
    zipped: bytes
    tag: str
    media_type: str


@cache
def static_files() -> dict[str, StaticFile]:
    """Return the page's files by their paths. Only these are served, whatever a request names."""
    root = resources.files("jax_client.server.dashboard") / "static"
    return dict(_files(root, ""))


def _files(folder: Traversable, prefix: str) -> Iterable[tuple[str, StaticFile]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _files(each, f"{prefix}{each.name}/")
            continue
        data = each.read_bytes()
        media_type = TYPES.get(each.name.rpartition(".")[2], PLAIN)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        zipped = gzip.compress(data, 9, mtime=0)
        yield f"{prefix}{each.name}", StaticFile(data=data, zipped=zipped, tag=tag, media_type=media_type)


def page_routes(source: Source) -> list[Route]:
    """Return the routes of the page itself."""
    return [
        page_route("GET", "/", _index),
        page_route("GET", "/dashboard/static/{name:path}", _static),
        page_route("GET", "/dashboard/tables", _tables(source)),
    ]


async def _index(request: Request) -> Response:
    return _file_answer(request, INDEX)


async def _static(request: Request) -> Response:
    return _file_answer(request, request.path_params["name"])


def _file_answer(request: Request, name: str) -> Response:
    file = static_files().get(name)
    if file is None:
        raise NotFoundError(f"the page has no file {shown(name[:100])}.")
    headers = {**_STATIC_HEADERS, "ETag": file.tag, "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", "") and len(file.zipped) < len(file.data):
        return Response(file.zipped, headers={**headers, "Content-Encoding": "gzip"}, media_type=file.media_type)
    return Response(file.data, headers=headers, media_type=file.media_type)


_RUN_COLUMNS = (
    *("run", "name", "state", "reason", "step", "loss", "reward", "tokens", "model", "rank", "updated"),
    *("last_checkpoint", "note"),
)
_CHECKPOINT_COLUMNS = ("path", "kind", "step", "loss", "reward", "size_bytes", "created", "expires_at", "resume")
_TIMES = ("updated", "created", "expires_at")


def _tables(source: Source) -> Handler:
    def work() -> str:
        runs = [row.to_json() for row in source.runs()[:MOST_IN_TABLES]]
        checkpoints = [row.to_json() for row in source.checkpoints()[:MOST_IN_TABLES]]
        return _page(
            [
                "<h1>jax_client</h1><p><a href='/'>The page with curves</a> needs a browser with scripts.</p>",
                _table("Runs", _RUN_COLUMNS, runs),
                _table("Checkpoints", _CHECKPOINT_COLUMNS, checkpoints),
            ]
        )

    async def handler(request: Request) -> Response:
        text = await run_work(work)
        # A name may hold half of a character, which no encoding has.
        return HTMLResponse(text.encode("utf-8", "replace"), headers=HEADERS)

    return handler


def _page(parts: Iterable[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>jax_client: tables</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _table(title: str, columns: Sequence[str], rows: Sequence[JsonObject]) -> str:
    head = "".join(f"<th scope='col'>{column.replace('_', ' ')}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(column, row)}</td>' for column in columns)}</tr>\n" for row in rows)
    return f"<h2>{title}</h2><table border='1'><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(column: str, row: JsonObject) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column in _TIMES and isinstance(value, int | float):
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value))
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value)[:500])
