"""Which routes show runs? Lists, one run, its curves as JSON and CSV, its rollouts, and how runs differ."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jax_client.errors import BadRequestError, shown
from jax_client.runs.overview.columns import Table
from jax_client.server.dashboard.answers import (
    Handler,
    api_route,
    json_answer,
    object_of,
)
from jax_client.server.dashboard.source import Source, listed
from jax_client.server.queries import cursor, number
from jax_client.server.wire.logins import HEADERS
from jax_client.server.wire.pools import run_work
from jax_client.values import JsonObject

MOST_ROWS, MOST_POINTS, MOST_NAMES, MOST_COMPARED = 1_000, 20_000, 500, 12
_CSV_ROWS = 1_000
# What a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

WriteNote = Callable[[str, JsonObject], JsonObject]


def runs_routes(source: Source, write_note: WriteNote) -> list[Route]:
    """Return the routes.

    Args:
        source: what is shown.
        write_note: `write_note(run_id, fields) -> the run's row` keeps note, tags and archived of a run.
    """
    # Names of log directories have slashes; the longer paths first.
    run = "/runs/{run:path}"
    return [
        api_route("GET", "/runs", _list_runs(source)),
        api_route("GET", f"{run}/series", _series(source)),
        api_route("GET", f"{run}/series.csv", _series_csv(source)),
        api_route("GET", f"{run}/rollouts", _rollouts(source)),
        api_route("POST", f"{run}/note", _note(write_note)),
        api_route("GET", run, _one_run(source)),
        api_route("GET", "/compare", _compare(source)),
    ]


def _list_runs(source: Source) -> Handler:
    def rows(archived: bool) -> list[JsonObject]:
        found = [listed(row) for row in source.runs()]
        return found if archived else [row for row in found if not row.get("archived")]

    async def handler(request: Request) -> Response:
        limit, offset = number(request, "limit", 200, 1, MOST_ROWS), number(request, "offset", 0, 0, 2**31)
        archived = number(request, "archived", 0, 0, 1) == 1
        # Before the rows: what changes meanwhile is seen the next time.
        changed = await run_work(source.changed)
        found = await run_work(rows, archived)
        page = found[offset : offset + limit]
        return json_answer({"runs": page, "total": len(found), "changed": changed})

    return handler


def _one_run(source: Source) -> Handler:
    def work(run_id: str) -> JsonObject:
        return {"row": source.run(run_id).to_json(), "config": source.config(run_id)}

    async def handler(request: Request) -> Response:
        return json_answer(await run_work(work, request.path_params["run"]))

    return handler


def _series(source: Source) -> Handler:
    async def handler(request: Request) -> Response:
        run, names = request.path_params["run"], _names(request)
        points, since = number(request, "points", 2_000, 2, MOST_POINTS), cursor(request.query_params.get("since"))
        return json_answer(await run_work(lambda: source.series(run, names, points=points, since=since).to_json()))

    return handler


def _names(request: Request) -> list[str] | None:
    # A name may have commas: each is a parameter of its own.
    names = request.query_params.getlist("names")
    if len(names) > MOST_NAMES:
        raise BadRequestError(f"names is given {len(names)} times; the limit is {MOST_NAMES}.")
    return names or None


def _series_csv(source: Source) -> Handler:
    async def handler(request: Request) -> Response:
        run, names = request.path_params["run"], _names(request)
        found = await run_work(source.table, run, names)
        attached = {**HEADERS, "Content-Disposition": 'attachment; filename="series.csv"'}
        # A plain iterator: starlette asks it on a thread.
        return StreamingResponse(csv_of(found), media_type="text/csv; charset=utf-8", headers=attached)

    return handler


def csv_of(table: Table) -> Iterator[bytes]:
    """Yield a table as the pieces of a CSV file: a row for each point, a column for each name."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["kind", "step", "time", "tokens", *(_harmless(name) for name in table.names)])
    for count, row in enumerate(table.rows, 1):
        writer.writerow([_harmless(row.kind), row.step, row.time, row.tokens, *row.values])
        if count % _CSV_ROWS == 0:
            yield text.getvalue().encode("utf-8", "replace")
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode("utf-8", "replace")


def _harmless(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name


def _rollouts(source: Source) -> Handler:
    async def handler(request: Request) -> Response:
        run = request.path_params["run"]
        offset, limit = number(request, "offset", 0, 0, 2**31), number(request, "limit", 20, 1, 200)
        return json_answer(await run_work(lambda: source.rollouts(run, offset=offset, limit=limit)))

    return handler


def _note(write_note: WriteNote) -> Handler:
    async def handler(request: Request) -> Response:
        fields = await object_of(request)
        known = {"note", "tags", "archived"}
        if unknown := sorted(set(fields) - known):
            raise BadRequestError(f"{shown(unknown[0])} is no field of a note; give note, tags or archived.")
        return json_answer({"row": await run_work(write_note, request.path_params["run"], fields)})

    return handler


def _compare(source: Source) -> Handler:
    def work(runs: list[str]) -> JsonObject:
        return {"differences": differences({run: source.config(run) for run in runs})}

    async def handler(request: Request) -> Response:
        runs = list(dict.fromkeys(request.query_params.getlist("runs")))
        if not 2 <= len(runs) <= MOST_COMPARED:
            raise BadRequestError(
                f"runs names {len(runs)} runs; give 2 to {MOST_COMPARED}, each as a runs= of its own."
            )
        return json_answer(await run_work(work, runs))

    return handler


def differences(configs: Mapping[str, JsonObject]) -> list[JsonObject]:
    """Return the fields in which configurations differ, each with every run's value, null for one without it."""
    flat = {run: dict(_flat("", config)) for run, config in configs.items()}
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    found = [(field, {run: values.get(field) for run, values in flat.items()}) for field in fields]
    return [
        {"field": field, "values": values}
        for field, values in found
        if any(value != next(iter(values.values())) for value in values.values())
    ]


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value
