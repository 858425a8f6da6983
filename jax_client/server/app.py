"""Which routes does the server have? Those of the protocol, its health check and its metrics, behind one guard."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.routing import Route

from jax_client.server.ops import metrics
from jax_client.server.ops.health import Watchdog
from jax_client.server.routes.downloads import Downloads
from jax_client.server.routes.handler import route, with_errors
from jax_client.server.routes.listings import listing_routes
from jax_client.server.routes.polling import future_routes, retrieve_route
from jax_client.server.routes.sampling import sample_route, sampling_routes
from jax_client.server.routes.sessions import session_routes
from jax_client.server.routes.training import forward_backward_route, training_routes
from jax_client.server.state.server import Server
from jax_client.server.wire.guard import Guard


def build_app(server: Server, *, api_key: str | None = None, hosts: Iterable[str] = ()) -> Guard:
    """Return the ASGI application of a server.

    Args:
        server: what answers.
        api_key: the key that every request must carry, None for none.
        hosts: the names under which the server may be called.
    """
    return Guard(Starlette(routes=routes(server)), api_key=api_key, hosts=hosts, account=lambda: server.account)


def routes(server: Server) -> list[Route]:
    """Return every route, the most frequent ones first: the router tries them in this order."""
    return [
        retrieve_route(server),
        sample_route(server),
        forward_backward_route(server),
        *training_routes(server),
        *sampling_routes(server),
        *future_routes(server),
        *session_routes(server),
        *listing_routes(server.listings),
        *Downloads(server.listings).routes(),
        *_operations(server),
    ]


def _operations(server: Server) -> list[Route]:
    own = server.live.own
    watchdog, models, state_dir = Watchdog(own.models), own.models, own.state_dir
    return [
        route("GET", "/healthz", watchdog.check),
        Route("/healthz", with_errors(watchdog.check), methods=["GET"]),
        Route("/metrics", with_errors(metrics.show_metrics(models)), methods=["GET"]),
        route("GET", "/metrics/engines", metrics.list_engines(models)),
        route("GET", "/metrics/runs", metrics.list_runs(state_dir)),
        route("GET", "/metrics/runs/{run}", metrics.read_run(state_dir)),
    ]
