"""How does a run do, in a few kilobytes? A `Summary` has its newest figures, its sums, and two thinned curves.

The store keeps one for each run and adds to it what it writes, so that a list of runs reads one row of each, however
many points they have. A log directory's rows make one in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar

from jax_client.values import JsonObject

# Of the newest steps that are kept one by one, and of a thinned curve.
RECENT = 64
CURVE = 60
# The mean loss of a token and the reward have many names in what loops log; the first that is there counts.
LOSSES = ("loss:mean", "train_mean_nll", "loss", "train/loss", "loss/mean", "train_loss", "nll")
REWARDS = ("reward/mean", "reward", "env/all/reward/total", "env/all/reward", "mean_reward", "reward_mean")
KLS = ("kl_sample_train:mean", "optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "kl_sample_train")
REWARD_ENDINGS = ("reward/total", "reward/mean", "/reward")
# Points and events of these kinds are an engine's, of all its runs together.
OF_ENGINES = ("device", "compile")
MAX_REASON = 300
# Clocks of two threads or hosts differ by less; one that was put back by more ran ahead before, seconds.
AHEAD_SECONDS = 10.0
T = TypeVar("T")


@dataclass(slots=True)
class Curve:
    """At most `CURVE` evenly spread values of a series that grows."""

    values: list[float] = field(default_factory=list)
    stride: int = 1
    count: int = 0
    last: float | None = None

    def add(self, value: float) -> None:
        """Append a value, and leave every second one out where there are too many."""
        if self.count % self.stride == 0:
            self.values.append(value)
            if len(self.values) >= CURVE:
                self.values, self.stride = self.values[::2], self.stride * 2
        self.count += 1
        self.last = value

    def shown(self) -> list[float]:
        """Return the values, the newest among them."""
        complete = self.last is None or (self.count - 1) % self.stride == 0
        return self.values if complete or self.last is None else [*self.values, self.last]


@dataclass(slots=True)
class Summary:
    """What is known of a run from its points and events.

    Attributes:
        first, active: unix seconds of its first and newest sign of life.
        started: unix seconds at which it was opened last, None where that was not recorded.
        step: optimizer steps taken at the newest point.
        steps, skipped, nonfinite: points of a step; steps left out for their gradient; values that were not finite.
        bad: step and time of the newest of the latter two.
        tokens: scored, of all steps.
        speed: tokens per second of the newest step.
        times: of the newest steps.
        losses, rewards, kls: (step, value) of the newest steps.
        loss_curve, reward_curve: of all steps.
        compiling: the program that is being compiled, "" for none.
        ended: {"time", "how", "text"} of the newest end, None while it is open.
    """

    first: float | None = None
    active: float | None = None
    started: float | None = None
    step: int = 0
    steps: int = 0
    skipped: int = 0
    nonfinite: int = 0
    bad: list[float] | None = None
    tokens: float = 0.0
    speed: float | None = None
    times: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    kls: list[list[float]] = field(default_factory=list)
    loss_curve: Curve = field(default_factory=Curve)
    reward_curve: Curve = field(default_factory=Curve)
    compiling: str = ""
    ended: JsonObject | None = None

    @property
    def loss(self) -> float | None:
        """The mean loss of a token at the newest step that has one."""
        return self.losses[-1][1] if self.losses else None

    @property
    def reward(self) -> float | None:
        """The newest reward."""
        return self.rewards[-1][1] if self.rewards else None

    def add_point(self, kind: str, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Add what a point of a kind says."""
        self._alive(time)
        if kind == "device":
            return
        if kind == "step":
            self.step = step
        elif not self.steps:  # a loop may count its own way
            self.step = max(self.step, step)
        bad = sum(int(value) for name, value in metrics.items() if name.startswith("nonfinite/"))
        if kind == "step":
            self.steps += 1
            _keep(self.times, round(time, 3))
            skipped = int("skipped_nonfinite:sum" in metrics)
            self.skipped += skipped
            bad += skipped
            self.tokens += metrics.get("tokens:sum", 0.0)
            self.speed = metrics.get("tokens_per_second:mean", self.speed)
        self.nonfinite += bad
        if bad:
            self.bad = [step, time]
        if kind in ("step", "user"):
            self._add_values(kind, step, metrics)

    def add_event(self, kind: str, step: int, time: float, details: Mapping[str, object]) -> None:
        """Add what an event says."""
        if kind == "end":
            how, text = details.get("how", "closed"), details.get("text", "")
            self.ended = {"time": time, "how": str(how), "text": str(text)[:MAX_REASON]}
            self.compiling = ""
            return
        if kind == "start":
            self.ended, self.started = None, time
        if kind in ("start", "load"):
            self.step = step
        self._alive(time)

    def add_sign(self, time: float, compiling: str) -> None:
        """Add that the run is alive; it compiles a program, "" for none."""
        self._alive(time)
        self.compiling = compiling

    def _alive(self, time: float) -> None:
        self.first = time if self.first is None else min(self.first, time)
        # Where the clock ran ahead and was put right, what it said before is not newer.
        put_back = self.active is not None and time < self.active - AHEAD_SECONDS
        self.active = time if self.active is None or put_back else max(self.active, time)

    def _add_values(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        loss = mean_loss(metrics) if kind == "step" else first_of(metrics, LOSSES)
        # A loop that logs its loss beside the recorded one has it already.
        if loss is not None and (kind == "step" or not self.steps):
            _keep(self.losses, [step, loss])
            self.loss_curve.add(loss)
        if (reward := find_reward(metrics)) is not None:
            _keep(self.rewards, [step, reward])
            self.reward_curve.add(reward)
        if (kl := first_of(metrics, KLS)) is not None:
            _keep(self.kls, [step, kl])

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them, not copied: this is done at every write."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: asdict(value) if isinstance(value, Curve) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: JsonObject) -> Summary:
        """Undo `to_json`. Raises TypeError or KeyError for what is none."""
        curves = {name: Curve(**values[name]) for name in ("loss_curve", "reward_curve")}
        return cls(**{**values, **curves})


def mean_loss(metrics: Mapping[str, float]) -> float | None:
    """Return the mean loss of a token of a point, None where it has none."""
    tokens = metrics.get("tokens:sum", 0.0)
    if tokens > 0 and "loss:sum" in metrics:
        return metrics["loss:sum"] / tokens
    return first_of(metrics, LOSSES)


def find_reward(metrics: Mapping[str, float]) -> float | None:
    """Return the reward among metrics, None where none has a name of one."""
    name = reward_name([name for name, value in metrics.items() if math.isfinite(value)])
    return None if name is None else metrics[name]


def reward_name(names: Collection[str]) -> str | None:
    """Return the name among these that is the reward's, None where none is."""
    known = next((name for name in REWARDS if name in names), None)
    return known or min((name for name in names if name.endswith(REWARD_ENDINGS)), default=None)


def first_of(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """Return the value of the first of the names that is there and finite."""
    for name in names:
        if (value := metrics.get(name)) is not None and math.isfinite(value):
            return value
    return None


def newest_sign(times: Iterable[float | None], now: float) -> float | None:
    """Return the newest of some unix seconds, None where there is none.

    What lies ahead of `now` is left out: it is of a clock that was wrong, and says nothing of the time since then.
    """
    return max((time for time in times if time is not None and time <= now + AHEAD_SECONDS), default=None)


def _keep(values: list[T], value: T) -> None:
    values.append(value)
    if len(values) > RECENT:
        del values[0]
