"""In which directory is each run, checkpoint and version? The directories carry the names of the key.

    STATE/catalogue.sqlite                      what the files said when they were last listed
    STATE/runs/RUN/run.json                     what is known of a run, sealed
    STATE/runs/RUN/KIND/NAME/000001/            one version of a checkpoint; the highest number counts
                                    arrays/     orbax; of an export, files/ instead
                                    manifest.json
                                    label.json  what can change afterwards; often there is none

A `CheckpointKey` has names that may become part of a path. They never begin with the dot of a temporary directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

from jax_client.errors import BadRequestError
from jax_client.values import RUN_ID_FORM, CheckpointKey, is_run_id


def run_directory(runs: Path, run_id: str) -> Path:
    """Return the directory of a run; the colons of its id are written as %3A.

    Raises:
        BadRequestError: the id has another form.
    """
    if not is_run_id(run_id):
        raise BadRequestError(f"run_id is {run_id!r}; give an id of the form {RUN_ID_FORM}.")
    return runs / quote(run_id, safe="")


def run_id_of(directory: Path) -> str | None:
    """Return the run whose directory this is, None for anything else."""
    run_id = unquote(directory.name)
    return run_id if is_run_id(run_id) and quote(run_id, safe="") == directory.name else None


def place(key: CheckpointKey) -> str:
    """Return RUN/KIND/NAME, where a checkpoint is below the runs."""
    return f"{quote(key.run_id, safe='')}/{key.checkpoint_id}"


def run_ids(runs: Path) -> list[str]:
    """Return the runs that have a directory, sorted."""
    ids = (run_id_of(path) for path in children(runs))
    return sorted(run_id for run_id in ids if run_id is not None)


def checkpoint_directory(runs: Path, key: CheckpointKey) -> Path:
    """Return the directory of a checkpoint."""
    return runs / place(key)


def children(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted, without the dotted names; nothing where there is none."""
    return [directory / name for name in _names(directory)]


def _names(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def versions(directory: Path) -> list[Path]:
    """Return the versions of a checkpoint, oldest first."""
    found = [path for path in children(directory) if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def newest_version(directory: Path) -> Path | None:
    """Return the version of a checkpoint that counts."""
    # By names alone: a listing asks this of every checkpoint.
    numbers = [name for name in _names(directory) if name.isascii() and name.isdigit()]
    return directory / max(reversed(numbers), key=int) if numbers else None
