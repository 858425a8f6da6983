"""How do metrics reach wandb, trackio or TensorBoard? Each has a thread, so that none of them can slow a step.

What a tracker raises is logged once, and the run goes without it. A tracker that hangs loses its newest metrics: they
wait in a bounded queue, and the end of the program waits a few seconds.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jax_client.host.program import error_in_words
from jax_client.host.reporting import package_of
from jax_client.metrics.summary import mean_loss
from jax_client.threads import BatchWriter
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)
MOST_WAITING = 10_000
# Most that the end of a session, or of the process, waits for a tracker; one that was late is not waited for twice.
FLUSH_SECONDS = 10.0
PROJECT = "jax_client"
KINDS = ("step", "user")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a tracker is told of a run: its id, its name, its configuration, and where its files may go."""

    run: str
    name: str
    config: JsonObject
    state_dir: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    facts: RunFacts
    step: int
    time: float
    metrics: Mapping[str, float]
    last: bool = False


class Tracked(Protocol):
    """One run as a tracker knows it."""

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Add metrics."""
        ...

    def finish(self) -> None:
        """Write what is left."""
        ...


class Export:
    """One tracker, and the runs that it knows. What is called neither waits nor raises.

    Args:
        tracker: its name.
        begin: `f(facts) -> Tracked`; by default what its package does.
    """

    def __init__(self, tracker: str, begin: Callable[[RunFacts], Tracked] | None = None) -> None:
        self.tracker = tracker
        self._begin = begin or _BEGIN[tracker]
        self._runs: dict[str, Tracked | None] = {}
        self._complained = False
        self._late = False
        self._writer: BatchWriter[_Row] = BatchWriter(
            f"jax_client-{tracker}", self._write, seconds=0.5, most=1_000, capacity=MOST_WAITING
        )

    def put(self, facts: RunFacts, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Hand metrics on; where too many wait, they are dropped."""
        loss = mean_loss(metrics) if "loss:sum" in metrics else None
        self._writer.put(
            _Row(facts=facts, step=step, time=time, metrics=metrics if loss is None else {"loss": loss, **metrics})
        )

    def end(self, facts: RunFacts) -> None:
        """Finish a run."""
        self._writer.put(_Row(facts=facts, step=0, time=0.0, metrics={}, last=True))

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until what was put is handed over, `timeout` seconds at most; return whether it is."""
        if not self._late:
            self._late = not self._writer.flush(timeout)
        return not self._late

    def close(self) -> None:
        """Finish every run, and have the thread end; do not wait for it."""
        for run in list(self._runs):
            self._writer.put(_Row(facts=_nameless(run), step=0, time=0.0, metrics={}, last=True))
        self._writer.end()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process: the runs are the parent's."""
        self._runs = {}
        self._writer.restart_in_fork()

    def _write(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            try:
                if row.last:
                    if (tracked := self._runs.pop(row.facts.run, None)) is not None:
                        tracked.finish()
                    continue
                if row.facts.run not in self._runs:
                    self._runs[row.facts.run] = None  # once, also where it fails
                    self._runs[row.facts.run] = self._begin(row.facts)
                if (tracked := self._runs[row.facts.run]) is not None:
                    tracked.log(row.step, row.time, row.metrics)
            except (Exception, SystemExit) as error:
                # Once: what fails here fails at every step.
                if not self._complained:
                    self._complained = True
                    logger.warning("metrics could not be exported to %s: %s", self.tracker, error_in_words(error))
                    logger.debug("where that failed", exc_info=True)


def _nameless(run: str) -> RunFacts:
    return RunFacts(run=run, name="", config={}, state_dir=Path())


class _Wandb:
    def __init__(self, facts: RunFacts) -> None:
        module = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = module.init(
            project=project, name=facts.name, config=facts.config, dir=str(facts.state_dir), reinit="create_new"
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, facts: RunFacts) -> None:
        module = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = module.init(project=project, name=facts.name, config=facts.config, embed=False)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, facts: RunFacts) -> None:
        module = importlib.import_module(package_of("tensorboard") or "tensorboardX")
        folder = facts.state_dir / "tensorboard" / facts.run.replace(":", "-")
        self._writer = module.SummaryWriter(str(folder))
        self._writer.add_text("run", f"{facts.name} ({facts.run})")

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step, walltime=time)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


_BEGIN: dict[str, Callable[[RunFacts], Tracked]] = {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}


class Exports:
    """The trackers of this process, each begun when a run first names it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Export] = {}

    def of(self, trackers: Sequence[str]) -> list[Export]:
        """Return the trackers of these names."""
        with self._lock:
            return [self._known.setdefault(name, Export(name)) for name in trackers]

    def flush(self) -> None:
        """Wait until each has what was put, a few seconds at most."""
        for export in list(self._known.values()):
            export.flush()

    def end(self) -> None:
        """Have every thread end once its runs are finished."""
        for export in list(self._known.values()):
            export.close()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process."""
        self._lock = threading.Lock()
        for export in self._known.values():
            export.restart_in_fork()
