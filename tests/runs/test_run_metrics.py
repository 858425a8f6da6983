"""Is what a run does recorded, off the path of its steps, and can it be read?"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jax_client
from jax_client import types
from jax_client.engine.core.programs import CompileRecord
from jax_client.errors import BadRequestError
from jax_client.metrics.store import FILE_NAME, MetricsStore
from jax_client.runs.results import run_metrics
from jax_client.runs.results.run_metrics import MetricsWriter, RunMetrics, merged
from support.golden_cases import sequences
from support.server.serving import CASE, config, held_model

ADAM = types.AdamParams(learning_rate=1e-2)


# The recorder.

USAGE = {
    "memory_bytes": {"weights": 7},
    "sampling": dict.fromkeys(
        (
            "rows_running",
            "rows_waiting",
            "prompt_tokens",
            "prompt_tokens_cached",
            "sampled_tokens",
            "decode_rows",
            "decode_slots",
        ),
        0,
    ),
}


class Quiet:
    """A monitor that has nothing to say; `gate` holds the recorder's thread when it asks."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.records: list[CompileRecord] = []
        self.sampling = dict(USAGE["sampling"])
        self.hosts: list[dict[str, object]] = []

    def health(self) -> dict[str, Any]:
        return {"state": "idle", "hosts": [dict(host) for host in self.hosts]}

    def usage(self) -> dict[str, Any]:
        self.gate.wait(30)
        return {"memory_bytes": USAGE["memory_bytes"], "sampling": dict(self.sampling)}

    def compiled(self, since: int = 0) -> list[CompileRecord]:
        return self.records[since:]


def compile_record(program: str, ended_at: float) -> CompileRecord:
    about: dict[str, Any] = {"shapes": "", "seconds": 1.0, "cause": "first use", "cached": False, "bytes": 0}
    return CompileRecord(program=program, ended_at=ended_at, **about)


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(most=10, seconds=0.0), Quiet()
    run = RunMetrics("r", engine, tmp_path, 0, recorder)
    engine.gate.clear()
    run.event("start")
    while recorder.waiting():
        time.sleep(0.001)
    for step in range(1, 101):  # the thread is held, so this ends only if nothing waits for it
        run.stepped({"step:max": float(step), "grad_norm:mean": 1.0})
    assert recorder.dropped == 90
    assert not recorder.flush(0.05), "bounded, whatever the thread does"
    engine.gate.set()
    assert recorder.flush(30)
    steps = [p.step for p in MetricsStore(tmp_path / FILE_NAME).read("r").points if p.kind == "step"]
    assert steps == list(range(1, 11)) and recorder.dropped == 90


def test_nothing_that_goes_wrong_reaches_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorder, engine = MetricsWriter(seconds=0.0), Quiet()
    unwritable = RunMetrics("a", engine, tmp_path / "file", 0, recorder)
    unwritable.stepped({"step:max": 1.0})
    broken = RunMetrics("b", object(), tmp_path, 0, recorder)  # which no engine's method can be called on
    broken.stepped({"step:max": 1.0})
    broken.passed({"loss:sum": "no number"})  # type: ignore[dict-item]
    assert recorder.flush(30)
    assert [p.step for p in MetricsStore(tmp_path / FILE_NAME).read("b").points] == [1]
    assert recorder.dropped == 3  # of the unwritable file two, with the point of the device
    assert len(caplog.records) == 2, caplog.text
    off = RunMetrics("c", object(), tmp_path, 0, None)
    off.stepped({"step:max": 1.0})
    assert len(MetricsStore(tmp_path / FILE_NAME).runs()) == 1


def test_a_number_that_is_not_finite_leaves_the_file_whole(tmp_path: Path) -> None:
    recorder = MetricsWriter(seconds=0.0)
    run = RunMetrics("r", Quiet(), tmp_path, 0, recorder)
    run.passed({"a": math.nan, "b": 1.0})
    run.event("odd", a=math.inf, b=2.0)
    run.stepped({"step:max": 1.0})
    assert recorder.flush(30) and recorder.dropped == 0
    found = MetricsStore(tmp_path / FILE_NAME).read("r")
    assert found.points[0].metrics == {"b": 1.0, "step:max": 1.0} and found.events[0].details == {"b": 2.0}


def test_calls_of_one_step_become_its_point(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(seconds=0.0), Quiet()
    run = RunMetrics("r", engine, tmp_path, 4, recorder)
    run.passed({"loss:sum": 3.0, "tokens:sum": 1.0, "ratio:mean": 1.0, "own": 1.0})
    run.passed({"loss:sum": 5.0, "tokens:sum": 3.0, "ratio:mean": 2.0, "own": 2.0})
    run.stepped({"step:max": 5.0, "grad_norm:mean": 0.5, "device_seconds:sum": 0.25, "input_tokens:sum": 6.0})
    run.stepped({"skipped_nonfinite:sum": 1.0})
    run.passed({"loss:sum": 1.0, "tokens:sum": 1.0})
    run.event("load", 2, path="p")
    run.stepped({"step:max": 3.0})
    assert recorder.flush(30)
    steps = [p for p in MetricsStore(tmp_path / FILE_NAME).read("r").points if p.kind == "step"]
    assert [p.step for p in steps] == [5, 5, 3]
    shown = {"loss:sum": 8.0, "tokens:sum": 4.0, "ratio:mean": 1.75, "own": 2.0}
    assert shown.items() <= steps[0].metrics.items()
    assert "loss:sum" not in steps[2].metrics, "loading dropped the gradients"
    assert (run.totals.steps, run.totals.skipped, run.totals.passes) == (2, 1, 3)
    assert (run.totals.scored_tokens, run.totals.input_tokens, run.totals.seconds["device"]) == (5.0, 6.0, 0.25)


def test_other_hosts_are_recorded_as_their_state_changes(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(seconds=0.0), Quiet()
    run = RunMetrics("r", engine, tmp_path, 0, recorder)
    engine.hosts = [
        {"host": "b", "role": "follower", "number": 1, "state": "ready", "pid": 7},
        {"host": "c", "role": "sampler", "number": 1, "state": "ready", "pid": 8},
    ]
    for step in (1, 2, 3):
        run.stepped({"step:max": float(step)})
        assert recorder.flush(30)
        if step == 2:
            engine.hosts[1]["state"] = "lost"
    found = MetricsStore(tmp_path / FILE_NAME).read("r")
    ready = [(p.metrics["hosts/ready"], p.metrics["hosts/all"]) for p in found.points if p.kind == "device"]
    assert ready == [(2.0, 2.0), (2.0, 2.0), (1.0, 2.0)]
    changes = [(e.details["role"], e.details["state"], e.step) for e in found.events if e.kind == "host"]
    assert changes == [("follower", "ready", 1), ("sampler", "ready", 1), ("sampler", "lost", 3)]


def test_means_without_token_counts_are_plain_ones() -> None:
    assert merged([{"a:mean": 1.0, "b:max": 3.0, "c:min": 3.0}, {"a:mean": 2.0, "b:max": 1.0, "c:min": 1.0}]) == {
        "a:mean": 1.5,
        "b:max": 3.0,
        "c:min": 1.0,
    }


def test_what_the_engine_did_is_counted_from_point_to_point(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(seconds=0.0), Quiet()
    engine.records = [compile_record("old", time.time() - 60)]
    engine.sampling["sampled_tokens"] = 1_000  # by others, before this run
    run = RunMetrics("r", engine, tmp_path, 0, recorder)
    for sampled, rows in ((0, 0), (30, 6)):
        engine.sampling["sampled_tokens"] += sampled
        engine.sampling["decode_rows"] += rows
        engine.sampling["decode_slots"] += 2 * rows
        engine.records = [*engine.records, compile_record(f"p{sampled}", time.time())]
        run.stepped({"step:max": 1.0})
        assert recorder.flush(30)
    found = MetricsStore(tmp_path / FILE_NAME).read("r")
    first, second = [p.metrics for p in found.points if p.kind == "device"]
    assert first["memory_bytes/weights"] == 7.0
    assert first["sampler/sampled_tokens:sum"] == 0.0 and "sampler/occupancy:mean" not in first
    assert second["sampler/sampled_tokens:sum"] == 30.0 and second["sampler/occupancy:mean"] == 0.5
    assert [e.details["program"] for e in found.events] == ["p0", "p30"]


def test_pending_points_are_there_after_the_process_has_ended(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom jax_client.runs.results import run_metrics\n"
        "run = run_metrics.observe('r', None, Path(sys.argv[1]), 0, on=True)\n"
        "for step in range(1, 501): run.stepped({'step:max': float(step)})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert [p.step for p in MetricsStore(tmp_path / FILE_NAME).read("r", limit=500).points] == list(range(1, 501))


# A run.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with held_model(tmp_path_factory.mktemp("model")) as name:
        yield name


def data(sampled: bool = False) -> list[types.Datum]:
    out = []
    for s in sequences(CASE):
        inputs: dict[str, Any] = {"target_tokens": s["targets"].tolist()}
        inputs |= (
            {"logprobs": [-4.0] * len(s["targets"]), "advantages": s["weights"].tolist()}
            if sampled
            else {"weights": s["weights"].tolist()}
        )
        out.append(types.Datum(model_input=types.ModelInput.from_ints(s["tokens"].tolist()), loss_fn_inputs=inputs))
    return out


def train(service: Any, model: str) -> dict[str, Any]:
    client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    answers = []
    for loss in ("cross_entropy", "importance_sampling"):
        passed = client.forward_backward(data(loss != "cross_entropy"), loss)
        answers.append({**passed.result().metrics, **client.optim_step(ADAM).result().metrics})
    scored = client.forward(data(), "cross_entropy").result()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([3, 1, 4, 1, 5] * 9)
    params = types.SamplingParams(max_tokens=8, temperature=0.7, seed=5, stop=[])
    tokens = [s.tokens for _ in range(2) for s in sampler.sample(prompt, 2, params).result().sequences]
    saved = client.save_state("a").result().path
    client.load_state_with_optimizer(saved).result()
    logprobs = [output["logprobs"].to_numpy().tobytes() for output in scored.loss_fn_outputs]
    return {"id": client.model_id, "answers": answers, "scored": scored.metrics, "same": (logprobs, tokens)}


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    home = tmp_path_factory.mktemp("state")
    with jax_client.ServiceClient(config=config(home)) as service:
        return train(service, model), home


def test_the_points_of_a_run_are_what_its_answers_said(trained: tuple[dict[str, Any], Path]) -> None:
    result, home = trained
    found = MetricsStore(home / FILE_NAME).read(result["id"])
    steps = [p for p in found.points if p.kind == "step"]
    assert [p.metrics for p in steps] == result["answers"], "every number, bit for bit"
    assert [p.step for p in steps] == [1, 2]
    for name in ("loss:sum", "tokens:sum", "grad_norm:mean", "learning_rate:mean", "tokens_per_second:mean"):
        assert steps[0].metrics[name] > 0, name
    assert 0 < steps[0].metrics["padding_waste:mean"] < 1
    assert {"ratio:mean", "kl_sample_train:mean"} <= steps[1].metrics.keys(), "the gap of trainer and sampler"
    split = [steps[0].metrics[f"{part}_seconds:sum"] for part in run_metrics.PARTS]
    assert min(split) > 0, "the first step queued, packed, compiled and computed"
    assert steps[0].metrics["input_tokens:sum"] == sum(len(s["tokens"]) for s in sequences(CASE))
    assert steps[1].metrics["compile_seconds:sum"] == 0
    (scored,) = [p for p in found.points if p.kind == "forward"]
    assert scored.metrics == result["scored"] and scored.step == 2
    device = [p.metrics for p in found.points if p.kind == "device"]
    assert all(p["memory_bytes/weights"] > 0 for p in device)
    assert max(p["memory_bytes/optimizer"] for p in device) > 0 and max(p["memory_bytes/cache"] for p in device) > 0
    assert sum(p["sampler/sampled_tokens:sum"] for p in device) == 32
    assert sum(p["sampler/prompt_tokens:sum"] for p in device) == 90
    assert sum(p["sampler/prompt_tokens_cached:sum"] for p in device) > 0, "the second request found the first one's"
    assert 0 < max(p.get("sampler/occupancy:mean", 0.0) for p in device) <= 1


def test_the_events_of_a_run_are_recorded(trained: tuple[dict[str, Any], Path]) -> None:
    result, home = trained
    events = MetricsStore(home / FILE_NAME).read(result["id"]).events
    kinds = [e.kind for e in events if e.kind != "compile"]
    assert kinds == ["start", "save", "load", "end"]
    by_kind = {e.kind: e for e in events}
    assert by_kind["start"].details["rank"] == 4
    assert by_kind["save"].step == 2 and by_kind["save"].details["path"].endswith("/weights/a")
    assert by_kind["load"].details["path"] == by_kind["save"].details["path"]
    programs = [e.details["program"] for e in events if e.kind == "compile"]
    assert {"forward", "backward", "optim_step", "prefill", "decode"} <= set(programs)
    assert all(e.details["seconds"] > 0 and e.details["cause"] == "first use" for e in events if e.kind == "compile")


def test_recording_changes_nothing(trained: tuple[dict[str, Any], Path], model: str, tmp_path: Path) -> None:
    with jax_client.ServiceClient(config=config(tmp_path, record_metrics=False)) as service:
        off = train(service, model)
        assert off["id"] not in {run.run_id for run in run_metrics.live()}
    assert off["same"] == trained[0]["same"]
    varying = re.compile("second|host_share|fraction")
    for mine, theirs in zip(off["answers"], trained[0]["answers"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == theirs[key] for key in mine if not varying.search(key))
    run_metrics.shared.flush()
    assert not (tmp_path / FILE_NAME).exists()
    with pytest.raises(BadRequestError, match="record_metrics"):
        jax_client.EngineConfig(record_metrics="no")  # type: ignore[arg-type]
