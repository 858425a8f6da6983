"""Which options does a server take?

`SHARED` are the options of every server, `PUBLIC` those of one that others call; each can be set by a flag, a variable
of the environment and an entry of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from jax_client.cli.config_file import read_config_file
from jax_client.cli.options import STATE_DIR_HELP, STATE_DIR_TYPE
from jax_client.cli.setting_types import Folder, Key, Length, Mesh, Name, OrWord, Pair, PublicAddress
from jax_client.config import DType, EngineConfig, Remat

Command = TypeVar("Command", bound=Callable[..., object])

PREFIX = "JAX_CLIENT_"
# In-process clients, which have no flags, read these too.
OWN_VARIABLES = {"state_dir": "JAX_CLIENT_HOME"}
ENGINE_DEFAULTS = {each.name: each.default for each in fields(EngineConfig)}


def _load_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        known = {option.name: option for option in (*PUBLIC, *SHARED) if option.name}
        ctx.default_map = {**(ctx.default_map or {}), **read_config_file(path, known, ctx)}
    return path


def _option(name: str, type: click.ParamType | None = None, *, help: str, **more: Any) -> click.Option:
    parameter = name.replace("-", "_")
    flags = [f"--{name}/--no-{name}"] if isinstance(more.get("default"), bool) else [f"--{name}"]
    variable = OWN_VARIABLES.get(parameter, PREFIX + parameter.upper())
    return click.Option([*flags, parameter], type=type, help=help, envvar=variable, show_envvar=True, **more)


def _engine_option(name: str, type: click.ParamType | None = None, *, help: str, **more: Any) -> click.Option:
    default = ENGINE_DEFAULTS[name.replace("-", "_")]
    if default is None and isinstance(type, OrWord):
        default = type.word
    return _option(name, type, help=help, default=default, show_default=default is not None, **more)


# Of a server that other processes call; the server of `jax_client run` is private.
PUBLIC = (
    _option("host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    _option("port", click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
    _option("allow-host", Name(), multiple=True, metavar="NAME", help="A name under which clients call it."),
    _option(
        "public-url",
        PublicAddress(),
        metavar="URL",
        help="https://NAME[:PORT] of a proxy with TLS before it, which browsers use.",
    ),
    _option(
        "models-dir",
        Folder(),
        multiple=True,
        metavar="DIR",
        help="Below it clients may name models by their paths; else only hub names and the models of --model.",
    ),
    _option("api-key", Key(), metavar="KEY", help="What clients send as TINKER_API_KEY; must begin with tml-."),
    _option(
        "api-key-file",
        click.Path(path_type=Path),
        metavar="FILE",
        help="Several keys in place of one, each with runs of its own; 'jax_client key' makes them.",
    ),
)
SHARED = (
    _option("model", Name(), multiple=True, metavar="NAME", help="Load this model at the start; others on demand."),
    _option("alias", Pair("alias"), multiple=True, metavar="NAME=OTHER", help="Serve OTHER as NAME too."),
    _option(
        "map-loss",
        Pair("map of a loss"),
        multiple=True,
        metavar="NAME=LOSS",
        help="Compute LOSS where a client asks for NAME, whose formula is not public: stable_reinforce.",
    ),
    _option(
        "warmup",
        Length(1),
        multiple=True,
        metavar="LENGTH",
        help="Compile sampling, and the training of sequences of this length, at the start.",
    ),
    _option("warmup-rank", click.IntRange(1), default=32, show_default=True, help="The adapters' rank for --warmup."),
    _option("state-dir", STATE_DIR_TYPE, metavar="DIR", help=STATE_DIR_HELP),
    _engine_option("dtype", click.Choice(get_args(DType)), help="Of the frozen weights and the matmuls."),
    _engine_option("mesh", Mesh(), help="Such as fsdp=4,tensor=2."),
    _engine_option(
        "hosts",
        click.Choice(["ray"]),
        help="ray: compute on all hosts of this process's Ray cluster. 'jax_client launch' sets the variable.",
    ),
    _engine_option(
        "samplers",
        click.IntRange(0),
        metavar="NUMBER",
        help="Further engines that only sample, on other hosts or chips of the Ray cluster.",
    ),
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
    _option(
        "logs",
        Folder(),
        multiple=True,
        metavar="DIR",
        help="Show on the page what loops logged below it as metrics.jsonl, too; with several keys, to admins.",
    ),
    _engine_option("progress", help="Say on stderr when clients, runs and compiles begin and end, and the tokens/s."),
    _engine_option(
        "export-metrics",
        metavar="NAMES",
        help="Also write the metrics of steps to wandb, trackio or tensorboard, where they are installed.",
    ),
    _engine_option(
        "alert-webhook", metavar="URL", help="Post new alerts of open runs there: https, to a host of --alert-hosts."
    ),
    _engine_option("alert-hosts", metavar="HOSTS", help="The hosts that --alert-webhook may name."),
    _engine_option(
        "compilation-cache-dir",
        metavar="DIR|URL",
        help="Compiled programs; else under ~/.cache/jax_client. A URL is such as gs://bucket/path.",
    ),
)
CONTROL = (
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
        for option in reversed([*SHARED, *(() if private else PUBLIC), *CONTROL]):
            # As click.option does: the command takes the options over when it is made.
            command.__dict__.setdefault("__click_params__", []).append(option)
        return command

    return add
