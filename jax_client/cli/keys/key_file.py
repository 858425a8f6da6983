"""How does a server read its file of keys? It closes the file to other users first, or refuses it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jax_client.cli import stages
from jax_client.errors import JaxClientError

if TYPE_CHECKING:
    from jax_client.server.wire.keys import Key


def read_key_file(path: Path) -> list[Key]:
    """Return the keys of a file.

    Raises:
        click.ClickException: it is no file of keys, or cannot be read; it is another user's, root's excepted; others
            may write or read it, and it is not this user's to close.
    """
    from jax_client.server.wire.keys import read_keys

    try:
        _make_private(path)
        return read_keys(path)
    except JaxClientError as error:
        raise click.ClickException(f"--api-key-file: {error}") from None
    except OSError as error:
        raise click.ClickException(
            f"--api-key-file: {path} cannot be read ({error.strerror}); name a file of this user's, with a line for "
            "each key. 'jax_client key NAME' prints one."
        ) from None


def _make_private(path: Path) -> None:
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise click.ClickException(f"--api-key-file: {path} is no file; name one with a line for each key.")
    if status.st_uid not in (0, os.geteuid()):
        # Closed to others or not: its owner may let in anyone.
        raise click.ClickException(
            f"--api-key-file: {path} belongs to user {status.st_uid}, who may change it at any time; copy it to a file "
            f"of your own, or run chown {os.geteuid()} {path}."
        )
    if not mode & 0o077:
        return
    try:
        os.chmod(path, mode & 0o700)
    except OSError as error:
        raise click.ClickException(
            f"--api-key-file: {path} has mode {mode:04o}, so that other users may use it, and could not be closed "
            f"({error.strerror}); do so with chmod 600 {path}, or copy it to a file of your own."
        ) from None
    stages.say(f"{path} had mode {mode:04o}; now it is this user's only")
