"""Which names of base models may a client send? Hub names, the operator's own, and paths below named directories.

A path of another file is refused with the same words whether there is such a file or not: an answer shows neither a
listing nor a byte of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, shown
from jax_client.host import places
from jax_client.weights.read import hf
from jax_client.weights.read.gguf import GGUF_MAGIC
from jax_client.weights.read.source import HUB_NAME, base_name, local_models

MAX_NAME = 4_096


class ModelNames:
    """The names of base models that clients may send.

    Args:
        aliases: names that stand for others.
        named: the models that the operator named.
        directories: below which a client may name a path; None lets it name any, for clients who could read the files
            themselves.
    """

    def __init__(
        self,
        aliases: Mapping[str, str] | None = None,
        named: Iterable[str] = (),
        directories: Sequence[Path] | None = None,
    ) -> None:
        self._aliases = dict(aliases or {})
        operators = {*named, *self._aliases.values()}
        self._paths = frozenset(path for name in operators if (path := _path(name)) is not None)
        self._directories = None if directories is None else [os.path.abspath(each) for each in directories]

    def alias(self, name: str) -> str:
        """Return the base model that a name of the operator's stands for."""
        base = base_name(name)
        return self._aliases.get(name) or self._aliases.get(base, base)

    def meaning(self, name: str) -> str:
        """Return the base model that a client's name stands for.

        Raises:
            BadRequestError: the name is too long, or a path that clients may not name.
            NotFoundError: there is no model at the path.
        """
        if len(name) > MAX_NAME:
            raise BadRequestError(f"base_model has {len(name):,} characters, the limit is {MAX_NAME:,}.")
        meant = self.alias(name)
        # An empty name, and one that cannot be a file's, is refused where it is looked for.
        if self._directories is None or not meant.strip() or "\0" in meant:
            return meant
        path = _path(meant)
        if path is None or _is_hub_name(meant, path):
            return meant
        if path not in self._paths and not self._is_below(path):
            raise BadRequestError(
                f"base_model is {shown(name)}, a path that clients of this server may not name. Give a hub name "
                "(organisation/model), a model that the server was started with, or a path below a directory that "
                "--models-dir names."
            )
        if not _is_model(path):
            raise NotFoundError(
                f"base_model is {shown(name)}, and there is no model: give a directory with {hf.CONFIG} and "
                "safetensors, or a .gguf file."
            )
        return meant

    def _is_below(self, path: str) -> bool:
        """Return whether a path is below a directory of the operator's; links in there are the operator's own."""
        return any(path != each and os.path.commonpath([path, each]) == each for each in self._directories or ())


def _path(name: str) -> str | None:
    """Return the path that a name would be looked for at, None for none."""
    try:
        return os.path.abspath(places.expand(name, "base_model"))
    except (JaxClientError, ValueError):
        return None


def _is_hub_name(name: str, path: str) -> bool:
    """Return whether a name means a model of the hub, and no file below the server's working directory."""
    if not HUB_NAME.fullmatch(name) or name.endswith(".gguf"):
        return False
    # A folder of a hub model's name with a tokenizer alone changes nothing, but what is in another would be shown.
    return not os.path.exists(path) or (
        os.path.isdir(path) and not hf.has_weights(Path(path)) and name in local_models()
    )


def _is_model(path: str) -> bool:
    """Return whether a path has a model's files; what else is there, no answer shows."""
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
        return os.path.isfile(os.path.join(path, hf.CONFIG)) and hf.has_weights(Path(path))
    except OSError:
        return False
