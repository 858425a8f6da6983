"""Which routes does the protocol have, and how is each answered?

Failures of a request that was accepted are an answer of its future, with status 200. Nothing is ever answered with a
5xx status: the SDK would ask again at once, for ever. The health check, which the SDK does not make, is the exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import pydantic
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types
from tinker.types import (
    ClientConfigResponse,
    ClientDynamicConfigResponse,
    CopyWeightsRequest,
    FutureRetrieveRequest,
    JoinSamplingSessionRequest,
    SessionHeartbeatRequest,
)

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError
from jax_client.runs.lifecycle.session import SessionClosedError
from jax_client.server.ops import metrics
from jax_client.server.ops.health import Watchdog
from jax_client.server.state.pending import PendingRequest
from jax_client.server.state.server import Server
from jax_client.server.wire import answers, protocol
from jax_client.server.wire.admission import MAX_SAMPLES, RETRY_SECONDS, BusyError, Load
from jax_client.server.wire.answers import Answer
from jax_client.server.wire.bodies import (
    MAX_JSON_BYTES,
    SMALL,
    EncodingError,
    StalledError,
    TooLargeError,
    parse,
    parse_json,
    read_body,
    read_json,
)
from jax_client.server.wire.custom_losses import MAX_GRAPH_BYTES
from jax_client.server.wire.guard import Guard
from jax_client.values import CheckpointKey

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=pydantic.BaseModel)

API = "/api/v1"
# The SDK's own limit is 45 s.
POLL_SECONDS = 30.0
MOST_ASKED = 3
# Of bodies that are a few fields.
SMALL_LIMIT = 2**20
# What only a hosted service has, by the method that asks for it and says why not.
REFUSED = {
    ("GET", "/sessions/{session}/trace_export"): "export_session_trace",
    ("POST", "/sessions/search"): "search_sessions",
    ("GET", "/audit"): "get_audit_log",
    ("GET", "/billing/usage/events"): "get_billing_usage",
    ("GET", "/billing/usage/checkpoints/current"): "get_current_checkpoint_storage_usage",
}
# What this server has beyond the least that the SDK asks of one.
CLIENT_CONFIG = ClientConfigResponse(sample_join_sampling_session=True, custom_loss_server_side=True)
DYNAMIC_CONFIG = ClientDynamicConfigResponse(sample_cancel_enabled=True)

Handler = Callable[[Request], Awaitable[Response]]


def build_app(server: Server, *, api_key: str | None = None, hosts: Any = ()) -> Guard:
    """Return the application: every route, behind one guard.

    Args:
        server: what it serves.
        api_key: that requests must carry, None for none.
        hosts: names under which it may be called.
    """
    all_routes = routes(server)
    return Guard(_Shortcut(all_routes[:MOST_ASKED], Starlette(routes=all_routes)), api_key=api_key, hosts=hosts)


class _Shortcut:
    """ASGI application that answers a few routes itself, and leaves the others, and wrong methods, to the next one.

    Of the time that the event loop spends on a small request, the general router and its layers take a third.
    """

    def __init__(self, few: list[Route], app: Any) -> None:
        self._endpoints: dict[str, Handler] = {route.path: route.endpoint for route in few}
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self._endpoints.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
        else:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)


def routes(server: Server) -> list[Route]:
    """Return every route."""
    rest, watchdog = server.rest, Watchdog()
    promised: dict[str, tuple[Any, Callable[..., PendingRequest]]] = {
        "create_model": (types.CreateModelRequest, server.training.create_model),
        "load_weights": (types.LoadWeightsRequest, server.training.load_weights),
        "optim_step": (types.OptimStepRequest, server.training.optim_step),
        "save_weights": (types.SaveWeightsRequest, server.training.save_weights),
        "save_weights_for_sampler": (types.SaveWeightsForSamplerRequest, server.training.save_weights_for_sampler),
        "save_weights_external": (types.SaveWeightsExternalRequest, server.training.save_weights_external),
    }
    direct: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "client/config": (None, lambda _: CLIENT_CONFIG),
        "client/dynamic_config": (None, lambda _: DYNAMIC_CONFIG),
        "create_session": (types.CreateSessionRequest, server.create_session),
        "session_heartbeat": (SessionHeartbeatRequest, lambda r: _heartbeat(server, r.session_id)),
        "get_info": (types.GetInfoRequest, lambda r: server.training.run(r.model_id).info()),
        "create_sampling_session": (types.CreateSamplingSessionRequest, server.sampling.create_sampling_session),
        "join_sampling_session": (
            JoinSamplingSessionRequest,
            lambda r: {"client_counter": server.sampling.join_sampling_session(r.sampling_session_id)},
        ),
        "cancel_future": (FutureRetrieveRequest, lambda r: server.ledger.get(r.request_id).cancel()),
        "telemetry": (None, lambda _: {"status": "accepted"}),
    }
    checkpoint = "/training_runs/{run}/checkpoints/{kind}/{name}"
    routes = [
        # Those that are asked most, MOST_ASKED of them.
        _route("POST", "/retrieve_future", _retrieve(server)),
        _route("POST", "/asample", _sample(server)),
        _route("POST", "/forward_backward", _forward_backward(server)),
        *(_route("POST", f"/{name}", _promising(server, *entry)) for name, entry in promised.items()),
        *(_route("POST", f"/{name}", _answering(*entry)) for name, entry in direct.items()),
        _route("POST", "/create_custom_loss", _create_custom_loss(server)),
        _route("POST", "/sessions/{session}/finish", _finish(server)),
        _route("POST", "/weights_info", _weights_info(rest)),
        _route("POST", "/copy_weights", _copy_weights(rest)),
        _route("GET", "/healthz", watchdog.check),
        Route("/healthz", _named(watchdog.check), methods=["GET"]),
        Route("/metrics", _named(metrics.show_metrics), methods=["GET"]),
        _route("GET", "/metrics/engines", metrics.list_engines),
        _route("GET", "/metrics/runs", metrics.list_runs(server.live.own.state_dir)),
        _route("GET", "/metrics/runs/{run}", metrics.read_run(server.live.own.state_dir)),
        _route("GET", "/get_server_capabilities", _get(lambda r: rest.get_server_capabilities())),
        _route("GET", "/samplers/{sampler:path}", _get(lambda r: _sampler(server, r.path_params["sampler"]))),
        _route(
            "GET",
            "/training_runs",
            _get(lambda r: rest.list_training_runs(*_page(r, 20), project_id=_text(r, "project_id"))),
        ),
        _route("GET", "/training_runs/{run}", _get(lambda r: rest.get_training_run(r.path_params["run"]))),
        _route("GET", "/training_runs/{run}/checkpoints", _get(lambda r: rest.list_checkpoints(r.path_params["run"]))),
        _route("GET", "/checkpoints", _get(lambda r: rest.list_user_checkpoints(*_page(r, 100)))),
        _route("DELETE", checkpoint, _get(lambda r: rest.delete_checkpoint_from_tinker_path(_path(r)))),
        _route("POST", f"{checkpoint}/publish", _get(lambda r: rest.publish_checkpoint_from_tinker_path(_path(r)))),
        _route("DELETE", f"{checkpoint}/publish", _get(lambda r: rest.unpublish_checkpoint_from_tinker_path(_path(r)))),
        _route("PUT", f"{checkpoint}/ttl", _ttl(rest)),
        _route("GET", f"{checkpoint}/external_weights_urls", _get(lambda r: rest.get_external_weights_urls(_path(r)))),
        _route("GET", "/sessions", _get(lambda r: rest.list_sessions(*_page(r, 20)))),
        _route("GET", "/sessions/{session}", _get(lambda r: rest.get_session(r.path_params["session"]))),
        _route("PUT", "/sessions/{session}/project", _project(rest)),
        *(_route(method, path, _refuse(getattr(rest, name))) for (method, path), name in REFUSED.items()),
    ]
    return routes


def _route(method: str, path: str, handler: Handler) -> Route:
    return Route(API + path, _named(handler), methods=[method])


def _named(handler: Handler) -> Handler:
    """Turn what a handler raises into an answer that the SDK understands."""

    async def named(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException:
            raise
        except JaxClientError as error:
            return JSONResponse({"detail": str(error)}, _status(error), _headers(error))
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return JSONResponse({"detail": "the server failed at this request; its log says why."}, 422)

    return named


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


def _digest(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b"\0" + body).digest()


def _promising(server: Server, model: type[Model], make: Callable[[Model, bytes], PendingRequest]) -> Handler:
    async def handler(request: Request) -> Response:
        with Load(server.admission) as load:
            body = await read_body(request, MAX_JSON_BYTES, load)
            parsed, promise = await run_in_threadpool(accept, body, _digest(request.scope["path"], body))
            load.keep(promise.request_id, promise.answer)
        return JSONResponse({"request_id": promise.request_id, "model_id": getattr(parsed, "model_id", None)})

    def accept(body: bytes, digest: bytes) -> tuple[Model, PendingRequest]:
        try:
            parsed = parse(body, model)
            return parsed, make(parsed, digest)
        except BadRequestError as error:
            server.training.refuse(body, digest, error)
            raise

    return handler


def _answering(model: type[Model] | None, answer: Callable[[Any], Any]) -> Handler:
    async def handler(request: Request) -> Response:
        if model is None:
            await read_body(request, SMALL_LIMIT)
            return _shown(answer(None))
        parsed, _ = await read_json(request, model, limit=SMALL_LIMIT)
        return _shown(await run_in_threadpool(answer, parsed))

    return handler


def _get(answer: Callable[[Request], Any]) -> Handler:
    async def handler(request: Request) -> Response:
        found = answer(request)
        return _shown(await found if hasattr(found, "__await__") else found)

    return handler


def _shown(value: Any) -> Response:
    if value is None:
        return Response(status_code=204)
    content = value.model_dump(mode="json", exclude_none=True) if isinstance(value, pydantic.BaseModel) else value
    return JSONResponse(content)


def _forward_backward(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        with Load(server.admission) as load:
            body = await read_body(request, load=load)
            promise, model_id = await run_in_threadpool(read, body, request.scope["path"])
            load.keep(promise.request_id, promise.answer)
        return JSONResponse({"request_id": promise.request_id, "model_id": model_id})

    def read(body: bytes, path: str) -> tuple[PendingRequest, str]:
        message = protocol.read_forward_backward(body)
        return server.training.forward_backward(message, _digest(path, body)), message.model_id

    return handler


def _create_custom_loss(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        with Load(server.admission) as load:
            body = await read_body(request, MAX_GRAPH_BYTES, load)
            parsed = await run_in_threadpool(parse, body, types.CreateCustomLossRequest)
            digest = _digest(request.scope["path"], body)
            promise = await run_in_threadpool(server.training.create_custom_loss, parsed, digest)
            load.keep(promise.request_id, promise.answer)
        return JSONResponse({"request_id": promise.request_id})

    return handler


def _sample(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        with Load(server.admission) as load:
            parsed, body = await read_json(request, types.SampleRequest, load)
            samples = min(max(parsed.num_samples, 1), MAX_SAMPLES)
            server.admission.check_samples(samples)
            digest = _digest(request.scope["path"], body)
            if len(body) <= SMALL and server.sampling.is_immediate(parsed.sampling_session_id):
                promise = server.sampling.sample(parsed, digest)
            else:
                promise = await run_in_threadpool(server.sampling.sample, parsed, digest)
            load.keep(promise.request_id, promise.answer, samples)
        names = [f"{promise.request_id}:{i}" for i in range(samples)]
        return JSONResponse({"request_id": promise.request_id, "sample_sequence_ids": names})

    return handler


def _retrieve(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        parsed, _ = await read_json(request, FutureRetrieveRequest, limit=SMALL_LIMIT)
        promise = server.ledger.in_memory(parsed.request_id)
        if promise is None:
            promise = await run_in_threadpool(_kept, server, parsed.request_id)
        answer = await _within(promise.answer, POLL_SECONDS)
        if answer is None:
            reason = await run_in_threadpool(server.waiting_reason, promise)
            if not promise.answer.done():
                state = "active" if reason is None else "paused_capacity"
                return JSONResponse({"queue_state": state, "queue_state_reason": reason or "in progress"}, 408)
            answer = promise.answer.result()
        return Response(answer.body, answer.status, media_type=answer.media_type)

    return handler


def _kept(server: Server, request_id: str) -> PendingRequest:
    try:
        return server.ledger.get(request_id)
    except NotFoundError:
        if not server.sampling.may_have_lost(request_id):
            raise
        promise = PendingRequest(request_id, b"", "sample")
        promise.settle(answers.retry_later("the server does not know this request any more; send it again."))
        return promise


async def _within(answer: Future[Answer], seconds: float) -> Answer | None:
    """Return an answer, or None when it is not there in time. A client that stops waiting does not stop the work."""
    if not answer.done():
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake(_: Any) -> None:
            # The loop is closed when the server has stopped without this answer.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(woken.set)

        answer.add_done_callback(wake)
        timer = loop.call_later(seconds, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()
    return answer.result() if answer.done() else None


def _heartbeat(server: Server, session_id: str) -> dict[str, str]:
    server.live.session(session_id).check_open()
    return {"type": "session_heartbeat"}


def _sampler(server: Server, sampler_id: str) -> Any:
    made = server.sampling.sampler(sampler_id)

    async def answer() -> types.GetSamplerResponse:
        sampler = await asyncio.wrap_future(made)
        info = sampler.session.samplers[sampler_id]
        return types.GetSamplerResponse(sampler_id=sampler_id, base_model=info.base_model, model_path=info.model_path)

    return answer()


async def _json(request: Request) -> dict[str, Any]:
    found = parse_json(await read_body(request, SMALL_LIMIT))
    if not isinstance(found, dict):
        raise BadRequestError("the body is no JSON object.")
    return found


def _finish(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        body = await _json(request)
        reason = body.get("reason") or {}
        kind = reason.get("type", "success") if isinstance(reason, dict) else "success"
        detail = body.get("detail")
        session = request.path_params["session"]
        await run_in_threadpool(server.finish_session, session, str(kind), None if detail is None else str(detail))
        return JSONResponse({})

    return handler


def _weights_info(rest: Any) -> Handler:
    async def handler(request: Request) -> Response:
        return _shown(await rest.get_weights_info_by_tinker_path((await _json(request)).get("tinker_path")))

    return handler


def _copy_weights(rest: Any) -> Handler:
    async def handler(request: Request) -> Response:
        parsed, _ = await read_json(request, CopyWeightsRequest)
        project = parsed.destination_project_id
        path = await rest.copy_weights(parsed.source_path, project, ttl_seconds=parsed.ttl_seconds)
        return JSONResponse({"tinker_path": path})

    return handler


def _refuse(method: Callable[[], Any]) -> Handler:
    async def handler(request: Request) -> Response:
        await read_body(request, SMALL_LIMIT)
        return _shown(method())

    return handler


def _ttl(rest: Any) -> Handler:
    async def handler(request: Request) -> Response:
        ttl_seconds = (await _json(request)).get("ttl_seconds")
        return _shown(await rest.set_checkpoint_ttl_from_tinker_path(_path(request), ttl_seconds))

    return handler


def _project(rest: Any) -> Handler:
    async def handler(request: Request) -> Response:
        project = (await _json(request)).get("project_id")
        if not isinstance(project, str):
            raise BadRequestError("project_id is missing.")
        return _shown(await rest.assign_session_project(request.path_params["session"], project))

    return handler


def _path(request: Request) -> str:
    at = request.path_params
    return str(CheckpointKey.of_run(at["run"], f"{at['kind']}/{at['name']}"))


def _page(request: Request, limit: int) -> tuple[int, int]:
    return _number(request, "limit", limit), _number(request, "offset", 0)


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 12):
        raise BadRequestError(f"{name} is {text[:40]!r}; give a number.")
    return int(text)


def _text(request: Request, name: str) -> str | None:
    return request.query_params.get(name)
