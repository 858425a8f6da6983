"""What does the command `jax_client` do? `main` runs one of its commands and turns errors into a line and an exit code.

At module level the files of this package import click, floor 0, each other and the standard library, nothing else:
--help costs a tenth of a second, and a listing never waits for jax.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from jax_client.cli import stages
from jax_client.cli.checkpoints import checkpoint
from jax_client.cli.dashboard.command import dashboard
from jax_client.cli.doctor.command import doctor
from jax_client.cli.estimate.command import estimate
from jax_client.cli.estimate.models import model_group
from jax_client.cli.keys.command import key
from jax_client.cli.launch.command import launch
from jax_client.cli.options import STATE_DIR_HELP, STATE_DIR_TYPE, GlobalOptions
from jax_client.cli.run_command import run
from jax_client.cli.runs import runs_group
from jax_client.cli.serve import serve
from jax_client.cli.talk.chat import chat
from jax_client.cli.talk.sample import sample

OK, FAILURE, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = "Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 this machine is not set up for it, 130 interrupted."


@click.group("jax_client", context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.option("--state-dir", type=STATE_DIR_TYPE, metavar="DIR", envvar="JAX_CLIENT_STATE_DIR", help=STATE_DIR_HELP)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="jax_client", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context, state_dir: Path | None, debug: bool) -> None:
    """Look after the runs and checkpoints of jax_client on this machine."""
    ctx.obj.state_dir, ctx.obj.debug = state_dir, debug
    if os.environ.get("NO_COLOR"):
        ctx.color = False


_COMMANDS = (serve, run, launch, dashboard, runs_group, checkpoint, sample, chat, model_group, estimate, key, doctor)
for _command in _COMMANDS:
    group.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    options = GlobalOptions()
    try:
        with _warnings_on_stderr():
            code = group.main(arguments, prog_name="jax_client", standalone_mode=False, obj=options)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has closed it. Python would flush once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if options.debug:
            import traceback

            traceback.print_exc()
        code, message = _explain(error)
        if message:
            click.echo(f"{stages.level_in_colour('error')}{message}", err=True)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error and the line to print; "" where everything was printed already."""
    # Click's own exceptions know a format; the package's begin with what was wrong and end with what to do.
    from jax_client.errors import JaxClientError

    if isinstance(error, click.exceptions.Abort):
        return INTERRUPTED, "interrupted."
    if isinstance(error, click.UsageError):
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            click.echo(error.format_message(), err=True)
            return USAGE, ""
        where = f" See '{error.ctx.command_path} --help'." if error.ctx else ""
        return USAGE, f"{_line(error.format_message())}{where}"
    if isinstance(error, click.ClickException):
        return FAILURE, _line(error.format_message())
    if isinstance(error, ImportError):
        return ENVIRONMENT, f"{_line(error)}. A package is missing or broken; 'jax_client doctor' says which."
    if isinstance(error, JaxClientError | OSError):
        return FAILURE, _line(error)
    return FAILURE, f"{type(error).__name__}: {_line(error)}. This should not happen; 'jax_client --debug' shows where."


def _line(error: object) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print the package's log, such as damage that a listing finds, on stderr; stdout holds the answer alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(stages.LineFormatter())
    logger = logging.getLogger("jax_client")
    propagated = logger.propagate
    # A program that calls `main` has its own handlers. Else absl, when it is imported, adds one that prints all again.
    if not logging.getLogger().handlers:
        logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
