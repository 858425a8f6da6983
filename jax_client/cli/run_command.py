"""`jax_client run -- PROGRAM`: how does a program get a server of its own, and what happens when either is stopped?

The server runs in a thread of this process, the program in a child process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jax_client.cli import stages
from jax_client.cli.program.child import Child, check_program
from jax_client.cli.program.command import CONTEXT, METAVAR, ProgramCommand
from jax_client.cli.serve import listen, opened, page_url, private_files, save, url, uvicorn_server
from jax_client.cli.server_options import server_options
from jax_client.cli.settings import print_settings, read_settings
from jax_client.host.program import name_of_command
from jax_client.host.proxies import bypassing
from jax_client.server import LOOPBACK
from jax_client.threads import start_thread

if TYPE_CHECKING:
    from jax_client.server.state.server import Server

# Commands of `jax_client runs`, which older versions had under `run`.
LISTINGS = ("list", "info")
_TAKEN = (
    "give another --state-dir, or let the program use that server: start it without 'jax_client run', with "
    "TINKER_BASE_URL and TINKER_API_KEY as that server printed them"
)


class RunCommand(ProgramCommand):
    """The command `run`, which once had the listings' names."""

    def refuse_word(self, ctx: click.Context, word: str) -> None:
        """Fail, because a word that is no option stands before the program."""
        if word in LISTINGS:
            ctx.fail(f"'jax_client run {word}' is called 'jax_client runs {word}'.")
        super().refuse_word(ctx, word)


@click.command(
    "run",
    cls=RunCommand,
    no_args_is_help=True,
    options_metavar=METAVAR,
    context_settings=CONTEXT,
)
@server_options(private=True)
@click.pass_context
def run(ctx: click.Context, **_: object) -> None:
    """Run a program on a server of its own; 'jax_client runs' shows the training runs of this machine.

    \b
    jax_client run --model NAME -- python -m tinker_cookbook.recipes.chat_sl.train model_name=NAME ...

    The server starts on a free port, the program finds it in TINKER_BASE_URL and TINKER_API_KEY, past any proxy; when
    the program ends, what was trained is saved, and the exit code is the program's.
    """
    run_program(ctx, ctx.args)


def run_program(ctx: click.Context, program: list[str]) -> None:
    """Start the server and the program; end with the program's exit code, 128+n where signal n ended it."""
    settings = read_settings(ctx)
    if ctx.params["show_config"]:
        print_settings(ctx)
        return
    if not program:
        raise click.UsageError("there is no program; give it after --, as in 'run --model NAME -- python train.py'.")
    # Checked before the model is loaded, which may take minutes.
    check_program(program[0])
    key = f"tml-{secrets.token_urlsafe(32)}"
    script = name_of_command(program)
    with private_files() as umask, opened(settings, _TAKEN, remembers=False, script=script) as server:
        child = Child(umask)
        try:
            with _served(server, key, settings.logs) as address:
                stages.say(f"ready: running {program[0]} with TINKER_BASE_URL={address}")
                own = {"TINKER_BASE_URL": address, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"}
                # Else a proxy of the environment would be asked for this machine's own address, and not answer.
                code = child.run(program, os.environ | own | bypassing(os.environ, *LOOPBACK))
        finally:
            save(server, hurried=child.hurried)
    raise click.exceptions.Exit(code)


@contextlib.contextmanager
def _served(server: Server, key: str, logs: Sequence[Path]) -> Iterator[str]:
    """Serve on a free port of this machine until the body ends; yield the URL."""
    from jax_client.server.app import build_app

    listening = listen("127.0.0.1", 0)
    app = build_app(server, api_key=key, hosts=LOOPBACK, page=True, logs=logs)
    address = listening.getsockname()[:2]
    app.announce_page(lambda query: stages.say(f"dashboard: {page_url(*address)}{query}"))
    http = uvicorn_server(app)
    thread = start_thread("jax_client-http", partial(http.run, sockets=[listening]))
    while not http.started:
        if not thread.is_alive():
            raise click.ClickException("the server did not start; 'jax_client doctor' looks for the reason.")
        time.sleep(0.01)
    try:
        yield url(*address)
    finally:
        http.should_exit = True
        thread.join()
