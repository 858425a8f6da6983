"""Where are a server's metrics? JSON is under /api/v1/metrics; Prometheus reads the newest values at /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jax_client.errors import NotFoundError
from jax_client.metrics.store import FILE_NAME, Cursor, Event, Found, MetricsStore, Point
from jax_client.metrics.summary import OF_ENGINES
from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.runs.listings import Listings
from jax_client.runs.results import run_metrics
from jax_client.server.ops import families
from jax_client.server.ops.prometheus import CONTENT_TYPE, render
from jax_client.server.queries import cursor, number
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.pools import run_work

Handler = Callable[[Request], Awaitable[Response]]

MOST_ROWS = 10_000


def list_runs(state_dir: Path, listings: Listings) -> Handler:
    """Return the handler of GET metrics/runs: the runs that have points, the newest first.

    Args:
        state_dir: where the metrics are.
        listings: know which runs may be shown.
    """
    store = MetricsStore(state_dir / FILE_NAME)

    async def handler(request: Request) -> Response:
        limit, offset = number(request, "limit", 100, 1, MOST_ROWS), number(request, "offset", 0, 0, 2**31)
        runs = await run_work(lambda: _shown_runs(store, listings))
        live = {run.run_id for run in run_metrics.live()}
        shown = [run | {"live": run["run"] in live} for run in runs[offset : offset + limit]]
        return JSONResponse({"runs": shown, "total": len(runs)})

    return handler


def _shown_runs(store: MetricsStore, listings: Listings) -> list[dict[str, Any]]:
    runs, own = store.runs(), listings.run_ids()
    return runs if own is None else [run for run in runs if run["run"] in own]


def read_run(state_dir: Path, listings: Listings, *, whole: bool = True) -> Handler:
    """Return the handler of GET metrics/runs/RUN: points and events after `since`; arguments as of `list_runs`.

    The query's `limit` bounds each of the two. With `points=N` the answer spans the whole run, with every kind thinned
    out to N rows. Without `whole`, what the run's engine does is left out: it is of all keys together.
    """
    store = MetricsStore(state_dir / FILE_NAME)

    async def handler(request: Request) -> Response:
        run, since = request.path_params["run"], _cursor(request)
        most, limit = number(request, "points", 0, 2, MOST_ROWS), number(request, "limit", 1_000, 1, MOST_ROWS)
        rows = Found(cursor=since)
        known = await run_work(listings.has_run, run)
        if known and most:
            rows = await run_work(store.overview, run, since, most=most)
        elif known:
            rows = await run_work(store.read, run, since, limit=limit)
        if not known or since == Cursor() == rows.cursor:
            raise NotFoundError(f"nothing was recorded of a run {run!r}; metrics/runs lists those that have points.")
        left_out = () if whole else OF_ENGINES
        return JSONResponse(
            {
                "run": run,
                "live": any(each.run_id == run for each in run_metrics.live()),
                "points": [_shown(point) for point in rows.points if point.kind not in left_out],
                "events": [_shown(event) for event in rows.events if event.kind not in left_out],
                "next": f"{rows.cursor.point}-{rows.cursor.event}",
                "more": rows.more,
            }
        )

    return handler


def list_engines(models: BaseModels, *, whole: bool = True) -> Handler:
    """Return the handler of GET metrics/engines: the description and the health of each loaded engine.

    Without `whole` it refuses: what engines say is of all keys together.
    """

    def describe() -> list[dict[str, Any]]:
        monitors = [model.engine.monitor for model in models.loaded()]
        return [monitor.describe() | {"health": monitor.health()} for monitor in monitors]

    async def handler(request: Request) -> Response:
        if not whole:
            return JSONResponse({"detail": "this is for a key that the server's key file marks admin."}, 403)
        return JSONResponse({"engines": await run_work(describe)})

    return handler


def show_metrics(
    models: BaseModels, accounts: Mapping[str, Account], is_own: Callable[[str], bool] | None = None
) -> Handler:
    """Return the handler of GET /metrics, which Prometheus reads.

    Args:
        models: that are loaded.
        accounts: by the names of their keys.
        is_own: `is_own(run_id) -> bool` of the runs that are shown, beside these accounts; None shows everything.
    """

    def show() -> str:
        if is_own is None:
            return render(families.all_families(models, accounts))
        return render(families.own_families(models, accounts, is_own))

    async def handler(request: Request) -> Response:
        text = await run_work(show)
        return Response(text, media_type=CONTENT_TYPE)

    return handler


def _shown(row: Point | Event) -> dict[str, Any]:
    # Not asdict, which copies every metric.
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name not in ("run", "number")}


def _cursor(request: Request) -> Cursor:
    text = cursor(request.query_params.get("since"))
    point, event = (0, 0) if text is None else map(int, text.split("-")[-2:])
    return Cursor(point=point, event=event)
