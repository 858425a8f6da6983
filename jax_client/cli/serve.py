"""`jax_client serve`: the same engine behind the hosted service's protocol."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jax_client.cli.options import reads_state
from jax_client.server import LOOPBACK

if TYPE_CHECKING:
    from jax_client.server.state import Server


class Mesh(click.ParamType):
    """A mesh on the command line: auto, or axes with sizes such as fsdp=4,tensor=2."""

    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text, or fail as wrong usage."""
        if value == "auto" or isinstance(value, dict):
            return value
        axes: dict[str, int] = {}
        for part in str(value).split(","):
            axis, _, size = part.partition("=")
            if not size.isdigit():
                self.fail(f"{value!r} is no mesh; give auto, or axes such as fsdp=4,tensor=2.", param, ctx)
            axes[axis.strip()] = int(size)
        return axes


class Alias(click.ParamType):
    """NAME=OTHER on the command line."""

    name = "alias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text, or fail as wrong usage."""
        name, _, other = str(value).partition("=")
        if not name or not other:
            self.fail(f"{value!r} is no alias; give NAME=OTHER.", param, ctx)
        return name, other


@click.command("serve")
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Load this model at the start; others on demand."
)
@click.option("--alias", "aliases", multiple=True, type=Alias(), metavar="NAME=OTHER", help="Serve OTHER as NAME too.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--allow-host", "allowed", multiple=True, metavar="NAME", help="A name under which clients call it.")
@click.option(
    "--api-key", envvar="JAX_CLIENT_API_KEY", help="What clients send as TINKER_API_KEY; must begin with tml-."
)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True)
@click.option("--mesh", type=Mesh(), default="auto", show_default=True, help="Such as fsdp=4,tensor=2.")
@reads_state
def serve(
    home: Path,
    models: tuple[str, ...],
    aliases: tuple[tuple[str, str], ...],
    host: str,
    port: int,
    allowed: tuple[str, ...],
    api_key: str | None,
    dtype: Any,
    mesh: Any,
) -> None:
    """Serve the tinker SDK: point TINKER_BASE_URL at the URL that is printed."""
    if host not in LOOPBACK and api_key is None:
        raise click.UsageError(f"--host {host} lets other machines in; give an --api-key too.")
    listening = _listen(host, port)
    address = listening.getsockname()[:2]
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    from jax_client.checkpoint import files, owner
    from jax_client.config import EngineConfig
    from jax_client.runs.autosave import SIGNAL_SECONDS
    from jax_client.server.app import build_app
    from jax_client.server.state import Server

    files.make_directories(home, home)
    try:
        claim = owner.claim(home)
    except owner.TakenError as error:
        raise click.ClickException(
            f"{home} is served by {error}; stop that one, or give another --state-dir."
        ) from None
    try:
        server = Server(EngineConfig(dtype=dtype, mesh=mesh, state_dir=home), dict(aliases))
        say(f"state directory: {home}")
        for name in models:
            _load(server, name, say)
        names = {*LOOPBACK, host, *allowed} if host in LOOPBACK else {host, *allowed, *_own_names()}
        app = build_app(server, api_key=api_key, hosts=names)
        key = "the key you gave" if api_key else "tml-any"
        say(f"ready: TINKER_BASE_URL=http://{_shown(address[0])}:{address[1]} TINKER_API_KEY={key}")
        number = _run(app, listening)
        say("stopping: saving what was trained")
        for closing in server.close():
            closing.result(SIGNAL_SECONDS)
    finally:
        claim.release()
    if number is not None:
        raise click.exceptions.Exit(128 + number)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise click.ClickException(
            f"port {port} of {host} cannot be listened on ({os.strerror(error.errno or 0)}); give another --port."
        ) from None
    return listening


def _load(server: Server, name: str, say: Callable[[str], None]) -> None:
    say(f"loading {name}")
    lease = server.own.base_model(server.model_name(name)).result()
    about = lease.model.engine.describe()
    device = about["device"]
    weights = about["memory_bytes"]["weights"] / 1e9
    say(f"loaded {name}: {weights:.2f} GB in {about['dtype']} on {device['count']} x {device['kind']}")


def _own_names() -> set[str]:
    return {socket.gethostname(), socket.getfqdn()}


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _run(app: Any, listening: socket.socket) -> int | None:
    """Serve until a signal comes; return its number."""
    import uvicorn

    stopped: list[int] = []
    # Uvicorn stops at the first signal, then raises it again for whoever handled it before. A second one ends it all.
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        # Long polls end when the server does: their clients ask again, and see that it is gone.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="off", server_header=False
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stopped[0] if stopped else None
