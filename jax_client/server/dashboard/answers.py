"""How do the page's routes read a request and answer it? In JSON, with the page's headers, and never with a 5xx."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, shown
from jax_client.server.wire.accounts import RETRY_SECONDS, BusyError
from jax_client.server.wire.bodies import EncodingError, StalledError, TooLargeError, parse_json, read_body
from jax_client.server.wire.logins import HEADERS
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

API = "/dashboard/api"
MAX_BODY = 2**20
_STATUSES: tuple[tuple[type[JaxClientError], int], ...] = (
    (BusyError, 429),
    (StalledError, 408),
    (TooLargeError, 413),
    (EncodingError, 415),
    (NotFoundError, 404),
)


def api_route(method: str, path: str, handler: Handler) -> Route:
    """Return the route of a path below /dashboard/api."""
    return page_route(method, API + path, handler)


def page_route(method: str, path: str, handler: Handler) -> Route:
    """Return a route whose errors are answers: {"detail": words}."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except JaxClientError as error:
            error.__traceback__ = None
            status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 400)
            more = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else {}
            return json_answer({"detail": str(error)}, status, more)
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return json_answer({"detail": "the server failed at this request; its log says why."}, 422)

    return Route(path, guarded, methods=[method])


def json_answer(value: object, status: int = 200, more: dict[str, str] | None = None) -> Response:
    """Return a value as an answer in JSON."""
    return Response(encoded(value), status, {**HEADERS, **(more or {})}, "application/json")


def encoded(value: object) -> bytes:
    """Return a value as JSON; a number that is not finite, which JSON has not, is null."""
    try:
        return _dumped(value)
    except ValueError:
        return _dumped(_finite(value))


def _dumped(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


async def object_of(request: Request) -> JsonObject:
    """Read a body that is a JSON object.

    Raises:
        BadRequestError: it is none, or is not sent as application/json. A form of another site's page cannot be.
    """
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != "application/json":
        raise BadRequestError(f"content-type is {shown(sent)}; send application/json.")
    fields = parse_json(await read_body(request, MAX_BODY))
    if not isinstance(fields, dict):
        raise BadRequestError("the body is no JSON object.")
    return fields


def text_of(fields: JsonObject, name: str) -> str:
    """Return a text of a body. Raises BadRequestError."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadRequestError(f"{name} is {shown(value)}; give a text.")
    return value
