"""Which settings does a server run with, and from which source (flag, environment, file, default) did each value come?

Click looks a setting up as flag, environment variable, entry of the file and default, in this order, and remembers
where it found the value. The file is click's map of defaults.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from click.core import ParameterSource

from jax_client.cli import output
from jax_client.cli.options import GlobalOptions
from jax_client.cli.server_options import CONTROL, ENGINE_DEFAULTS, PREFIX, PUBLIC, SHARED
from jax_client.cli.setting_types import OrWord
from jax_client.config import EngineConfig, default_state_dir
from jax_client.errors import JaxClientError
from jax_client.host.places import expand
from jax_client.server.public_url import PublicUrl


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        models: loaded at the start.
        aliases: names of models that stand for others.
        host, port, allow_hosts, api_key, api_key_file: who may talk to it; a private server has none of its own.
        public_url: of a proxy before it, which browsers use.
        models_dirs: below which clients may name models by their paths; None for a private server, whose program could
            read the files itself.
        logs: below which loops log; the page shows it.
        warmup: lengths of sequences for which training is compiled at the start, for adapters of `warmup_rank`.
        engine: the settings of its engines; `state_dir` is absolute.
    """

    models: tuple[str, ...]
    aliases: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 0
    allow_hosts: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    public_url: PublicUrl | None = None
    models_dirs: tuple[Path, ...] | None = None
    logs: tuple[Path, ...] = ()
    warmup: tuple[int, ...]
    warmup_rank: int
    engine: EngineConfig

    @property
    def home(self) -> Path:
        """The state directory."""
        return Path(self.engine.state_dir or default_state_dir())


def read_settings(ctx: click.Context) -> ServerSettings:
    """Return the settings of the server.

    Raises:
        click.UsageError: a value is outside its range, or an alias is given twice.
    """
    _warn_unknown_env_vars()
    params = ctx.params
    chosen = {name: params[name] for name in ENGINE_DEFAULTS if name in params}
    chosen["state_dir"] = _state_dir(ctx)[0]
    chosen["map_loss"] = _pairs(ctx, "map_loss")
    try:
        engine = EngineConfig(**chosen)
    except JaxClientError as error:
        raise click.UsageError(str(error), ctx) from None
    home = expand(chosen["state_dir"], "--state-dir").absolute()
    public = {name: params[name] for name in ("host", "port", "api_key", "public_url") if name in params}
    return ServerSettings(
        models=tuple(dict.fromkeys(params["model"])),
        aliases=_pairs(ctx, "alias"),
        allow_hosts=params.get("allow_host", ()),
        api_key_file=_api_key_file(ctx),
        models_dirs=_models_dirs(params.get("models_dir")),
        logs=tuple(each.absolute() for each in params["logs"]),
        warmup=params["warmup"],
        warmup_rank=params["warmup_rank"],
        engine=replace(engine, state_dir=home),
        **public,
    )


def _api_key_file(ctx: click.Context) -> Path | None:
    path = ctx.params.get("api_key_file")
    if path is not None and ctx.params["api_key"] is not None:
        raise click.UsageError("--api-key and --api-key-file are both given; give one. The file has every key.", ctx)
    return None if path is None else expand(path, "--api-key-file").absolute()


def _models_dirs(given: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
    return None if given is None else tuple(expand(each, "--models-dir").absolute() for each in given)


def _pairs(ctx: click.Context, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for name, other in ctx.params[option]:
        if pairs.setdefault(name, other) != other:
            flag = f"--{option.replace('_', '-')}"
            raise click.UsageError(f"{flag}: {name!r} stands for {pairs[name]!r} and {other!r}; give one.", ctx)
    return pairs


def _warn_unknown_env_vars() -> None:
    known = [str(option.envvar) for option in (*PUBLIC, *SHARED, *CONTROL) if option.envvar] + [PREFIX + "STATE_DIR"]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else "."
            click.echo(f"warning: the environment's {name} is no setting{guess}", err=True)


def print_settings(ctx: click.Context) -> None:
    """Print every setting, its value and its source; of the API key only whether there is one."""
    rows = []
    for option in ctx.command.get_params(ctx):
        if option.name not in ctx.params or option in CONTROL:
            continue
        value, source = ctx.params[option.name], _source(ctx, option)
        if option.name == "state_dir":
            value, source = _state_dir(ctx)
        if option.name == "api_key" and value is not None:
            value = "(set)"
        rows.append((option.name, _shown(value, option), source))
    output.print_table(("SETTING", "VALUE", "SOURCE"), rows)


def _state_dir(ctx: click.Context) -> tuple[Path, str]:
    """Return the state directory and its source: --state-dir after the command's name, before it, or another source."""
    option = next(each for each in SHARED if each.name == "state_dir")
    before = ctx.find_object(GlobalOptions)
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


def _shown(value: object, option: click.Parameter) -> str:
    if value is None or value == ():
        return option.type.word if isinstance(option.type, OrWord) else "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{axis}={size}" for axis, size in value.items())
    if isinstance(value, tuple):
        return ", ".join("=".join(each) if isinstance(each, tuple) else str(each) for each in value)
    return output.shown(value)
