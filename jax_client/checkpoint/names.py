"""Which names can a run and a checkpoint have, and in which directory is each?

    STATE/catalogue.sqlite                      what the files said when they were last listed
    STATE/runs/RUN/run.json                     what is known of a run, sealed
    STATE/runs/RUN/KIND/NAME/000001/            one version of a checkpoint; the highest number counts
                                    arrays/     orbax; of an export, files/ instead
                                    manifest.json
                                    label.json  what can change afterwards; often there is none

Names come from users and from the network. Only names of these forms become part of a path: they hold no separator,
are never "." or "..", and never begin with the dot of a temporary directory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from jax_client.errors import BadRequestError

NAME_FORM = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
RUN_ID_FORM = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
KINDS = ("weights", "sampler_weights", "external_weights")


def is_name(text: str) -> bool:
    """Say whether `text` has the form of a checkpoint's name."""
    return re.fullmatch(NAME_FORM, text) is not None


def is_run_id(text: str) -> bool:
    """Say whether `text` has the form of a run id."""
    return re.fullmatch(RUN_ID_FORM, text) is not None


def run_directory(runs: Path, run_id: str) -> Path:
    """Return the directory of a run; the colons of its id are written as %3A.

    Raises:
        BadRequestError: the id has another form.
    """
    if not isinstance(run_id, str) or not is_run_id(run_id):
        raise BadRequestError(f"run_id is {run_id!r}; give an id of the form {RUN_ID_FORM}.")
    return runs / quote(run_id, safe="")


def run_id_of(directory: Path) -> str | None:
    """Return the run whose directory this is, None for anything else."""
    run_id = unquote(directory.name)
    return run_id if is_run_id(run_id) and quote(run_id, safe="") == directory.name else None


def checkpoint_directory(runs: Path, run_id: str, kind: str, name: str) -> Path:
    """Return the directory of a checkpoint.

    Raises:
        BadRequestError: the id, the kind or the name has another form.
    """
    if kind not in KINDS:
        raise BadRequestError(f"kind is {kind!r}; give one of {', '.join(KINDS)}.")
    if not isinstance(name, str) or not is_name(name):
        raise BadRequestError(f"name is {name!r}; give a name of the form {NAME_FORM}.")
    return run_directory(runs, run_id) / kind / name


def children(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted, without the dotted names; nothing where there is none."""
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def versions(directory: Path) -> list[Path]:
    """Return the versions of a checkpoint, oldest first."""
    found = [path for path in children(directory) if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def newest_version(directory: Path) -> Path | None:
    """Return the version of a checkpoint that counts."""
    return (versions(directory) or [None])[-1]
