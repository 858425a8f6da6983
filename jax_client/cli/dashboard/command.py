"""`jax_client dashboard`: how does a person see the runs of a state directory, also of another process?"""

from __future__ import annotations

import os
import secrets
import socket
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path

import click

from jax_client.cli import stages
from jax_client.cli.options import reads_state
from jax_client.cli.serve import listen, page_url, private_files, uvicorn_server
from jax_client.cli.setting_types import Folder, Key, Name, PublicAddress
from jax_client.server import LOOPBACK
from jax_client.server.public_url import PublicUrl

PORT = 8001
# Between two looks who has the accelerator.
_LOOK_SECONDS = 10.0


@click.command("dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Else {PORT}, or a free one if that is taken.")
@click.option("--allow-host", type=Name(), multiple=True, metavar="NAME", help="A name under which browsers call it.")
@click.option(
    "--public-url",
    type=PublicAddress(),
    metavar="URL",
    envvar="JAX_CLIENT_PUBLIC_URL",
    show_envvar=True,
    help="https://NAME[:PORT] of a proxy with TLS before it, which browsers use.",
)
@click.option(
    "--api-key",
    type=Key(),
    metavar="KEY",
    envvar="JAX_CLIENT_API_KEY",
    show_envvar=True,
    help="What logs in, beside the printed address; must begin with tml-. Else a random one.",
)
@click.option(
    "--logs",
    type=Folder(),
    multiple=True,
    metavar="DIR",
    help="Show what loops logged below it as metrics.jsonl, too.",
)
@click.option("--model", type=Name(), multiple=True, metavar="NAME", help="A base model to sample from on the page.")
@click.option("--open", "opens", is_flag=True, help="Open a browser.")
@reads_state
def dashboard(
    home: Path,
    host: str,
    port: int | None,
    allow_host: tuple[str, ...],
    public_url: PublicUrl | None,
    api_key: str | None,
    logs: tuple[Path, ...],
    model: tuple[str, ...],
    opens: bool,
) -> None:
    """Show runs, curves and checkpoints in a browser, also while another process trains.

    The printed address logs in once; after that another one is printed. Models are loaded in this process, when the
    page asks for a sample.
    """
    if host not in LOOPBACK and api_key is None:
        raise click.UsageError(f"--host {host} lets other machines in; give an --api-key too.")
    listening = _listening(host, port)
    address = listening.getsockname()[:2]
    from jax_client.server.dashboard.made import page_alone

    own = () if host in LOOPBACK else (socket.gethostname(), socket.getfqdn())
    app = page_alone(
        home,
        api_key=api_key or f"tml-{secrets.token_urlsafe(32)}",
        hosts={host, *allow_host, *LOOPBACK, *own},
        logs=[each.absolute() for each in logs],
        models=model,
        refusal=Accelerator().refusal,
        public=public_url,
    )
    http = uvicorn_server(app)
    listening.listen()
    stages.say(f"state directory: {home}")
    first: list[str] = []

    def show(query: str) -> None:
        text = f"{page_url(*address, public=public_url)}{query}"
        first.append(text)
        stages.say(f"dashboard: {text}")

    app.announce_page(show)
    if opens and not webbrowser.open(first[0]):
        stages.say("no browser was found; open the address")
    try:
        with private_files():
            http.run(sockets=[listening])
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


def _listening(host: str, port: int | None) -> socket.socket:
    """Return a socket on a port, on the usual one or a free one if none is given. Raises ClickException."""
    if port is not None:
        return listen(host, port)
    try:
        return listen(host, PORT)
    except click.ClickException:
        return listen(host, 0)


class Accelerator:
    """Who has this machine's accelerator: another process, so that no model can be loaded here? Thread-safe.

    Args:
        now: a monotonic clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: tuple[float, str | None] | None = None

    def refusal(self) -> str | None:
        """Return why no model can be loaded, None where one can, as far as can be seen without trying."""
        known, now = self._known, self._now()
        if known is None or now - known[0] > _LOOK_SECONDS:
            known = self._known = now, self._look()
        return known[1]

    def _look(self) -> str | None:
        from jax_client.cli.doctor.devices import accelerator_files, holders

        # A GPU may be shared, and says itself what does not fit.
        files = accelerator_files().get("tpu")
        if not files or os.environ.get("JAX_PLATFORMS", "").strip() == "cpu":
            return None
        others = [each for each in holders(files)[0] if each.pid != os.getpid()]
        if not others:
            return None
        who = f"process {others[0].pid} ({others[0].command})"
        return (
            f"the TPU of this machine is in use by {who}, so that no model is loaded here: use the page of that "
            "server, or end it."
        )
