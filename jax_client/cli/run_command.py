"""`jax_client run -- PROGRAM`: how does a program get a server of its own, and what happens when either is stopped?

The server runs in a thread of this process, the program in a child process. The child stays in our process group, so
that it can read from the terminal, and the terminal's signals reach both.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import click

from jax_client.cli import stages
from jax_client.cli.serve import listen, opened, private_files, save, url, uvicorn_server
from jax_client.cli.server_options import server_options
from jax_client.cli.settings import print_settings, read_settings
from jax_client.host.proxies import bypassing
from jax_client.server import LOOPBACK
from jax_client.threads import start_thread

if TYPE_CHECKING:
    from jax_client.server.state.server import Server

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit codes
# Commands of `jax_client runs`, which older versions had under `run`.
LISTINGS = ("list", "info")
_TAKEN = (
    "give another --state-dir, or let the program use that server: start it without 'jax_client run', with "
    "TINKER_BASE_URL and TINKER_API_KEY as that server printed them"
)


class ProgramCommand(click.Command):
    """A command with options of its own and, behind the first `--`, a program with its arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options, and leave the program in `ctx.args`."""
        end = args.index("--") if "--" in args else len(args)
        words = super().parse_args(ctx, args[: end + 1])
        if words and words[0] in LISTINGS:
            ctx.fail(f"'jax_client run {words[0]}' is called 'jax_client runs {words[0]}'.")
        if words:
            ctx.fail(f"{words[0]!r} is no option; a program stands behind --, as in 'run -- {words[0]}'.")
        ctx.args = args[end + 1 :]
        return ctx.args


@click.command(
    "run",
    cls=ProgramCommand,
    no_args_is_help=True,
    options_metavar="[OPTIONS] -- PROGRAM [ARGUMENT]...",
    # A word ends the options, so that the message can name it.
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
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
    if shutil.which(program[0]) is None:
        _refuse(program[0], "there is no such program, or it is not executable", NOT_FOUND)
    key = f"tml-{secrets.token_urlsafe(32)}"
    with private_files() as umask, opened(settings, _TAKEN, remembers=False) as server:
        child = _Child(umask)
        try:
            with _served(server, key) as address:
                stages.say(f"ready: running {program[0]} with TINKER_BASE_URL={address}")
                own = {"TINKER_BASE_URL": address, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"}
                # Else a proxy of the environment would be asked for this machine's own address, and not answer.
                code = child.run(program, os.environ | own | bypassing(os.environ, *LOOPBACK))
        finally:
            save(server, hurried=child.hurried)
    raise click.exceptions.Exit(code)


@contextlib.contextmanager
def _served(server: Server, key: str) -> Iterator[str]:
    """Serve on a free port of this machine until the body ends; yield the URL."""
    from jax_client.server.app import build_app

    listening = listen("127.0.0.1", 0)
    http = uvicorn_server(build_app(server, api_key=key, hosts=LOOPBACK))
    thread = start_thread("jax_client-http", partial(http.run, sockets=[listening]))
    while not http.started:
        if not thread.is_alive():
            raise click.ClickException("the server did not start; 'jax_client doctor' looks for the reason.")
        time.sleep(0.01)
    try:
        yield url(*listening.getsockname()[:2])
    finally:
        http.should_exit = True
        thread.join()


class _Child:
    """The program, and the signals that arrived while it ran; each is passed on to it.

    Args:
        umask: of the program, -1 for this process's own.
    """

    def __init__(self, umask: int = -1) -> None:
        self._umask = umask
        self._process: subprocess.Popen[bytes] | None = None
        self._received: list[int] = []

    @property
    def hurried(self) -> bool:
        """Whether a signal came after which the machine may be switched off soon."""
        return bool({signal.SIGTERM, signal.SIGHUP} & set(self._received))

    def run(self, program: list[str], environment: dict[str, str]) -> int:
        """Start the program, wait for its end, and return the exit code that a shell would give."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Signals that this process was started to ignore (nohup) are ignored by the program too.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            try:
                self._process = subprocess.Popen(program, env=environment, umask=self._umask)
            except OSError as error:
                _refuse(program[0], error.strerror or str(error), NOT_EXECUTABLE)
            for number in list(self._received):
                self._pass_on(number)
            code = self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code if code >= 0 else 128 - code

    def _handle(self, number: int, _: object) -> None:
        self._received.append(number)
        if self._process is not None:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        process = self._process
        if process is None:
            return
        if number == signal.SIGINT and self._received.count(number) > 1:
            process.kill()
        elif number != signal.SIGINT or not _in_foreground():
            process.send_signal(number)


def _in_foreground() -> bool:
    """Return whether Ctrl-C reaches the program directly, as it reaches the terminal's whole foreground group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _refuse(program: str, why: str, code: int) -> NoReturn:
    click.echo(f"error: {program}: {why}.", err=True)
    raise click.exceptions.Exit(code)
