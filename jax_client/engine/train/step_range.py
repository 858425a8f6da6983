"""Which setting took an optimizer step out of float32's range? The one without which the step stays in it.

The same compiled program takes the step again, with one setting after another replaced by a harmless value. Only a step
that failed costs this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.core.turns import Task
from jax_client.engine.train.programs import StepMetrics
from jax_client.errors import RequestFailedError

# In this order: at rate 0 any step stays where it is, so the others are asked first. Clipping only shrinks a step.
_HARMLESS = {"weight_decay": 0.0, "eps": 1e-8, "beta1": 0.9, "beta2": 0.999, "learning_rate": 0.0}


def failure(
    take: Callable[[AdamSettings], Task[tuple[Any, StepMetrics, Any]]],
    settings: AdamSettings,
    metrics: StepMetrics,
    step: int,
) -> Task[RequestFailedError]:
    """Yield-from: return the error of a step that left float32's range.

    Args:
        take: `f(settings) -> task` that computes the step, and changes nothing.
        settings: of the step that failed.
        metrics: of that step, on the host.
        step: steps taken before it.
    """
    cause = None
    for name, value in _HARMLESS.items():
        if cause is None and getattr(settings, name) != value:
            _, tried, _ = yield from take(replace(settings, **{name: value}))
            cause = name if tried["in_range"] else None
    norms = f"the norm of the update is {metrics['update_norm']:.3g}, that of the gradient {metrics['grad_norm']:.3g}"
    if cause is None:
        subject = f"the gradient and these settings together, {settings},"
        remedy = "Look at the data and the settings, or load the last good checkpoint."
    else:
        subject = f"{cause} {getattr(settings, cause):.9g}"
        toward = "Raise" if cause == "eps" else "Change" if cause.startswith("beta") else "Lower"
        remedy = f"{toward} {cause} and call optim_step again."
    return RequestFailedError(
        f"optim_step: {subject} would take the weights out of float32's range ({norms}; the largest is 1.8e+19). The "
        f"weights are those of step {step}, and the accumulated gradient is kept. {remedy}",
        category="user",
    )
