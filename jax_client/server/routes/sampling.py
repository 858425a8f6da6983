"""Which routes make samplers and sample?"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types
from tinker.types import JoinSamplingSessionRequest

from jax_client.errors import BadRequestError
from jax_client.runs.checks.sampling import MAX_SAMPLES
from jax_client.server.routes.handler import digest, parsed, route, show
from jax_client.server.state.server import Server
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.admission import load_of
from jax_client.server.wire.bodies import SMALL, read_json
from jax_client.server.wire.pools import run_work


def sample_route(server: Server) -> Route:
    """Return the route of sampling requests."""

    async def handler(request: Request) -> Response:
        load = load_of(request)
        asked, body = await read_json(request, types.SampleRequest)
        samples = _counted_samples(asked.num_samples, load.account)
        load.take(sampling_requests=1, samples=samples)
        key = digest(request, body)
        if len(body) <= SMALL and server.sampling.is_immediate(asked.sampling_session_id):
            pending = server.sampling.sample(asked, key)
        else:
            pending = await run_work(server.sampling.sample, asked, key)
        load.keep(pending.request_id, pending.answer)
        server.orphans.seen(pending)
        server.orphans.watch(asyncio.get_running_loop().call_later)
        names = [f"{pending.request_id}:{i}" for i in range(samples)]
        return JSONResponse({"request_id": pending.request_id, "sample_sequence_ids": names})

    return route("POST", "/asample", handler)


def sampling_routes(server: Server) -> list[Route]:
    """Return the other routes."""
    sampling = server.sampling

    async def get_sampler(request: Request) -> Response:
        sampler_id = request.path_params["sampler"]
        # Awaited, not waited for on a thread: it may load for minutes.
        sampler = await asyncio.wrap_future(await run_work(sampling.sampler, sampler_id))
        info = sampler.session.samplers[sampler_id]
        return show(
            types.GetSamplerResponse(sampler_id=sampler_id, base_model=info.base_model, model_path=info.model_path)
        )

    return [
        route(
            "POST",
            "/create_sampling_session",
            parsed(types.CreateSamplingSessionRequest, sampling.create_sampling_session),
        ),
        route(
            "POST",
            "/join_sampling_session",
            parsed(
                JoinSamplingSessionRequest,
                lambda r: {"client_counter": sampling.join_sampling_session(r.sampling_session_id)},
            ),
        ),
        route("GET", "/samplers/{sampler:path}", get_sampler),
    ]


def _counted_samples(num_samples: int, account: Account) -> int:
    """Return how many samples a request counts as. Raises BadRequestError for more than its key may ever have."""
    # Any other number is refused where the request begins, with the words of an in-process client.
    samples = num_samples if 1 <= num_samples <= MAX_SAMPLES else 1
    most = account.limit("samples")
    if samples > most:
        raise BadRequestError(
            f"num_samples is {samples:,}; the clients of this key may have {most:,} samples at once. Call sample "
            "several times, or ask the operator for more samples in the line of this key."
        )
    return samples
