"""Which settings does a server take, and from which source did each value come?

Click looks a setting up as flag, environment variable, entry of the file and default, in this order, and remembers
where it found the value. The file is click's map of defaults.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from jax_client.cli import output
from jax_client.cli.config_file import read_config_file
from jax_client.cli.options import STATE_DIR_HELP, STATE_DIR_TYPE
from jax_client.cli.options import Settings as Global
from jax_client.config import DType, EngineConfig, Remat, default_state_dir
from jax_client.errors import JaxClientError

Command = TypeVar("Command", bound=Callable[..., Any])

PREFIX = "JAX_CLIENT_"
# Read by clients in this process too, which know no flags.
OWN_VARIABLES = {"state_dir": "JAX_CLIENT_HOME"}
_DEFAULTS = {each.name: each.default for each in fields(EngineConfig)}


class Listed(click.ParamType):
    """A type whose values may be several in one variable of the environment."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """Split at commas and white space."""
        return [part for part in re.split(r"[,\s]+", rv) if part]


class Name(Listed):
    """The name of a model or a host."""

    name = "name"


class Length(Listed, click.IntRange):
    """A number of tokens."""


class Alias(Listed):
    """NAME=OTHER."""

    name = "alias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text, or fail as wrong usage."""
        name, _, other = str(value).partition("=")
        if not name or not other:
            self.fail(f"{value!r} is no alias; give NAME=OTHER.", param, ctx)
        return name, other


class Mesh(click.ParamType):
    """A mesh: auto, or axes with sizes such as fsdp=4,tensor=2."""

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


class OrWord(click.ParamType):
    """A number, or a word for None."""

    def __init__(self, number: click.ParamType, word: str) -> None:
        self.name = f"{number.name}|{word}"
        self._number, self.word = number, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text, or fail as wrong usage."""
        return None if value == self.word else self._number.convert(value, param, ctx)


class Key(click.ParamType):
    """An API key that the SDK will send."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the text; the message does not repeat it."""
        if not re.fullmatch(r"tml-[!-~]+", value):
            self.fail("the key must begin with tml- and hold no spaces; the SDK refuses others.", param, ctx)
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        models: loaded at the start.
        aliases: names of models that stand for others.
        host, port, allow_hosts, api_key: who may talk to it; a private server has none of its own.
        warmup: lengths of sequences for which training is compiled at the start, for adapters of `warmup_rank`.
        engine: the settings of its engines; `state_dir` is absolute.
    """

    models: tuple[str, ...]
    aliases: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 0
    allow_hosts: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    warmup: tuple[int, ...]
    warmup_rank: int
    engine: EngineConfig

    @property
    def home(self) -> Path:
        """The state directory."""
        return Path(self.engine.state_dir or default_state_dir())


def _load_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        known = {option.name: option for option in (*PUBLIC, *SHARED) if option.name}
        ctx.default_map = {**(ctx.default_map or {}), **read_config_file(path, known, ctx)}
    return path


def _option(name: str, type: Any = None, *, help: str, **more: Any) -> click.Option:
    parameter = name.replace("-", "_")
    flags = [f"--{name}/--no-{name}"] if isinstance(more.get("default"), bool) else [f"--{name}"]
    variable = OWN_VARIABLES.get(parameter, PREFIX + parameter.upper())
    return click.Option([*flags, parameter], type=type, help=help, envvar=variable, show_envvar=True, **more)


def _engine_option(name: str, type: Any = None, *, help: str, **more: Any) -> click.Option:
    default = _DEFAULTS[name.replace("-", "_")]
    if default is None and isinstance(type, OrWord):
        default = type.word
    return _option(name, type, help=help, default=default, show_default=default is not None, **more)


# Of a server that others call; the one of `jax_client run` is private.
PUBLIC = (
    _option("host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    _option("port", click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
    _option("allow-host", Name(), multiple=True, metavar="NAME", help="A name under which clients call it."),
    _option("api-key", Key(), metavar="KEY", help="What clients send as TINKER_API_KEY; must begin with tml-."),
)
SHARED = (
    _option("model", Name(), multiple=True, metavar="NAME", help="Load this model at the start; others on demand."),
    _option("alias", Alias(), multiple=True, metavar="NAME=OTHER", help="Serve OTHER as NAME too."),
    _option(
        "warmup",
        Length(1),
        multiple=True,
        metavar="LENGTH",
        help="Compile the training of sequences of this length at the start.",
    ),
    _option("warmup-rank", click.IntRange(1), default=32, show_default=True, help="The adapters' rank for --warmup."),
    _option("state-dir", STATE_DIR_TYPE, metavar="DIR", help=STATE_DIR_HELP),
    _engine_option("dtype", click.Choice(get_args(DType)), help="Of the frozen weights and the matmuls."),
    _engine_option("mesh", Mesh(), help="Such as fsdp=4,tensor=2."),
    _engine_option(
        "memory-fraction",
        click.FloatRange(0, 1, min_open=True),
        help="Share of a device's memory that may be filled.",
    ),
    _engine_option(
        "max-tokens-per-micro-batch",
        OrWord(click.IntRange(16), "auto"),
        metavar="TOKENS|auto",
        help="Most tokens computed at once in a training pass.",
    ),
    _engine_option("remat", click.Choice(get_args(Remat)), help="What the backward pass recomputes to save memory."),
    _engine_option("mirror", metavar="URL", help="Where every checkpoint is copied, such as gs://bucket/path."),
    _engine_option(
        "autosave-minutes",
        OrWord(click.FloatRange(0, min_open=True), "never"),
        metavar="MINUTES|never",
        help="How often runs are saved by themselves.",
    ),
    _engine_option("precompile", help="Compile likely programs in the background."),
    _engine_option("record-metrics", help="Keep the metrics and events of runs in the state directory."),
    _engine_option("compilation-cache-dir", metavar="DIR", help="Compiled programs; else under ~/.cache/jax_client."),
)
_CONTROL = (
    click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar=PREFIX + "CONFIG",
        show_envvar=True,
        is_eager=True,
        callback=_load_file,
        metavar="FILE",
        help="A TOML file with any of these settings, under the flags' names.",
    ),
    click.Option(["--show-config"], is_flag=True, help="Print every setting and where it comes from, and stop."),
)


def server_options(*, private: bool) -> Callable[[Command], Command]:
    """Add the options of a server to a command, which reads them with `read_settings`."""

    def add(command: Command) -> Command:
        for option in reversed([*SHARED, *(() if private else PUBLIC), *_CONTROL]):
            # As click.option does it: the command takes them over when it is made.
            command.__dict__.setdefault("__click_params__", []).append(option)
        return command

    return add


def read_settings(ctx: click.Context) -> ServerSettings:
    """Return the settings of the server.

    Raises:
        click.UsageError: a value is outside its range, or an alias is given twice.
    """
    _warn_unknown_variables()
    params = ctx.params
    chosen = {name: params[name] for name in _DEFAULTS if name in params}
    chosen["state_dir"] = _state_dir(ctx)[0]
    try:
        engine = EngineConfig(**chosen)
    except JaxClientError as error:
        raise click.UsageError(str(error), ctx) from None
    home = Path(chosen["state_dir"]).expanduser().absolute()
    aliases: dict[str, str] = {}
    for name, other in params["alias"]:
        if aliases.setdefault(name, other) != other:
            raise click.UsageError(f"the alias {name!r} stands for {aliases[name]!r} and {other!r}; give one.", ctx)
    public = {name: params[name] for name in ("host", "port", "api_key") if name in params}
    return ServerSettings(
        models=tuple(dict.fromkeys(params["model"])),
        aliases=aliases,
        allow_hosts=params.get("allow_host", ()),
        warmup=params["warmup"],
        warmup_rank=params["warmup_rank"],
        engine=replace(engine, state_dir=home),
        **public,
    )


def _warn_unknown_variables() -> None:
    known = [str(option.envvar) for option in (*PUBLIC, *SHARED, *_CONTROL) if option.envvar] + [PREFIX + "STATE_DIR"]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else "."
            click.echo(f"warning: the environment's {name} is no setting{guess}", err=True)


def print_settings(ctx: click.Context) -> None:
    """Print every setting, its value and its source; of the API key only whether there is one."""
    rows = []
    for option in ctx.command.get_params(ctx):
        if option.name not in ctx.params or option in _CONTROL:
            continue
        value, source = ctx.params[option.name], _source(ctx, option)
        if option.name == "state_dir":
            value, source = _state_dir(ctx)
        if option.name == "api_key" and value is not None:
            value = "(set)"
        rows.append((option.name, _shown(value, option), source))
    output.print_table(("SETTING", "VALUE", "SOURCE"), rows)


def _state_dir(ctx: click.Context) -> tuple[Any, str]:
    """Return the state directory, and its source: after the command's name, before it, or as the others."""
    option = next(each for each in SHARED if each.name == "state_dir")
    before = ctx.find_object(Global)
    if ctx.get_parameter_source("state_dir") != ParameterSource.COMMANDLINE and before and before.state_dir:
        root = ctx.find_root()
        return before.state_dir, _source(root, next(each for each in root.command.params if each.name == "state_dir"))
    if ctx.params["state_dir"] is None:
        return default_state_dir(), "default"
    return ctx.params["state_dir"], _source(ctx, option)


def _source(ctx: click.Context, option: click.Parameter) -> str:
    source = ctx.get_parameter_source(option.name or "")
    if source == ParameterSource.COMMANDLINE:
        return "flag"
    if source == ParameterSource.ENVIRONMENT:
        return f"environment {option.envvar}"
    if source == ParameterSource.DEFAULT_MAP:
        return f"file {ctx.params['config']}"
    return "default"


def _shown(value: Any, option: click.Parameter) -> str:
    if value is None or value == ():
        return option.type.word if isinstance(option.type, OrWord) else "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{axis}={size}" for axis, size in value.items())
    if isinstance(value, tuple):
        return ", ".join("=".join(each) if isinstance(each, tuple) else str(each) for each in value)
    return output.shown(value)
