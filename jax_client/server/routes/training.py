"""Which routes train? Each accepts one request, in whose future the answer will be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pydantic
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types

from jax_client.errors import BadRequestError
from jax_client.server.routes.handler import SMALL_LIMIT, Handler, digest, route, show
from jax_client.server.state.pending import PendingRequest
from jax_client.server.state.server import Server
from jax_client.server.wire import protocol
from jax_client.server.wire.admission import load_of
from jax_client.server.wire.bodies import parse, read_body, read_json
from jax_client.server.wire.custom_losses import MAX_GRAPH_BYTES
from jax_client.server.wire.pools import run_work

Model = TypeVar("Model", bound=pydantic.BaseModel)


def forward_backward_route(server: Server) -> Route:
    """Return the route of forward and backward passes, the one whose bodies are protobuf."""

    async def handler(request: Request) -> Response:
        load = load_of(request)
        body = await read_body(request)
        load.take(training_requests=1)
        pending, model_id = await run_work(accept, request, body)
        load.keep(pending.request_id, pending.answer)
        return JSONResponse({"request_id": pending.request_id, "model_id": model_id})

    def accept(request: Request, body: bytes) -> tuple[PendingRequest, str]:
        message = protocol.read_forward_backward(body)
        return server.training.forward_backward(message, digest(request, body)), message.model_id

    return route("POST", "/forward_backward", handler)


def training_routes(server: Server) -> list[Route]:
    """Return the other routes."""
    training = server.training
    return [
        route("POST", "/create_model", _accepting(server, types.CreateModelRequest, training.create_model)),
        route("POST", "/load_weights", _accepting(server, types.LoadWeightsRequest, training.load_weights)),
        route("POST", "/optim_step", _accepting(server, types.OptimStepRequest, training.optim_step)),
        route("POST", "/save_weights", _accepting(server, types.SaveWeightsRequest, training.save_weights)),
        route(
            "POST",
            "/save_weights_for_sampler",
            _accepting(server, types.SaveWeightsForSamplerRequest, training.save_weights_for_sampler),
        ),
        route(
            "POST",
            "/save_weights_external",
            _accepting(server, types.SaveWeightsExternalRequest, training.save_weights_external),
        ),
        route("POST", "/create_custom_loss", _create_custom_loss(server)),
        route("POST", "/get_info", _get_info(server)),
    ]


def _accepting(server: Server, model: type[Model], accept: Callable[[Model, bytes], PendingRequest]) -> Handler:
    """Return the handler that reads a JSON body as `model` and gives the id of `accept(request, digest)`."""

    async def handler(request: Request) -> Response:
        load = load_of(request)
        body = await read_body(request, SMALL_LIMIT)
        load.take(training_requests=1)
        model_id, pending = await run_work(read, request, body)
        load.keep(pending.request_id, pending.answer)
        return JSONResponse({"request_id": pending.request_id, "model_id": model_id})

    def read(request: Request, body: bytes) -> tuple[str | None, PendingRequest]:
        key = digest(request, body)
        try:
            found = parse(body, model)
            return getattr(found, "model_id", None), accept(found, key)
        except BadRequestError as error:
            refused = server.training.refuse(body, key, error)
            if refused is not None:
                load_of(request).keep(refused.request_id, refused.answer)
            raise

    return handler


def _get_info(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        asked, _ = await read_json(request, types.GetInfoRequest, limit=SMALL_LIMIT)
        # Awaited, not waited for on a thread: the model may load for minutes.
        run = await asyncio.wrap_future(await run_work(server.training.run, asked.model_id))
        return show(run.info())

    return handler


def _create_custom_loss(server: Server) -> Handler:
    async def handler(request: Request) -> Response:
        load = load_of(request)
        body = await read_body(request, MAX_GRAPH_BYTES)
        load.take(training_requests=1)
        pending = await run_work(accept, request, body)
        load.keep(pending.request_id, pending.answer)
        return JSONResponse({"request_id": pending.request_id})

    def accept(request: Request, body: bytes) -> PendingRequest:
        return server.training.create_custom_loss(parse(body, types.CreateCustomLossRequest), digest(request, body))

    return handler
