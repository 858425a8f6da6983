"""Where is this user's home directory? A container's user may have none, and then only named directories are left."""

from __future__ import annotations

import os
from pathlib import Path

from jax_client.errors import BadRequestError


def home() -> Path | None:
    """Return the home directory: `$HOME`, else the one of the passwd entry; None where there is neither."""
    found = os.path.expanduser("~")
    return None if found == "~" else Path(found)


def expand(path: str | os.PathLike[str], setting: str) -> Path:
    """Return a path with a leading `~` or `~user` replaced by that user's home directory.

    Args:
        path: as the user gave it.
        setting: where the user gave it, for the message.

    Raises:
        BadRequestError: that user has no home directory.
    """
    given = os.fspath(path)
    expanded = os.path.expanduser(given)
    if given.startswith("~") and expanded == given:
        raise BadRequestError(
            f"{setting} is {given!r}, but {given.partition('/')[0]!r} stands for no home directory here"
            f"{_who() if given.startswith('~/') or given == '~' else ''}. Give the path without the '~'; a name that "
            f"begins with it is written ./{given}."
        )
    return Path(expanded)


def needs_home(contents: str, settings: str) -> str:
    """Return the message for something that lies in the home directory where there is none.

    Args:
        contents: such as "checkpoints".
        settings: what the user can set instead.
    """
    advice = f"Set {settings} to a directory that this user may write to."
    return f"there is no home directory for {contents}{_who()}. {advice}"


def _who() -> str:
    return f" (HOME is not set, and user id {os.getuid()} has no passwd entry)"
