"""How is the TOML file of a server's settings read? Each entry is parsed and checked as the flag of its name is."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path

import click


def read_config_file(path: Path, known: Mapping[str, click.Option], ctx: click.Context) -> dict[str, object]:
    """Return the settings of a file, for click's map of defaults.

    Args:
        path: of the file.
        known: the options that it may set, by parameter name. The file's keys may have dashes or underscores.
        ctx: of the command.

    Raises:
        click.UsageError: it is not TOML, or a key or a value is wrong; the message names both, and the nearest key.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path}: {getattr(error, 'strerror', None) or error}.", ctx) from None
    settings: dict[str, object] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        option = known.get(name)
        if option is None:
            raise click.UsageError(f"{path}: {key!r} is no setting. {_advice(name, list(known))}", ctx)
        if name in settings:
            raise click.UsageError(f"{path}: {key!r} is there twice, with a dash and with an underscore.", ctx)
        try:
            settings[name] = _as_typed(value, option)
            option.type_cast_value(ctx, settings[name])
        except click.BadParameter as error:
            raise click.UsageError(f"{path}: {key}: {error.message}", ctx) from None
    return settings


def _advice(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."


def _as_typed(value: object, option: click.Option) -> object:
    """Return a value as it would be typed after its flag, so that one parser checks both."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter("it is neither true nor false.")
        return value
    if isinstance(value, dict) and option.name in ("alias", "map_loss", "mesh"):
        pairs = [f"{_word(name)}={_word(other)}" for name, other in value.items()]
        return pairs if option.multiple else ",".join(pairs)
    if option.multiple:
        return [_word(each) for each in (value if isinstance(value, list) else [value])]
    return _word(value)


def _word(value: object) -> str:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    # Not the value itself, which may be a key.
    raise click.BadParameter(f"it is a {type(value).__name__}, not text or a number.")
