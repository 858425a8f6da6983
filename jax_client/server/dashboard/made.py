"""How is a page made: for a server that serves the SDK too, and for a state directory alone?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import EngineConfig, default_mirror
from jax_client.errors import BadRequestError, shown
from jax_client.runs.overview.notes import Note
from jax_client.runs.overview.rows import Overview
from jax_client.runs.overview.verified import verify
from jax_client.server.dashboard.board import Board
from jax_client.server.dashboard.playground.routes import Playground
from jax_client.server.dashboard.playground.samplers import Samplers
from jax_client.server.dashboard.source import WithoutEngines
from jax_client.server.dashboard.watching import Watcher
from jax_client.server.public_url import PublicUrl
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.guard import Guard
from jax_client.values import JsonObject

if TYPE_CHECKING:
    from jax_client.runs.lifecycle.session import Session
    from jax_client.server.state.server import Server


def board_of(server: Server, watcher: Watcher, logs: Sequence[Path] = ()) -> Board:
    """Return the page of a server; with an owner, of the owner's runs.

    Args:
        server: whose engines the playground shares.
        watcher: of all pages of the process.
        logs: directories of logs, which have no owner: they are for all where there are none, and for an admin.
    """
    from jax_client.runs.lifecycle.session import Session

    own = server.live.own
    whole = server.owner is None or server.owner.admin
    overview = Overview(own.state_dir, logs=logs, owner=server.owner, store=own.store)

    def engines() -> list[JsonObject]:
        monitors = [(model.source.name, model.engine.monitor) for model in own.models.loaded()]
        return [{**monitor.describe(), "name": name, "health": monitor.health()} for name, monitor in monitors]

    def models() -> list[str]:
        loaded = [model.source.name for model in own.models.loaded()] if whole else []
        return list(dict.fromkeys([*loaded, *_models_of(overview)]))

    samplers = Samplers(lambda: Session(server.config, models=own.models, owner=server.owner), fit=server.live.make_fit)
    own.when_closing(samplers.close)
    return Board(
        home=own.state_dir,
        source=overview if whole else WithoutEngines(overview),
        store=own.store,
        verify=partial(verify, own.store, own.state_dir),
        write_note=partial(_write_note, overview),
        playground=Playground(samplers, models, server.names.meaning),
        watcher=watcher,
        engines=engines if whole else None,
        serving=True,
        logs=whole and bool(logs),
    )


def page_alone(
    home: Path,
    *,
    api_key: str | None,
    hosts: Iterable[str],
    logs: Sequence[Path] = (),
    models: Sequence[str] = (),
    refusal: Callable[[], str | None] = lambda: None,
    public: PublicUrl | None = None,
) -> Guard:
    """Return the ASGI application of a page over a state directory, which other processes may have open.

    Args:
        home: the state directory, which need not be there.
        api_key: what logs in, None for no login.
        hosts: names under which the page may be called.
        logs: directories of logs.
        models: base models that may be loaded, beside those of the runs.
        refusal: `refusal() -> why no model can be loaded in this process`, None where one can.
        public: the address of a proxy before the page.
    """
    store = CheckpointStore(home, default_mirror())
    overview = Overview(home, logs=logs, store=store)

    def names() -> list[str]:
        return list(dict.fromkeys([*models, *_models_of(overview)]))

    def meaning(name: str) -> str:
        if name not in names():
            raise BadRequestError(f"model is {shown(name)}, which no run here has; start the page with --model.")
        return name

    def session() -> Session:
        from jax_client.runs.lifecycle.session import Session

        config = EngineConfig(state_dir=home, precompile=False, autosave_minutes=None, record_metrics=False)
        return Session(config)

    board = Board(
        home=home,
        source=overview,
        store=store,
        verify=partial(verify, store, home),
        write_note=partial(_write_note, overview),
        playground=Playground(Samplers(session, refusal=refusal), names, meaning),
        watcher=Watcher(),
        engines=list,
        serving=False,
        logs=bool(logs),
    )
    account = Account()
    app = Starlette(routes=board.routes())
    return Guard(app, api_key=api_key, hosts=hosts, account=lambda: account, pages=True, public=public)


def _models_of(overview: Overview) -> list[str]:
    """Return the base models of runs. Not those that log directories name, which anyone may have written."""
    return [row.model for row in overview.runs() if row.source == "run" and row.model]


def _write_note(overview: Overview, run: str, fields: JsonObject) -> JsonObject:
    overview.put_note(run, Note(**{**overview.note(run).to_json(), **fields}))
    return overview.run(run).to_json()
