"""Is what a run does recorded, off the path of its steps, and can it be read? Is a server that hangs found out?"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

import jax_client
from jax_client import types
from jax_client.engine import engine as engine_module
from jax_client.engine.core.accounting import Work
from jax_client.engine.core.dispatch import Dispatcher, Lane
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.metrics.store import FILE_NAME, MetricsStore
from jax_client.runs.lifecycle import base_models
from jax_client.runs.results import run_metrics
from jax_client.runs.results.run_metrics import MetricsWriter, RunMetrics, merged
from jax_client.server.app import build_app, routes
from jax_client.server.ops.prometheus import Family, render
from jax_client.server.state.server import Server
from jax_client.values import LoraSpec
from support.golden_cases import sequences
from support.serving import CASE, KEY, config, held_model

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
    """An engine that has nothing to say; `gate` holds the recorder's thread when it asks."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.records: list[dict[str, Any]] = []
        self.sampling = dict(USAGE["sampling"])

    def usage(self) -> dict[str, Any]:
        self.gate.wait(30)
        return {"memory_bytes": USAGE["memory_bytes"], "sampling": dict(self.sampling)}

    def compiled(self, since: int = 0) -> list[dict[str, Any]]:
        return self.records[since:]


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(most=10, seconds=0.0), Quiet()
    run = RunMetrics("r", engine, tmp_path, 0, recorder)
    engine.gate.clear()
    run.event("start")
    while recorder._queue.qsize():
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


def test_means_without_token_counts_are_plain_ones() -> None:
    assert merged([{"a:mean": 1.0, "b:max": 3.0, "c:min": 3.0}, {"a:mean": 2.0, "b:max": 1.0, "c:min": 1.0}]) == {
        "a:mean": 1.5,
        "b:max": 3.0,
        "c:min": 1.0,
    }


def test_what_the_engine_did_is_counted_from_point_to_point(tmp_path: Path) -> None:
    recorder, engine = MetricsWriter(seconds=0.0), Quiet()
    engine.records = [{"program": "old", "ended_at": time.time() - 60}]
    engine.sampling["sampled_tokens"] = 1_000  # by others, before this run
    run = RunMetrics("r", engine, tmp_path, 0, recorder)
    for sampled, rows in ((0, 0), (30, 6)):
        engine.sampling["sampled_tokens"] += sampled
        engine.sampling["decode_rows"] += rows
        engine.sampling["decode_slots"] += 2 * rows
        engine.records = [*engine.records, {"program": f"p{sampled}", "ended_at": time.time()}]
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
        "run = run_metrics.watch('r', None, Path(sys.argv[1]), 0, on=True)\n"
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


# The server.


def parse(text: str) -> dict[str, dict[str, Any]]:
    """Read the text format strictly: each family's HELP, TYPE, then its samples, nothing twice."""
    families: dict[str, dict[str, Any]] = {}
    assert text.endswith("\n")
    current: dict[str, Any] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"# HELP ([a-z_]+) (.+)", line):
            assert match[1] not in families
            current = families[match[1]] = {"name": match[1], "help": match[2], "values": {}}
        elif match := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge)", line):
            assert match[1] == current["name"] and "type" not in current and not current["values"]
            current["type"] = match[2]
            assert (match[2] == "counter") == match[1].endswith("_total")
        else:
            label = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
            match = re.fullmatch(rf"([a-z_]+)(?:\{{({label}(?:,{label})*)\}})? (\S+)", line)
            assert match, line
            assert match[1] == current["name"] and "type" in current
            pairs = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")
            unescape = partial(re.sub, r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]))
            key = tuple((name, unescape(value)) for name, value in pairs)
            assert len(dict(key)) == len(key) and key not in current["values"]
            current["values"][key] = float(match[3])
    assert all(family["values"] for family in families.values())
    return families


def test_the_text_format_escapes_and_shows_every_number() -> None:
    label = 'a"b\\c\nd,e="f"'
    values = [({"x": label}, 1.5), ({"x": "b"}, math.inf), ({"x": "c"}, -math.inf), ({"x": "d"}, 2**60)]
    text = render(
        [
            Family(name="some_bytes", kind="gauge", description="one\nline \\ only", values=values),
            Family(name="none_total", kind="counter", description="left out", values=[]),
            Family(name="nan", kind="gauge", description="no number", values=[({}, math.nan)]),
        ]
    )
    families = parse(text)
    assert list(families) == ["jax_client_some_bytes", "jax_client_nan"]
    assert families["jax_client_some_bytes"]["help"] == "one\\nline \\\\ only"
    found = families["jax_client_some_bytes"]["values"]
    assert found == {(("x", name["x"]),): value for name, value in values}
    assert math.isnan(families["jax_client_nan"]["values"][()])


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    server = Server(config(tmp_path_factory.mktemp("served")))
    app = build_app(server, api_key=KEY, hosts=("localhost",))
    with jax_client.ServiceClient(config=server.config) as service:
        training = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
        training.forward_backward(data(), "cross_entropy")
        metrics = training.optim_step(ADAM).result().metrics
        (engine,) = [m.engine for m in base_models.loaded() if m.source.name == model]
        yield SimpleNamespace(
            server=server, get=partial(get, app), training=training, metrics=metrics, engine=engine, model=model
        )
    server.close(30)


def get(app: Any, path: str, headers: Mapping[str, str] = {"X-API-Key": KEY}) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:1") as client:
            return await client.get(path, headers=dict(headers))

    return asyncio.run(ask())


def health(served: Any) -> tuple[int, dict[str, Any]]:
    """Return the status and what is said of the engine."""
    answer = served.get("/healthz")
    (engine,) = [each for each in answer.json()["engines"] if each["model"] == served.model]
    return answer.status_code, engine


def test_the_json_of_a_run(served: Any) -> None:
    run_metrics.shared.flush(30)
    run = served.training.model_id
    listed = served.get("/api/v1/metrics/runs").json()
    assert [(each["run"], each["step"], each["live"]) for each in listed["runs"]] == [(run, 1, True)]
    answer = served.get(f"/api/v1/metrics/runs/{run}").json()
    (step,) = [p for p in answer["points"] if p["kind"] == "step"]
    assert step["step"] == 1 and served.metrics.items() <= step["metrics"].items()
    assert answer["live"] and not answer["more"] and answer["events"][0]["kind"] == "start"
    later = served.get(f"/api/v1/metrics/runs/{run}?since={answer['next']}").json()
    assert later["points"] == later["events"] == [] and later["next"] == answer["next"]
    few = served.get(f"/api/v1/metrics/runs/{run}?points=2").json()
    assert few["points"] and few["next"] == answer["next"]
    one = served.get(f"/api/v1/metrics/runs/{run}?limit=1").json()
    assert len(one["points"]) == 1 and one["more"] and one["next"] != answer["next"]
    assert served.get("/api/v1/metrics/runs/none").status_code == 404
    for wrong in ("since=1", "since=-1-2", "limit=0", "limit=x", "points=1", "points=100000", f"since={'9' * 40}-1"):
        assert served.get(f"/api/v1/metrics/runs/{run}?{wrong}").status_code == 400, wrong
    listed = served.get("/api/v1/metrics/engines").json()["engines"]
    (engine,) = [each for each in listed if each["model"]["name"] == served.model]
    assert engine["health"]["state"] == "idle" and engine["sampling"].keys() >= {"occupancy", "prompt_tokens_cached"}


def test_the_figures_for_prometheus_are_those_that_are_documented(served: Any) -> None:
    run_metrics.shared.flush(30)
    answer = served.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = parse(answer.text)
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    documented = set(re.findall(r"`(jax_client_[a-z_]+)`", page))
    rare = {"jax_client_run_policy_ratio", "jax_client_run_kl_sample_train"}  # of the losses with a ratio
    assert documented - rare <= set(families) <= documented
    model, run = (("model", served.model),), (("run", served.training.model_id),)
    assert families["jax_client_engine_up"]["values"][model] == 1.0
    assert families["jax_client_run_step"]["values"][run] == 1.0
    assert families["jax_client_run_grad_norm"]["values"][run] == served.metrics["grad_norm:mean"]
    assert families["jax_client_run_steps_total"]["values"][run] == 1.0
    memory = families["jax_client_engine_memory_bytes"]["values"]
    assert memory[(*model, ("kind", "weights"))] == served.engine.describe()["memory_bytes"]["weights"]
    seconds = families["jax_client_run_seconds_total"]["values"]
    assert seconds[(*run, ("part", "device"))] == served.metrics["device_seconds:sum"]
    compiles = families["jax_client_engine_compiles_total"]["values"]
    own = [value for key, value in compiles.items() if dict(key)["model"] == served.model]
    assert sum(own) == len(served.engine.describe()["compiled"])


def test_every_one_of_these_routes_asks_for_the_key(served: Any) -> None:
    paths = [route.path for route in routes(served.server) if re.search("metrics|healthz", route.path)]
    assert sorted(paths) == [
        "/api/v1/healthz",
        "/api/v1/metrics/engines",
        "/api/v1/metrics/runs",
        "/api/v1/metrics/runs/{run}",
        "/healthz",
        "/metrics",
    ]
    for path in paths:
        assert served.get(path.format(run="r"), headers={}).status_code == 401, path
        assert served.get(path.format(run="r"), headers={"X-API-Key": KEY, "Origin": "http://e"}).status_code == 403


# Health.


def test_health_says_ok_compiling_and_stuck(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/healthz", "/api/v1/healthz"):
        answer = served.get(path)
        assert answer.status_code == 200 and answer.json()["status"] == "ok"
    engine, release, begun = served.engine, threading.Event(), threading.Event()

    def hang() -> Any:
        begun.set()
        release.wait(30)
        return "done"
        yield

    future = engine.submit(engine.open_lane(), hang())
    begun.wait(30)
    time.sleep(0.02)
    assert health(served)[1]["state"] == "busy"
    monkeypatch.setattr(engine_module, "STUCK_SECONDS", 0.01)
    with caplog.at_level(logging.ERROR):
        answer, again = served.get("/healthz"), served.get("/healthz")
    assert answer.status_code == again.status_code == 503
    assert "is stuck: 1 requests wait" in answer.json()["status"]
    assert len(caplog.records) == 1, "the stacks once"
    assert "jax_client-dispatch" in caplog.text and "in hang" in caplog.text
    running = [{"program": "forward", "shapes": "1x256", "seconds": 400.0}]
    monkeypatch.setattr(engine_module, "compiling", lambda log: running)
    status, said = health(served)
    assert status == 200 and said["state"] == "compiling" and said["compiling"] == running
    running[0]["seconds"] = 2 * engine_module.COMPILE_SECONDS
    assert health(served)[0] == 503, "not for ever"
    release.set()
    assert future.result(30) == "done"
    monkeypatch.undo()
    assert health(served) == (200, {**health(served)[1], "state": "idle", "waiting": 0, "compiling": []})


def test_a_compile_that_runs_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    from jax_client.engine.core.programs import CompileRecord, Program, compiling

    log: list[CompileRecord] = []
    seen: list[Any] = []

    def traced(x: Any) -> Any:
        seen.append((compiling(log), compiling([])))
        return x + 1

    program = Program("traced", traced, log, label=lambda x: "a shape")
    before = time.time()
    program(jnp.zeros(3))
    ((running, others),) = seen
    assert [(each["program"], each["shapes"]) for each in running] == [("traced", "a shape")] and others == []
    assert compiling(log) == [] and before <= log[0].ended_at <= time.time()


def test_waiting_requests_fail_when_the_dispatch_thread_dies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(config(tmp_path, max_tokens_per_micro_batch=512))
    app = build_app(server, api_key=None, hosts=("localhost",))
    lease = server.live.own.base_model(model).result()
    engine, release, begun = lease.model.engine, threading.Event(), threading.Event()
    adapter = engine.create_adapter(engine.open_lane(), LoraSpec(rank=4, seed=0)).result()

    def hold() -> Any:
        begun.set()
        release.wait(30)
        yield None

    held = engine.submit(engine.open_lane(), hold())
    begun.wait(30)
    snapshot = engine.snapshot(engine.open_lane(), adapter)
    from jax_client.engine.core.requests import GenerationRequest

    request = GenerationRequest(tokens_T=np.array([1, 2, 3], np.int32), num_samples=1, max_tokens=2)
    sampled = engine.generate(engine.open_lane(), None, request)

    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine._dispatcher, "_next", broken)
    release.set()
    for future in (held, snapshot, sampled):
        with pytest.raises(RequestFailedError, match=r"died \(ZeroDivisionError: a bug\)") as caught:
            future.result(30)
        assert caught.value.category == "server"
    for again in (lambda: engine.snapshot(Lane(), adapter), lambda: engine.generate(Lane(), None, request)):
        with pytest.raises(RequestFailedError, match="died"):
            again()
    while engine._dispatcher.thread.is_alive():
        time.sleep(0.001)
    answer = get(app, "/healthz")
    assert answer.status_code == 503 and f"engine {model!r} is dead" in answer.json()["status"]
    up = parse(get(app, "/metrics").text)["jax_client_engine_up"]["values"]
    assert {key[0][1]: value for key, value in up.items() if model in key[0][1]} == {model: 1.0, f"{model}#2": 0.0}
    server.close(30)
    assert engine.health()["state"] == "closed"


def test_a_failed_serve_task_does_not_leave_later_samples_waiting(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_client.engine.core.requests import GenerationRequest

    request = GenerationRequest(tokens_T=np.array([1, 2, 3], np.int32), num_samples=1, max_tokens=2)
    adapter = served.engine.create_adapter(Lane(), LoraSpec(rank=4, seed=0)).result(60)
    weights = served.engine.snapshot(Lane(), adapter).result(60)
    served.engine.release(adapter)

    def broken() -> Any:
        raise SystemExit("no ordinary error")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(served.engine.sampler, "_round", broken)
        with pytest.raises(SystemExit):
            served.engine.generate(Lane(), weights, request).result(30)
    assert served.engine.generate(Lane(), weights, request).result(60).rows[0].stop_reason in ("stop", "length")


def test_liveness_counts_from_when_work_came() -> None:
    dispatcher = Dispatcher("test")
    time.sleep(0.05)
    assert dispatcher.liveness().stalled_s == 0.0, "nothing to do is no standstill"
    gate: Future[None] = Future()

    def task() -> Any:
        yield gate.result

    future = dispatcher.submit(Lane(), task())
    found = dispatcher.liveness()
    assert found.alive and found.waiting == 1 and found.stalled_s < 0.05
    time.sleep(0.06)
    assert dispatcher.liveness().stalled_s >= 0.05
    gate.set_result(None)
    future.result(30)
    assert dispatcher.liveness().waiting == 0
    dispatcher.close()
    assert not dispatcher.liveness().alive


def test_work_has_a_queue() -> None:
    work = Work(tokens=1, computed=2, device_s=1.0, queue_s=0.5)
    work.add(Work(queue_s=0.25))
    assert work.rates(1.0)["queue_seconds"] == 0.75
    assert json.dumps(work.rates(1.0))
