"""How does what a run does become points and events in the metrics file, off the path of its steps?

A run puts what its answers carry into a bounded queue, which costs microseconds. One thread of the process takes it
out, a batch at a time, adds what the engine says of itself (memory, sampling, compiles), and writes it. Where the queue
is full, what comes is dropped and counted: training waits for nothing here.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jax_client import interpreter_end, process
from jax_client.engine.protocol import Monitor, Usage
from jax_client.metrics.store import FILE_NAME, Event, MetricsStore, Point, Sign
from jax_client.metrics.summary import find_reward, mean_loss
from jax_client.process import Step
from jax_client.runs.results.reports import NOWHERE, Reporting, Reports
from jax_client.threads import BatchWriter

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
# How long the thread lets a batch grow.
BATCH_SECONDS = 0.5
# Most that the end of a session, or of the process, waits for the file.
FLUSH_SECONDS = 2.0
# Kept one by one until the step that they belong to.
MOST_PASSES = 1_000
# After this time without a request that ended, the thread looks whether the engines work.
TICK_SECONDS = 10.0
SAVES = ("save", "autosave", "export")
PARTS = ("queue", "host", "compile", "device")


@dataclass(slots=True)
class Totals:
    """What a run has done since it was opened in this process.

    Attributes:
        steps, skipped: optimizer steps taken, and left out for a gradient that was not finite.
        passes: calls with a gradient.
        scored_tokens, input_tokens: those with a loss, and all of the calls with a gradient.
        seconds: of the steps, by part.
    """

    steps: int = 0
    skipped: int = 0
    passes: int = 0
    scored_tokens: float = 0.0
    input_tokens: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    run: RunMetrics
    topic: Literal["pass", "score", "step", "event", "user"]
    time: float
    metrics: Mapping[str, Any]
    kind: str = ""
    step: int | None = None


class RunMetrics:
    """One run as it is observed. What is called does not wait and does not raise.

    Args:
        run_id: `SESSION:train:N`.
        monitor: of the engine, whose memory, sampling and compiles are recorded with the run.
        state_dir: where the file is.
        step: optimizer steps that the run starts with.
        recorder: None observes nothing.
        reporting: where else its metrics and alerts go.

    Attributes:
        totals, newest: what it has done, and the newest metrics by name; of the recorder's thread.
        reward: the newest, where the user logs one.
    """

    def __init__(
        self,
        run_id: str,
        monitor: Monitor,
        state_dir: Path,
        step: int,
        recorder: MetricsWriter | None,
        reporting: Reporting = NOWHERE,
    ) -> None:
        self.run_id = run_id
        self.monitor = monitor
        self.state_dir = state_dir
        self.path = state_dir / FILE_NAME
        self.reporting = reporting
        self.step = step
        self.totals = Totals()
        self.newest: Mapping[str, float] = {}
        self._recorder = recorder
        self._passes: list[Mapping[str, float]] = []
        self.reward: float | None = None
        self._opened = time.time()
        self._over = False
        self._sampling: Mapping[str, float] | None = None
        self._compiles = 0
        self._compiling = ""
        self._hosts: dict[str, object] = {}

    def passed(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a call with a gradient."""
        self._put("pass", metrics)

    def scored(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a call without a gradient."""
        self._put("score", metrics)

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimizer step."""
        self._put("step", metrics)

    def logged(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Note metrics of the user's own, at the step, or at the newest one."""
        self._put("user", metrics, step=step)

    def event(self, kind: str, step: int | None = None, **details: Any) -> None:
        """Note that something happened, now or at the step, and tell the log."""
        told = ", ".join(f"{name} {details[name]}" for name in ("base_model", "origin", "path") if details.get(name))
        logger.info(
            "run %s: %s at step %d%s", self.run_id, kind, self.step if step is None else step, told and f", {told}"
        )
        self._put("event", details, kind, step)

    def end(self, how: str = "closed", text: str = "") -> None:
        """Note that the run has ended in this process, and how; a second call does nothing."""
        if not self._over:
            self._over = True
            self.event("end", how=how, text=text)
            with _lock:
                _live.discard(self)

    def _put(self, topic: Any, metrics: Mapping[str, Any], kind: str = "", step: int | None = None) -> None:
        if self._recorder is not None:
            item = _Item(run=self, topic=topic, time=time.time(), metrics=metrics, kind=kind, step=step)
            self._recorder.record(item)

    def take(self, item: _Item) -> Point | Event | None:
        """Turn a note into a point or an event; for the writer's thread."""
        if item.topic == "event":
            self.step = self.step if item.step is None else item.step
            if item.kind == "load":  # which drops the gradients
                self._passes = []
            details = {**item.metrics, **self._at_save()} if item.kind in SAVES else item.metrics
            return Event(run=self.run_id, kind=item.kind, step=self.step, time=item.time, details=details)
        metrics = {name: float(value) for name, value in item.metrics.items()}
        if item.topic == "user":
            self.reward = reward if (reward := find_reward(metrics)) is not None else self.reward
            step = self.step if item.step is None else item.step
            return Point(run=self.run_id, kind="user", step=step, time=item.time, metrics=metrics)
        if item.topic == "score":
            return Point(run=self.run_id, kind="forward", step=self.step, time=item.time, metrics=metrics)
        if item.topic == "pass":
            self._passes.append(metrics)
            if len(self._passes) == MOST_PASSES:
                self._passes = [merged(self._passes)]
            self.totals.passes += 1
            self.totals.scored_tokens += metrics.get("tokens:sum", 0.0)
            return None
        metrics, self._passes = {**merged(self._passes), **metrics}, []
        self._count(metrics)
        self.step = int(metrics.get("step:max", self.step))
        self.newest = metrics
        return Point(run=self.run_id, kind="step", step=self.step, time=item.time, metrics=metrics)

    def _at_save(self) -> Mapping[str, float]:
        """Return the loss and the reward of the step that is saved, where they are known."""
        known = {"loss": mean_loss(self.newest), "reward": find_reward(self.newest)}
        at_step = int(self.newest.get("step:max", -1)) == self.step
        found = {name: value for name, value in known.items() if value is not None} if at_step else {}
        return found if self.reward is None else {"reward": self.reward, **found}

    def _count(self, metrics: Mapping[str, float]) -> None:
        totals, skipped = self.totals, "skipped_nonfinite:sum" in metrics
        totals.steps += not skipped
        totals.skipped += skipped
        totals.input_tokens += metrics.get("input_tokens:sum", 0.0)
        for part in PARTS:
            totals.seconds[part] += metrics.get(f"{part}_seconds:sum", 0.0)

    def device(self, usage: Usage, now: float) -> Point:
        """Return the engine's memory, and what it sampled since the last such point; for the recorder's thread."""
        metrics = {f"memory_bytes/{kind}": float(size) for kind, size in usage["memory_bytes"].items()}
        sampling = usage["sampling"]
        before, self._sampling = self._sampling or sampling, sampling
        new = {name: sampling[name] - before[name] for name in sampling}
        metrics |= {
            "sampler/rows_running": float(sampling["rows_running"]),
            "sampler/rows_waiting": float(sampling["rows_waiting"]),
            "sampler/prompt_tokens:sum": float(new["prompt_tokens"]),
            "sampler/prompt_tokens_cached:sum": float(new["prompt_tokens_cached"]),
            "sampler/sampled_tokens:sum": float(new["sampled_tokens"]),
        }
        if new["decode_slots"]:
            metrics["sampler/occupancy:mean"] = new["decode_rows"] / new["decode_slots"]
        return Point(run=self.run_id, kind="device", step=self.step, time=now, metrics=metrics)

    def sign(self, now: float) -> tuple[Sign | None, Point | None]:
        """Return that the engine works, though no request of the run has ended, and what it sampled; None for no."""
        compiling, before = self.monitor.health()["compiling"], self._compiling
        self._compiling = str(compiling[0]["program"]) if compiling else ""
        usage = self.monitor.usage()
        known = self._sampling
        sampled = known is not None and usage["sampling"]["sampled_tokens"] != known["sampled_tokens"]
        if not (sampled or compiling or before):
            return None, None
        sign = Sign(run=self.run_id, time=now, compiling=self._compiling)
        return sign, self.device(usage, now) if sampled else None

    def hosts(self, now: float) -> tuple[dict[str, float], list[Event]]:
        """Return how many other hosts and samplers the engine has, and those whose state is new; as `device`."""
        found = self.monitor.health().get("hosts", [])
        if not found:
            return {}, []
        events = []
        for host in found:
            name = f"{host['role']} {host['number']} {host['host']}"
            if self._hosts.get(name) != host["state"]:
                self._hosts[name] = host["state"]
                details = {field: host[field] for field in ("host", "role", "number", "state")}
                events.append(Event(run=self.run_id, kind="host", step=self.step, time=now, details=details))
        ready = sum(host["state"] == "ready" for host in found)
        return {"hosts/all": float(len(found)), "hosts/ready": float(ready)}, events

    def compiles(self) -> list[Event]:
        """Return the engine's compiles since the last time; for the recorder's thread."""
        new = self.monitor.compiled(self._compiles)
        self._compiles += len(new)
        return [
            Event(run=self.run_id, kind="compile", step=self.step, time=record.ended_at, details=asdict(record))
            for record in new
            if record.ended_at >= self._opened
        ]


class MetricsWriter:
    """A bounded queue and a thread that writes what it holds into the metrics files. Thread-safe.

    Args:
        most: items that may wait.
        seconds: that a batch is let grow.

    Attributes:
        written: points and events that are in the files.
        dropped: those that are not, as the queue was full or the file unusable.
    """

    def __init__(self, *, most: int = MOST_WAITING, seconds: float = BATCH_SECONDS) -> None:
        self.written = 0
        self.dropped = 0
        self._stores: dict[Path, MetricsStore] = {}
        self._lock = threading.Lock()
        self._complained = False
        self._reports = Reports()
        self._batches = BatchWriter(
            "jax_client-metrics",
            self._write,
            seconds=seconds,
            most=most,
            capacity=most,
            tick=self.look_at_open_runs,
            tick_seconds=TICK_SECONDS,
        )

    def record(self, item: _Item) -> None:
        """Take an item, or drop it; returns at once, and never raises."""
        if not self._batches.put(item):
            self._drop(1)

    def waiting(self) -> int:
        """Return how many items no batch has taken yet."""
        return self._batches.waiting()

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until all that was recorded so far is in the files, `timeout` seconds at most; return whether it is."""
        return self._batches.flush(timeout)

    def end(self) -> None:
        """End the thread once all that was recorded so far is in the files, and those of trackers."""
        self._batches.end()
        self._reports.end()

    def finish(self) -> None:
        """Wait until what was recorded so far is in the files and with the trackers, some seconds at most."""
        self.flush()
        self._reports.flush()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process: what waits is the parent's to write."""
        interpreter_end.keep_in_fork(self._stores)
        self._stores, self._lock = {}, threading.Lock()
        self._batches.restart_in_fork()
        self._reports.restart_in_fork()

    def _drop(self, count: int) -> None:
        with self._lock:
            self.dropped += count

    def _write(self, items: Sequence[_Item]) -> None:
        files: dict[Path, tuple[list[Point], list[Event]]] = {}
        stepped: dict[RunMetrics, None] = {}
        for item in items:
            points, events = files.setdefault(item.run.path, ([], []))
            try:
                taken = item.run.take(item)
            except Exception:
                self._drop(1)
                self._complain()
                continue
            if isinstance(taken, Point):
                points.append(taken)
                self._reports.point(item.run.reporting, item.run.state_dir, taken)
            elif taken is not None:
                events.append(taken)
                if taken.kind == "end":
                    self._reports.ended(item.run.reporting, item.run.state_dir, item.run.run_id)
            if item.topic in ("step", "event"):
                stepped[item.run] = None
        self._ask_engines(list(stepped), files)
        for path, (points, events) in files.items():
            if points or events:
                self._add(path, [*points, *sorted(events, key=lambda event: event.time)])
        for run in stepped:
            self._reports.look(run.reporting, run.path, run.run_id)

    def _add(self, path: Path, rows: Sequence[Point | Event]) -> None:
        points = [row for row in rows if isinstance(row, Point)]
        try:
            is_written = self._store(path).add(points, [row for row in rows if isinstance(row, Event)])
        except Exception:
            self._complain()
            if len(rows) > 1:
                # Nothing of them is written; what the file cannot hold is found by halves, and lost alone.
                self._add(path, rows[: len(rows) // 2])
                self._add(path, rows[len(rows) // 2 :])
                return
            is_written = False
        self.written += len(rows) if is_written else 0
        self._drop(0 if is_written else len(rows))

    def look_at_open_runs(self) -> None:
        """Record which open runs are alive, though no request of theirs has ended; for the recorder's thread."""
        for run in live():
            try:
                sign, point = run.sign(time.time())
                if sign is not None:
                    self._store(run.path).add([] if point is None else [point], signs=[sign])
            except Exception:
                self._complain()
                continue
            self._reports.look(run.reporting, run.path, run.run_id)

    def _ask_engines(self, runs: list[RunMetrics], files: dict[Path, tuple[list[Point], list[Event]]]) -> None:
        usages: dict[int, Usage] = {}
        for run in runs:
            try:
                if id(run.monitor) not in usages:
                    usages[id(run.monitor)] = run.monitor.usage()
                points, events = files[run.path]
                counts, changes = run.hosts(now := time.time())
                point = run.device(usages[id(run.monitor)], now)
                points.append(replace(point, metrics={**point.metrics, **counts}))
                events += [*changes, *run.compiles()]
            except Exception:
                self._complain()

    def _store(self, path: Path) -> MetricsStore:
        return self._stores.setdefault(path, MetricsStore(path))

    def _complain(self) -> None:
        # Once: what fails here fails at every step.
        if not self._complained:
            self._complained = True
            logger.warning("some metrics could not be recorded", exc_info=True)


_lock = threading.Lock()
_live: weakref.WeakSet[RunMetrics] = weakref.WeakSet()
shared = MetricsWriter()


def _after_fork() -> None:
    global _lock
    interpreter_end.keep_in_fork(*_live)
    _lock = threading.Lock()
    _live.clear()
    shared.restart_in_fork()


process.register(
    "metrics",
    "the observed runs, and the thread that writes their metrics",
    at_exit={Step.RUNS: shared.finish, Step.ENGINES: shared.end},
    after_fork=_after_fork,
)


def observe(
    run_id: str, monitor: Monitor, state_dir: Path, step: int, *, on: bool, reporting: Reporting = NOWHERE
) -> RunMetrics:
    """Begin to observe a run; `on` says whether anything is recorded."""
    observed = RunMetrics(run_id, monitor, state_dir, step, shared if on else None, reporting)
    if on:
        with _lock:
            _live.add(observed)
    return observed


def live() -> list[RunMetrics]:
    """Return the runs that are open in this process and observed."""
    with _lock:
        return sorted(_live, key=lambda run: run.run_id)


def merged(passes: list[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of several calls as those of one, by the reduction that each name ends with.

    Sums add up, of max and min the outermost stays, means are weighted with the scored tokens where all calls say how
    many those are; of anything else the last stays.
    """
    if len(passes) == 1:
        return dict(passes[0])
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in passes for name in metrics):
        having = [metrics for metrics in passes if name in metrics]
        values, reduction = [metrics[name] for metrics in having], name.rpartition(":")[2]
        weights = [metrics.get("tokens:sum", 0.0) for metrics in having]
        if reduction == "sum":
            out[name] = sum(values)
        elif reduction in ("max", "min"):
            out[name] = max(values) if reduction == "max" else min(values)
        elif reduction == "mean":
            weights = weights if all(weights) else [1.0] * len(values)
            out[name] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
        else:
            out[name] = values[-1]
    return out
