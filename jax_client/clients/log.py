"""How does a loop record figures of its own, such as a reward? `jax_client.log` adds them to the run that it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, SupportsFloat

from jax_client.errors import BadRequestError, BadTypeError, shown
from jax_client.metrics.store import MAX_KEYS, MAX_STEP, MAX_TEXT
from jax_client.runs.results import run_metrics

if TYPE_CHECKING:
    from jax_client.clients.training import TrainingClient
    from jax_client.runs.results.run_metrics import RunMetrics

_OPEN = "service_client.create_lora_training_client(...)"


def log(metrics: Mapping[str, SupportsFloat], step: int | None = None, run: TrainingClient | str | None = None) -> None:
    """Record numbers of your own in a run of this process; they are shown, exported and kept with the run's.

    Returns at once, from any thread, and is written beside the training. A number that is NaN or infinite is counted
    as `nonfinite/NAME`. A reward is found by its name: reward, reward/mean, or one that ends with /reward.

    Args:
        metrics: numbers by name, at most 256, such as {"reward/mean": 0.5}; arrays of one element are numbers.
        step: of the run; None is its newest.
        run: its TrainingClient, or its id; not needed while the process has one open run.

    Raises:
        BadTypeError: something else than numbers by name.
        BadRequestError: too many or too long names, a step that is not from 0 to 2**53, or no such run; the message has
            what to do.
    """
    values = _numbers(metrics)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP):
        raise BadRequestError(f"log: step is {shown(step)}; give an integer from 0 to 2**53, or None.")
    _find(run).logged(values, step)


def _numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise BadTypeError(f"log: metrics is {type(metrics).__name__}; give a dictionary of numbers by name.")
    if len(metrics) > MAX_KEYS:
        raise BadRequestError(f"log: metrics has {len(metrics)} names; give at most {MAX_KEYS}.")
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TEXT:
            raise BadRequestError(f"log: the name {shown(name)} is no text of 1 to {MAX_TEXT} characters.")
        if isinstance(value, str | bytes):
            raise BadTypeError(f"log: metrics[{name!r}] is text, {shown(value)}; give a number.")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise BadTypeError(f"log: metrics[{name!r}] is {shown(value)}; give a number.") from None
        if math.isfinite(number):
            values[name] = number
        else:
            values[f"nonfinite/{name}"[:MAX_TEXT]] = 1.0
    return values


def _find(run: TrainingClient | str | None) -> RunMetrics:
    known = run_metrics.live()
    if run is not None:
        run_id = run if isinstance(run, str) else getattr(run, "model_id", None)
        found = [each for each in known if each.run_id == run_id]
        if found:
            return found[0]
        raise BadRequestError(
            f"log: run {shown(run_id)} is not open in this process, or records nothing (record_metrics=False). Give "
            f"the client that {_OPEN} returned here."
        )
    if len(known) == 1:
        return known[0]
    if known:
        names = ", ".join(each.run_id for each in known[:3])
        raise BadRequestError(
            f"log: this process has {len(known)} open runs ({names}); give run=, the TrainingClient that is meant."
        )
    raise BadRequestError(
        f"log: this process has no open run. Make one first ({_OPEN}); where a server trains, write metrics.jsonl and "
        "let 'jax_client runs list --logs DIR' read it."
    )
