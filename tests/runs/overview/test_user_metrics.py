"""Does `jax_client.log` write into the run that trains, and do trackers get the metrics without slowing it?"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jax_client
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, BadTypeError
from jax_client.host import reporting
from jax_client.metrics import exports
from jax_client.metrics.exports import Export, RunFacts
from jax_client.metrics.store import FILE_NAME, MetricsStore
from jax_client.runs.overview.rows import Overview
from jax_client.runs.results import run_metrics
from jax_client.runs.results.reports import Reporting
from jax_client.runs.results.run_metrics import RunMetrics


class Quiet:
    """A monitor that has nothing to say but what a test sets."""

    def __init__(self) -> None:
        self.sampled, self.compiling = 0, []

    def usage(self) -> dict[str, Any]:
        names = ("rows_running", "rows_waiting", "prompt_tokens", "prompt_tokens_cached", "decode_rows", "decode_slots")
        return {"memory_bytes": {}, "sampling": {**dict.fromkeys(names, 0), "sampled_tokens": self.sampled}}

    def compiled(self, since: int = 0) -> list[object]:
        return []

    def health(self) -> dict[str, Any]:
        return {"compiling": self.compiling}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunMetrics]:
    """An open run of this process."""
    found = run_metrics.observe("mine:train:0", Quiet(), tmp_path, 0, on=True)  # type: ignore[arg-type]
    yield found
    found.end()
    run_metrics.shared.flush()


def points(home: Path, kind: str = "user") -> list[tuple[int, Mapping[str, float]]]:
    assert run_metrics.shared.flush(30)
    found = MetricsStore(home / FILE_NAME).read("mine:train:0").points
    return [(point.step, point.metrics) for point in found if point.kind == kind]


def test_numbers_go_into_the_open_run(run: RunMetrics, tmp_path: Path) -> None:
    run.stepped({"step:max": 4.0, "loss:sum": 6.0, "tokens:sum": 3.0})
    jax_client.log({"reward/mean": 0.5, "array": np.float32(2), "one": np.ones((1,))[0], "yes": True, "bad": np.nan})
    jax_client.log({"a": 1}, step=9)
    jax_client.log({"b": 2}, run="mine:train:0")
    jax_client.log({"c": 3}, run=SimpleNamespace(model_id="mine:train:0"))  # type: ignore[arg-type]
    expected = {"reward/mean": 0.5, "array": 2.0, "one": 1.0, "yes": 1.0, "nonfinite/bad": 1.0}
    assert points(tmp_path) == [(4, expected), (9, {"a": 1.0}), (4, {"b": 2.0}), (4, {"c": 3.0})]
    run.event("save", 4, path="tinker://mine:train:0/weights/x")
    assert run_metrics.shared.flush(30)
    (saved,) = MetricsStore(tmp_path / FILE_NAME).events(("save",))
    assert (saved.details["loss"], saved.details["reward"]) == (2.0, 0.5)


def test_any_thread_may_log(run: RunMetrics, tmp_path: Path) -> None:
    threads = [threading.Thread(target=jax_client.log, args=({f"t{i}": i},)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for _, metrics in points(tmp_path) for name in metrics} == {f"t{i}" for i in range(20)}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1, 2],), BadTypeError, "metrics is list; give a dictionary"),
        (({"a": "1"},), BadTypeError, "metrics['a'] is text"),
        (({"a": None},), BadTypeError, "metrics['a'] is None; give a number"),
        (({"a": [1, 2]},), BadTypeError, "give a number"),
        (({"": 1},), BadRequestError, "no text of 1 to 200"),
        (({3: 1},), BadRequestError, "no text of 1 to 200"),
        (({"x" * 201: 1},), BadRequestError, "no text of 1 to 200"),
        (({str(i): i for i in range(257)},), BadRequestError, "has 257 names; give at most 256"),
        (({"a": 1}, -1), BadRequestError, "step is -1"),
        (({"a": 1}, True), BadRequestError, "step is True"),
        (({"a": 1}, 2**53 + 1), BadRequestError, "give an integer from 0 to 2**53"),
        (({"a": 1}, None, "other"), BadRequestError, "'other' is not open in this process"),
    ],
)
def test_a_wrong_call_writes_nothing(
    run: RunMetrics, tmp_path: Path, arguments: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        jax_client.log(*arguments)
    assert words in str(raised.value)
    assert points(tmp_path) == []


def test_a_point_that_the_file_cannot_hold_is_lost_alone(run: RunMetrics, tmp_path: Path) -> None:
    before = run_metrics.shared.written, run_metrics.shared.dropped
    run.logged({"a": 1.0}, 1)
    run.logged({"a": 2.0}, 2**63)
    run.logged({"a": 3.0}, 3)
    jax_client.log({"a": 4.0}, step=2**53)
    assert points(tmp_path) == [(1, {"a": 1.0}), (3, {"a": 3.0}), (2**53, {"a": 4.0})]
    assert (run_metrics.shared.written, run_metrics.shared.dropped) == (before[0] + 3, before[1] + 1)


def test_without_a_run_or_with_several_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no open run"):
        jax_client.log({"a": 1})
    runs = [run_metrics.observe(f"{n}:train:0", Quiet(), tmp_path, 0, on=True) for n in "ab"]  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match=r"has 2 open runs \(a:train:0, b:train:0\); give run="):
        jax_client.log({"a": 1})
    for each in runs:
        each.end()
    assert run_metrics.shared.flush(30)


def test_a_run_that_samples_or_compiles_is_alive(run: RunMetrics, tmp_path: Path) -> None:
    monitor: Any = run.monitor
    run.event("start")
    assert run_metrics.shared.flush(30)
    store = MetricsStore(tmp_path / FILE_NAME)
    began = store.summaries()["mine:train:0"].active
    run_metrics.shared.look_at_open_runs()
    assert store.summaries()["mine:train:0"].active == began, "nothing has happened"
    monitor.sampled = 5
    run_metrics.shared.look_at_open_runs()
    sampled = store.summaries()["mine:train:0"].active
    assert sampled is not None and began is not None and sampled > began
    monitor.compiling = [{"program": "backward", "seconds": 3.0}]
    run_metrics.shared.look_at_open_runs()
    assert store.summaries()["mine:train:0"].compiling == "backward"
    monitor.compiling = []
    run_metrics.shared.look_at_open_runs()
    assert store.summaries()["mine:train:0"].compiling == ""
    assert [metrics["sampler/sampled_tokens:sum"] for _, metrics in points(tmp_path, "device")] == [0.0, 5.0]


# Trackers.

FACTS = RunFacts(run="r:train:0", name="a run", config={"rank": 4}, state_dir=Path())


class Tracker(ModuleType):
    """A module such as wandb, trackio and tensorboardX, which keeps what it is given."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for method in ("init", "log", "finish", "define_metric", "SummaryWriter", "add_scalar", "add_text", "flush"):
            setattr(self, method, self._method(method))
        self.close = self._method("close")

    def _method(self, name: str) -> Any:
        def method(*arguments: Any, **more: Any) -> Tracker:
            self.calls.append((name, arguments, more))
            return self

        return method


@pytest.mark.parametrize(
    ("tracker", "module"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "tensorboardX")]
)
def test_each_tracker_gets_the_metrics(
    tracker: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Tracker(module)
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(exports, "package_of", lambda _: module)
    reporting = Reporting(name="a run", config={"rank": 4}, trackers=(tracker,))
    run = run_metrics.observe("mine:train:0", Quiet(), tmp_path, 0, on=True, reporting=reporting)  # type: ignore[arg-type]
    run.stepped({"step:max": 1.0, "loss:sum": 6.0, "tokens:sum": 3.0})
    run.logged({"reward": 0.5}, 1)
    run.end()
    run_metrics.shared.finish()
    text = str(fake.calls)
    assert "a run" in text and "'loss'" in text and "2.0" in text and "'reward'" in text and "0.5" in text
    assert fake.calls[-1][0] in ("finish", "close")


def test_a_tracker_that_fails_is_reported_once_and_one_that_hangs_delays_no_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    class Hanging:
        def log(self, *_: object) -> None:
            gate.wait(30)

        def finish(self) -> None: ...

    def fails(_: RunFacts) -> Hanging:
        raise SystemExit("no network")

    failing, hanging = Export("wandb", fails), Export("trackio", lambda _: Hanging())
    began = time.monotonic()
    for step in range(50_000):
        hanging.put(FACTS, step, 0.0, {"a": 1.0})
    for step in range(10):
        failing.put(FACTS, step, 0.0, {"a": 1.0})
        assert failing.flush(5)
    assert not hanging.flush(0.05) and time.monotonic() - began < 5
    gate.set()
    assert len(caplog.records) == 1 and "could not be exported to wandb" in caplog.text
    for each in (failing, hanging):
        each.close()


def test_a_tracker_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequestError, match=r"EngineConfig.export_metrics has 'wandbb'; choose from wandb, trackio"):
        EngineConfig(export_metrics="wandbb")
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    config = EngineConfig(export_metrics=["wandb", "tensorboard"])
    assert config.trackers == ("wandb", "tensorboard")
    with pytest.raises(BadRequestError, match="wandb is not installed: pip install wandb"):
        jax_client.ServiceClient(config=config)
    monkeypatch.setenv("JAX_CLIENT_EXPORT_METRICS", "tensorboard, trackio")
    assert EngineConfig().trackers == ("tensorboard", "trackio") and EngineConfig(export_metrics="").trackers == ()
    monkeypatch.setenv("JAX_CLIENT_EXPORT_METRICS", "nope")
    with pytest.raises(BadRequestError, match="JAX_CLIENT_EXPORT_METRICS has 'nope'"):
        _ = EngineConfig().trackers


def test_what_was_logged_is_a_reward_in_the_list(run: RunMetrics, tmp_path: Path) -> None:
    from jax_client.checkpoint.store import CheckpointStore

    CheckpointStore(tmp_path).put_run("mine:train:0", {"created": 1.0})
    run.stepped({"step:max": 1.0})
    jax_client.log({"reward": 0.75})
    assert run_metrics.shared.flush(30)
    (row,) = Overview(tmp_path).runs()
    assert (row.reward, row.spark_name, row.step) == (0.75, "reward", 1)
