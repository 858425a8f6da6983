"""Which routes list and change what is on disk: runs, checkpoints, sessions?"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tinker import types
from tinker.types import CopyWeightsRequest

from jax_client.errors import BadRequestError
from jax_client.runs import checks
from jax_client.runs.listings import Listings, check_page, destination_project, not_served
from jax_client.server.routes.handler import (
    SMALL_LIMIT,
    checked_files,
    looked_up,
    route,
    show,
    unparsed,
    with_object,
)
from jax_client.server.wire.bodies import read_json
from jax_client.values import CheckpointKey

# What only a hosted service has, by the method that asks for it.
_REFUSED = {
    ("GET", "/sessions/{session}/trace_export"): "export_session_trace",
    ("POST", "/sessions/search"): "search_sessions",
    ("GET", "/audit"): "get_audit_log",
    ("GET", "/billing/usage/events"): "get_billing_usage",
    ("GET", "/billing/usage/checkpoints/current"): "get_current_checkpoint_storage_usage",
}
# Entries of a listing's page.
MAX_PAGE = 10_000
_CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"


def listing_routes(listings: Listings) -> list[Route]:
    """Return the routes."""
    return [
        route("GET", "/get_server_capabilities", looked_up(lambda _: listings.capabilities())),
        *_run_routes(listings),
        *_checkpoint_routes(listings),
        *_session_routes(listings),
        *(route(method, path, unparsed(partial(_refuse, name))) for (method, path), name in _REFUSED.items()),
    ]


def _run_routes(listings: Listings) -> list[Route]:
    def runs(request: Request) -> types.TrainingRunsResponse:
        return listings.training_runs(*_page(request, 20), request.query_params.get("project_id"))

    return [
        route("GET", "/training_runs", looked_up(runs)),
        route("GET", "/training_runs/{run}", looked_up(lambda r: listings.training_run(r.path_params["run"]))),
        route(
            "GET",
            "/training_runs/{run}/checkpoints",
            looked_up(lambda r: listings.checkpoints(r.path_params["run"])),
        ),
    ]


def _checkpoint_routes(listings: Listings) -> list[Route]:
    def info(request: Request, fields: dict[str, Any]) -> types.WeightsInfoResponse:
        return listings.weights_info(CheckpointKey.parse(fields.get("tinker_path")))

    async def copy(request: Request) -> Response:
        asked, _ = await read_json(request, CopyWeightsRequest, limit=SMALL_LIMIT)
        project = destination_project(asked.destination_project_id)
        checks.refuse_access_token(asked.weights_access_token, listings.owner)
        source, ttl = CheckpointKey.parse(asked.source_path), checks.ttl(asked.ttl_seconds)
        return show({"tinker_path": await checked_files(request, lambda: listings.copy(source, project, ttl))})

    def set_ttl(request: Request, fields: dict[str, Any]) -> None:
        listings.set_ttl(_key(request), checks.ttl(fields.get("ttl_seconds")))

    return [
        route("GET", "/checkpoints", looked_up(lambda r: listings.all_checkpoints(*_page(r, 100)))),
        route("POST", "/weights_info", with_object(info)),
        route("POST", "/copy_weights", copy),
        route("DELETE", _CHECKPOINT, looked_up(lambda r: listings.delete(_key(r)))),
        route("POST", f"{_CHECKPOINT}/publish", looked_up(lambda r: listings.set_public(_key(r), True))),
        route("DELETE", f"{_CHECKPOINT}/publish", looked_up(lambda r: listings.set_public(_key(r), False))),
        route("PUT", f"{_CHECKPOINT}/ttl", with_object(set_ttl)),
    ]


def _session_routes(listings: Listings) -> list[Route]:
    def assign(request: Request, fields: dict[str, Any]) -> None:
        project = fields.get("project_id")
        if not isinstance(project, str):
            raise BadRequestError("project_id is missing.")
        listings.assign_project(request.path_params["session"], project)

    return [
        route("GET", "/sessions", looked_up(lambda r: listings.sessions(*_page(r, 20)))),
        route("GET", "/sessions/{session}", looked_up(lambda r: listings.session(r.path_params["session"]))),
        route("PUT", "/sessions/{session}/project", with_object(assign)),
    ]


def _refuse(method: str) -> NoReturn:
    raise not_served(method)


def _key(request: Request) -> CheckpointKey:
    names = request.path_params
    return CheckpointKey.of_run(names["run"], f"{names['kind']}/{names['name']}")


def _page(request: Request, default_limit: int) -> tuple[int, int]:
    limit, offset = _number(request, "limit", default_limit), _number(request, "offset", 0)
    check_page(limit, offset)
    if limit > MAX_PAGE:
        raise BadRequestError(
            f"limit is {limit:,}; a page has at most {MAX_PAGE:,} entries, offset gives the next ones."
        )
    return limit, offset


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,11}", text):
        raise BadRequestError(f"{name} is {text[:40]!r}; give a number.")
    return int(text)
