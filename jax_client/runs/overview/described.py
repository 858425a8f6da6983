"""What do a run's own records say of its name, its model and its origin? Runs of earlier versions say less."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TypedDict

from jax_client.errors import BadRequestError, BadTypeError
from jax_client.metrics.summary import Summary
from jax_client.values import CheckpointKey, JsonObject
from jax_client.weights.read.source import mended_name

MAX_NAME = 200


class Spark(TypedDict):
    """The thinned curve that a list shows, and what it is of."""

    spark: Sequence[float]
    spark_name: str | None


def run_name(run_id: str, fields: JsonObject, created: float | None) -> str:
    """Return what people call a run: its own name, its session's, else its script and date, else its id's beginning."""
    own, session = (fields.get(name) or {} for name in ("user_metadata", "session_metadata"))
    for name in (own.get("name"), fields.get("display_name"), session.get("name")):
        if isinstance(name, str) and name.strip():
            return name.strip()[:MAX_NAME]
    if (script := fields.get("script")) and created is not None:
        return f"{script} {time.strftime('%m-%d %H:%M', time.localtime(created))}"
    return run_id[:8] + (run_id[run_id.find(":") :] if ":" in run_id else "")


def origin(fields: JsonObject) -> str | None:
    """Return the checkpoint that a run was made from."""
    found = fields.get("resumed_from")
    return found if isinstance(found, str) else None


def run_of(path: str | None) -> str | None:
    """Return the run of a checkpoint's path."""
    try:
        return None if path is None else CheckpointKey.parse(path).run_id
    except (BadRequestError, BadTypeError):
        return None


def children(origins: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the runs that were made from the checkpoints of each run, by its id, given the origin of each."""
    found: dict[str, list[str]] = {}
    for run, path in sorted(origins.items()):
        if (parent := run_of(path)) is not None and parent != run:
            found.setdefault(parent, []).append(run)
    return found


def model_of(metadata: JsonObject) -> str | None:
    """Return the base model's name."""
    name = metadata.get("base_model")
    return mended_name(name) if isinstance(name, str) else None


def rank_of(metadata: JsonObject) -> int | None:
    """Return the rank of the adapter."""
    spec = metadata.get("spec")
    return spec.get("rank") if isinstance(spec, dict) else None


def spark_of(summary: Summary) -> Spark:
    """Return the curve of a list: the reward where there is one, else the loss."""
    if summary.reward_curve.values:
        return {"spark": summary.reward_curve.shown(), "spark_name": "reward"}
    if summary.loss_curve.values:
        return {"spark": summary.loss_curve.shown(), "spark_name": "loss"}
    return {"spark": (), "spark_name": None}
