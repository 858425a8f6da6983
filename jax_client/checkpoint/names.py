"""Which names can a run and a checkpoint have, and in which directory is each?

Names come from users and from the network. Only names of these forms become part of a path: they hold no separator,
are never "." or "..", and never begin with the dot of a temporary directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from jax_client.errors import BadRequestError

NAME_FORM = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
RUN_ID_FORM = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
KINDS = ("weights", "sampler_weights")


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
