"""Which options and arguments mean the same in every command? The state directory, --json, a path, a run's id."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jax_client.config import default_mirror, default_state_dir
from jax_client.errors import BadRequestError, NotFoundError
from jax_client.host.places import expand

if TYPE_CHECKING:
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.values import CheckpointKey

Command = TypeVar("Command", bound=Callable[..., object])

STATE_DIR_HELP = "Where runs and checkpoints are; else $JAX_CLIENT_HOME, else ~/.local/state/jax_client."
STATE_DIR_TYPE = click.Path(file_okay=False, path_type=Path)


@dataclass(slots=True)
class GlobalOptions:
    """The options that stand before the command's name."""

    state_dir: Path | None = None
    debug: bool = False


def reads_state(command: Command) -> Command:
    """Add --state-dir; the command gets the directory as its first argument."""

    @click.option("--state-dir", type=STATE_DIR_TYPE, metavar="DIR", help=STATE_DIR_HELP)
    @click.pass_obj
    @functools.wraps(command)
    def with_state_dir(options: GlobalOptions, *args: object, state_dir: Path | None, **kwargs: object) -> object:
        return command(state_home(options, state_dir), *args, **kwargs)

    return with_state_dir  # type: ignore[return-value]


def state_home(options: GlobalOptions, state_dir: Path | None) -> Path:
    """Return the state directory: of the command's own option, the one before its name, or the default.

    Raises:
        BadRequestError: none is given, and there is no home directory for the default.
    """
    return expand(state_dir or options.state_dir or default_state_dir(), "--state-dir").absolute()


def json_option(command: Command) -> Command:
    """Add --json, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of objects, and nothing else.")(
        command
    )


class CheckpointPath(click.ParamType):
    """A tinker:// path on the command line, given to the command as a CheckpointKey."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> CheckpointKey:
        """Parse the text, or fail as wrong usage."""
        from jax_client.values import CheckpointKey

        try:
            return CheckpointKey.parse(value)
        except BadRequestError as error:
            self.fail(str(error), param, ctx)


@contextlib.contextmanager
def wrong_usage(parameter: str) -> Iterator[None]:
    """Turn the BadRequestError of a check of a parameter's value into wrong usage, with its exit code."""
    try:
        yield
    except BadRequestError as error:
        raise click.BadParameter(str(error), param_hint=f"'{parameter}'") from error


def open_store(home: Path) -> CheckpointStore:
    """Open the checkpoints of a state directory. The import takes numpy, so it waits until a command runs."""
    from jax_client.checkpoint.store import CheckpointStore

    return CheckpointStore(home, default_mirror())


def base_model_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the base model's name from what was recorded, None where it is not known. Imported late, as the store."""
    from jax_client.weights.read.source import mended_name

    return mended_name(metadata["base_model"]) if "base_model" in metadata else None


def find_run(known: list[str], text: str, home: Path) -> str:
    """Return the id among `known` that is `text` or the only one to begin with it.

    Raises:
        NotFoundError: there is none, or there are several.
    """
    if text in known:
        return text
    found = [run_id for run_id in known if run_id.startswith(text)] if text else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFoundError(f"there is no run {text!r} under {home}; 'jax_client runs list' shows what is there.")
    first = ", ".join(found[:3])
    raise NotFoundError(
        f"{len(found)} runs begin with {text!r}: {first}{' ...' if found[3:] else ''}. Give more of it."
    )
