"""How is the text of a setting read?

Each type parses a flag, a variable of the environment or an entry of the file, or fails as wrong usage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from jax_client.errors import BadRequestError
from jax_client.host.places import expand
from jax_client.server.public_url import PublicUrl


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


class Folder(Listed):
    """A directory that is there."""

    name = "directory"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the path, or fail as wrong usage."""
        try:
            path = expand(str(value), "DIR" if param is None else param.opts[0])
        except BadRequestError as error:
            self.fail(str(error), param, ctx)
        if not path.is_dir():
            self.fail(f"{str(path)!r} is no directory; make it, or name one that is there.", param, ctx)
        return path


class Pair(Listed):
    """A name that stands for another: NAME=OTHER; `name` is what the pair is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Parse the text, or fail as wrong usage."""
        name, _, other = str(value).partition("=")
        if not name or not other:
            self.fail(f"{value!r} is no {self.name}; give NAME=OTHER.", param, ctx)
        return name, other


class PublicAddress(click.ParamType):
    """The address of a proxy before a server."""

    name = "url"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> PublicUrl:
        """Parse the text, or fail as wrong usage."""
        try:
            return value if isinstance(value, PublicUrl) else PublicUrl.parse(str(value))
        except BadRequestError as error:
            self.fail(str(error), param, ctx)


class Mesh(click.ParamType):
    """A mesh: auto, or axes with sizes such as fsdp=4,tensor=2."""

    name = "mesh"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
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

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Parse the text, or fail as wrong usage."""
        return None if value == self.word else self._number.convert(value, param, ctx)


class Key(click.ParamType):
    """An API key that the SDK will send."""

    name = "key"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the text; the message does not repeat it."""
        if not re.fullmatch(r"tml-[!-~]+", value):
            self.fail("the key must begin with tml- and hold no spaces; the SDK refuses others.", param, ctx)
        return value
