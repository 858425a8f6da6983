"""What do all handlers share? How a route is made, how an error becomes a status, and how a value becomes a response.

No handler answers with a 5xx status: the SDK would send the request again at once, for ever.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError
from jax_client.runs.lifecycle.session import SessionClosedError
from jax_client.server.wire.accounts import RETRY_SECONDS, BusyError
from jax_client.server.wire.admission import load_of
from jax_client.server.wire.bodies import (
    EncodingError,
    StalledError,
    TooLargeError,
    parse_json,
    read_body,
    read_json,
)
from jax_client.server.wire.pools import run_cheap, run_on_files, run_work

logger = logging.getLogger(__name__)

API = "/api/v1"
# The limit of bodies that are a few fields, bytes.
SMALL_LIMIT = 2**20

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
Model = TypeVar("Model", bound=pydantic.BaseModel)
# What a handler can show: one of the SDK's responses, plain JSON, or nothing.
Shown = pydantic.BaseModel | dict[str, Any] | None


def route(method: str, path: str, handler: Handler) -> Route:
    """Return the route of one path below /api/v1."""
    return Route(API + path, with_errors(handler), methods=[method])


def with_errors(handler: Handler) -> Handler:
    """Return a handler that turns exceptions into responses that the SDK understands."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException:
            raise
        except JaxClientError as error:
            # Futures on its way still hold the error, and its frames the body: they would wait for the collector.
            error.__traceback__ = None
            if isinstance(error, BusyError):
                load_of(request).account.note(refused=1)
            return JSONResponse({"detail": str(error)}, _status(error), _headers(error))
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return JSONResponse({"detail": "the server failed at this request; its log says why."}, 422)

    return guarded


def _headers(error: JaxClientError) -> dict[str, str] | None:
    if isinstance(error, BusyError):
        return {"Retry-After": str(RETRY_SECONDS)}
    # The rest of the body is not read.
    return {"Connection": "close"} if isinstance(error, StalledError | TooLargeError) else None


def _status(error: JaxClientError) -> int:
    for kind, status in (
        (BusyError, 429),
        (StalledError, 408),
        (TooLargeError, 413),
        (EncodingError, 415),
        (SessionClosedError, 410),
        (NotFoundError, 404),
        (BadRequestError, 400),
    ):
        if isinstance(error, kind):
            return status
    return 400


def parsed(
    model: type[Model], answer: Callable[[Model], Shown], limit: int = SMALL_LIMIT, *, cheap: bool = False
) -> Handler:
    """Return the handler that reads a JSON body as `model` and shows `answer(request)`, computed on a thread.

    Args:
        model: of the body.
        answer: waits for nothing but the disk.
        limit: of the body, bytes.
        cheap: whether it takes milliseconds; others never hold such a call up.
    """
    run = run_cheap if cheap else run_work

    async def handler(request: Request) -> Response:
        asked, _ = await read_json(request, model, limit=limit)
        return show(await run(answer, asked))

    return handler


def unparsed(answer: Callable[[], Shown]) -> Handler:
    """Return the handler that reads a body, ignores it, and shows `answer()`."""

    async def handler(request: Request) -> Response:
        await read_body(request, SMALL_LIMIT)
        return show(answer())

    return handler


def looked_up(answer: Callable[[Request], Shown]) -> Handler:
    """Return the handler of a request without a body, which shows `answer(request)`, computed on a thread."""

    async def handler(request: Request) -> Response:
        return show(await run_work(answer, request))

    return handler


async def checked_files(request: Request, work: Callable[[], T]) -> T:
    """Return the result of `work()`, which reads every byte of a checkpoint and counts meanwhile. Raises BusyError."""
    load_of(request).take(file_checks=1)
    return await run_on_files(work)


def with_object(answer: Callable[[Request, dict[str, Any]], Shown], *, cheap: bool = False) -> Handler:
    """Return the handler that reads a JSON object and shows `answer(request, object)`; see `parsed`."""
    run = run_cheap if cheap else run_work

    async def handler(request: Request) -> Response:
        fields = parse_json(await read_body(request, SMALL_LIMIT))
        if not isinstance(fields, dict):
            raise BadRequestError("the body is no JSON object.")
        return show(await run(answer, request, fields))

    return handler


def show(value: Shown) -> Response:
    """Return the response that shows a value; 204 for None."""
    if value is None:
        return Response(status_code=204)
    content = value.model_dump(mode="json", exclude_none=True) if isinstance(value, pydantic.BaseModel) else value
    return JSONResponse(content)


def digest(request: Request, body: bytes) -> bytes:
    """Return the hash of a request's path and body, which tells a repetition from another request."""
    found = hashlib.sha256(request.scope["path"].encode() + b"\0")
    found.update(body)
    return found.digest()
