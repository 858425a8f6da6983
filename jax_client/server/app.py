"""Which routes does the server have? Those of the protocol, its health check and its metrics, behind one guard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_client.server.dashboard.watching import Watcher
from jax_client.server.keyed import KeyedServers
from jax_client.server.ops import metrics
from jax_client.server.ops.health import Watchdog
from jax_client.server.public_url import PublicUrl
from jax_client.server.routes.downloads import Downloads
from jax_client.server.routes.handler import Handler, route, with_errors
from jax_client.server.routes.listings import listing_routes
from jax_client.server.routes.polling import future_routes, retrieve_route
from jax_client.server.routes.sampling import sample_route, sampling_routes
from jax_client.server.routes.sessions import session_routes
from jax_client.server.routes.training import forward_backward_route, training_routes
from jax_client.server.state.server import Server
from jax_client.server.wire import keys
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.guard import Entry, Guard


def build_app(
    server: Server,
    *,
    api_key: str | None = None,
    hosts: Iterable[str] = (),
    page: bool = False,
    logs: Sequence[Path] = (),
    public: PublicUrl | None = None,
) -> Guard:
    """Return the ASGI application of a server.

    Args:
        server: what answers.
        api_key: the key that every request must carry, None for none.
        hosts: the names under which the server may be called.
        page: whether it has the page that shows runs.
        logs: directories below which loops log, for the page.
        public: the address of a proxy before it.
    """
    shown = _page_of(server, Watcher(), logs) if page else []
    app = application([*routes(server), *shown])
    return Guard(app, api_key=api_key, hosts=hosts, account=lambda: server.account, pages=page, public=public)


def build_keyed_app(
    servers: KeyedServers,
    *,
    hosts: Iterable[str] = (),
    page: bool = False,
    logs: Sequence[Path] = (),
    public: PublicUrl | None = None,
) -> Guard:
    """Return the ASGI application of the servers of several keys.

    Args:
        servers: what answers, each the clients of its key.
        hosts: the names under which they may be called.
        page: whether each key has a page that shows its runs.
        logs: directories below which loops log, for the pages of admins.
        public: the address of a proxy before them.
    """
    watcher = Watcher()
    links, accounts = Downloads(servers.host.listings), servers.accounts
    entries: dict[bytes, Entry] = {}
    for key in servers.keys:
        server = servers.by_name[key.owner.name]
        seen = accounts if key.owner.admin else {key.owner.name: server.account}
        own = Downloads(server.listings, links.secret)
        shown = _page_of(server, watcher, logs) if page else []
        entries[key.digest] = Entry(application([*routes(server, own, seen), *shown]), server.account)
    return Guard(
        # A signed link needs no key, and its file is looked for without one.
        Starlette(routes=links.routes()),
        api_key=None,
        hosts=hosts,
        account=lambda: servers.whole,
        by_key=lambda key: entries.get(keys.digest(key)),
        pages=page,
        public=public,
    )


def _page_of(server: Server, watcher: Watcher, logs: Sequence[Path]) -> list[Route]:
    # Imported here: a server without the page needs none of it.
    from jax_client.server.dashboard.made import board_of

    return board_of(server, watcher, logs).routes()


def application(all_routes: list[Route]) -> ASGIApp:
    """Return the application that answers routes, without a guard.

    What posts to a path without parameters is called here: the router and its middleware took a twentieth of the time
    of small requests. Other requests, and other methods of these paths, go through them.
    """
    router = Starlette(routes=all_routes)
    posts: dict[str, Handler] = {
        each.path: each.endpoint for each in all_routes if each.methods == {"POST"} and not each.param_convertors
    }

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        handler = posts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await router(scope, receive, send)
            return
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)

    return answer


def routes(
    server: Server, links: Downloads | None = None, accounts: Mapping[str, Account] | None = None
) -> list[Route]:
    """Return every route.

    Args:
        server: what answers.
        links: to the files of exports; None makes them anew.
        accounts: those that its clients may see, by the names of the keys; None without keys.
    """
    return [
        retrieve_route(server),
        sample_route(server),
        forward_backward_route(server),
        *training_routes(server),
        *sampling_routes(server),
        *future_routes(server),
        *session_routes(server),
        *listing_routes(server.listings),
        *(links or Downloads(server.listings)).routes(),
        *_operations(server, accounts or {}),
    ]


def _operations(server: Server, accounts: Mapping[str, Account]) -> list[Route]:
    own, owner = server.live.own, server.owner
    whole = owner is None or owner.admin
    watchdog, models, state_dir = Watchdog(own.models, whole=whole), own.models, own.state_dir
    is_own = None if whole else lambda run_id: server.live.models.in_memory(run_id) is not None
    return [
        route("GET", "/healthz", watchdog.check),
        Route("/healthz", with_errors(watchdog.check), methods=["GET"]),
        Route("/metrics", with_errors(metrics.show_metrics(models, accounts, is_own)), methods=["GET"]),
        route("GET", "/metrics/engines", metrics.list_engines(models, whole=whole)),
        route("GET", "/metrics/runs", metrics.list_runs(state_dir, server.listings)),
        route("GET", "/metrics/runs/{run}", metrics.read_run(state_dir, server.listings, whole=whole)),
    ]
