"""What should a person look at? Rules over what a run's summary says, each with a limit that seldom rings in vain."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from jax_client.metrics.summary import Summary, newest_sign
from jax_client.runs.overview.records import Alert

LOSS_TIMES_MEDIAN = 3.0
# Steps before a median means something, and how many of the newest are compared with it.
LEAST_STEPS = 10
NEWEST = 5
FLAT_STEPS = 10
MAX_KL = 0.01
SILENT_SECONDS = 300.0
SILENT_STEPS = 20.0
LEAST_FREE = 0.05


def alerts_of(summary: Summary, *, is_open: bool, now: float, free: float | None = None) -> list[Alert]:
    """Return the alerts of a run.

    Args:
        summary: of the run.
        is_open: whether a process has it open.
        now: unix seconds.
        free: the free share of the disk where its checkpoints go, None where that is not known.
    """
    found = [*_nonfinite(summary), *_loss(summary), *_reward(summary), *_kl(summary)]
    if is_open:
        found += [*_silent(summary, now), *_disk(free, now)]
    return found


def _nonfinite(summary: Summary) -> Sequence[Alert]:
    if not summary.nonfinite or summary.bad is None:
        return ()
    step, time = int(summary.bad[0]), summary.bad[1]
    if summary.skipped:
        text = f"{_count(summary.skipped, 'step was', 'steps were')} skipped: the gradient was not finite"
    else:
        text = f"{_count(summary.nonfinite, 'value was', 'values were')} NaN or infinite"
    return (Alert(kind="nonfinite", text=f"{text} (the newest at step {step}).", step=step, time=time),)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _loss(summary: Summary) -> Sequence[Alert]:
    if len(summary.losses) < LEAST_STEPS:
        return ()
    median = statistics.median(loss for _, loss in summary.losses)
    high = [(step, loss) for step, loss in summary.losses[-NEWEST:] if 0 < LOSS_TIMES_MEDIAN * median < loss]
    if not high:
        return ()
    step, loss = high[-1]
    text = f"The loss was {loss:.4g} at step {int(step)}, over {LOSS_TIMES_MEDIAN:g} x its median of {median:.4g}."
    return (Alert(kind="loss", text=text, step=int(step)),)


def _reward(summary: Summary) -> Sequence[Alert]:
    newest = summary.rewards[-FLAT_STEPS:]
    if len(newest) < FLAT_STEPS or newest[-1][1] not in (0.0, 1.0) or len({reward for _, reward in newest}) > 1:
        return ()
    step, reward = newest[-1]
    text = f"The reward has been {reward:g} for {FLAT_STEPS} steps or more: there is nothing to learn from."
    return (Alert(kind="reward", text=text, step=int(step)),)


def _kl(summary: Summary) -> Sequence[Alert]:
    if not summary.kls or abs(summary.kls[-1][1]) <= MAX_KL:
        return ()
    step, kl = summary.kls[-1]
    text = f"The KL between sampler and trainer was {kl:.3g} at step {int(step)}, over {MAX_KL:g}."
    return (Alert(kind="kl", text=text, step=int(step)),)


def _silent(summary: Summary, now: float) -> Sequence[Alert]:
    times = summary.times
    if not times or summary.compiling:
        return ()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    limit = max(SILENT_SECONDS, SILENT_STEPS * statistics.median(gaps) if gaps else 0.0)
    # A run that is loaded again was not open meanwhile.
    since = newest_sign((*times, summary.started), now)
    if since is None or now - since <= limit:
        return ()
    text = f"No step for {(now - since) / 60:.0f} minutes, though the run is open."
    return (Alert(kind="silent", text=text, step=summary.step, time=since),)


def _disk(free: float | None, now: float) -> Sequence[Alert]:
    if free is None or free >= LEAST_FREE:
        return ()
    text = f"The disk of the checkpoints is {100 * (1 - free):.0f} % full."
    return (Alert(kind="disk", text=text, time=now),)
