"""Are a server's figures those of its engines and runs, and is an engine that hangs or dies found out?"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest

import jax_client
from jax_client.engine import monitor as monitor_module
from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.core.turns import Lane
from jax_client.engine.engine import Engine
from jax_client.errors import RequestFailedError
from jax_client.runs.lifecycle import base_models
from jax_client.runs.results import run_metrics
from jax_client.server.app import build_app, routes
from jax_client.server.ops.prometheus import Family, render
from jax_client.server.state.server import Server
from jax_client.values import LoraSpec
from support.fake_engine import FakeModels
from support.server.serving import ADAM, KEY, config, data, held_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with held_model(tmp_path_factory.mktemp("model")) as name:
        yield name


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
    # No figure of another server's models, whose fake engine has none, is this one's.
    elsewhere = FakeModels().acquire("elsewhere", server.config)
    with jax_client.ServiceClient(config=server.config) as service:
        training = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
        training.forward_backward(data(), "cross_entropy")
        metrics = training.optim_step(ADAM).result().metrics
        (engine,) = [m.engine for m in base_models.shared.loaded() if m.source.name == model]
        yield SimpleNamespace(
            server=server, get=partial(get, app), training=training, metrics=metrics, engine=engine, model=model
        )
    elsewhere.release()
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
    documented = {name for name in documented if not name.startswith("jax_client_key_")}  # of several keys
    rare = {"jax_client_run_policy_ratio", "jax_client_run_kl_sample_train"}  # of the losses with a ratio
    assert documented - rare <= set(families) <= documented
    model, run = (("model", served.model),), (("run", served.training.model_id),)
    assert families["jax_client_engine_up"]["values"][model] == 1.0
    assert families["jax_client_run_step"]["values"][run] == 1.0
    assert families["jax_client_run_grad_norm"]["values"][run] == served.metrics["grad_norm:mean"]
    assert families["jax_client_run_steps_total"]["values"][run] == 1.0
    memory = families["jax_client_engine_memory_bytes"]["values"]
    assert memory[(*model, ("kind", "weights"))] == served.engine.monitor.describe()["memory_bytes"]["weights"]
    seconds = families["jax_client_run_seconds_total"]["values"]
    assert seconds[(*run, ("part", "device"))] == served.metrics["device_seconds:sum"]
    compiles = families["jax_client_engine_compiles_total"]["values"]
    own = [value for key, value in compiles.items() if dict(key)["model"] == served.model]
    assert sum(own) == len(served.engine.monitor.describe()["compiled"])


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
    monkeypatch.setattr(monitor_module, "STUCK_SECONDS", 0.01)
    with caplog.at_level(logging.ERROR):
        answer, again = served.get("/healthz"), served.get("/healthz")
    assert answer.status_code == again.status_code == 503
    assert "is stuck: 1 requests wait" in answer.json()["status"]
    assert len(caplog.records) == 1, "the stacks once"
    assert "jax_client-dispatch" in caplog.text and "in hang" in caplog.text
    running = [{"program": "forward", "shapes": "1x256", "seconds": 400.0}]
    monkeypatch.setattr(monitor_module, "compiling", lambda log: running)
    status, said = health(served)
    assert status == 200 and said["state"] == "compiling" and said["compiling"] == running
    running[0]["seconds"] = 2 * monitor_module.COMPILE_SECONDS
    assert health(served)[0] == 503, "not for ever"
    release.set()
    assert future.result(30) == "done"
    monkeypatch.undo()
    assert health(served) == (200, {**health(served)[1], "state": "idle", "waiting": 0, "compiling": []})


def test_waiting_requests_fail_when_the_dispatch_thread_dies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(config(tmp_path, max_tokens_per_micro_batch=512))
    app = build_app(server, api_key=None, hosts=("localhost",))
    lease = server.live.own.base_model(model).result()
    engine, release, begun = cast(Engine, lease.model.engine), threading.Event(), threading.Event()
    adapter = engine.open_adapter(engine.open_lane(), LoraSpec(rank=4, seed=0)).result()

    def hold() -> Any:
        begun.set()
        release.wait(30)
        yield None

    held = engine.submit(engine.open_lane(), hold())
    begun.wait(30)
    snapshot = engine.snapshot(engine.open_lane(), adapter)
    request = GenerationRequest(tokens_T=np.array([1, 2, 3], np.int32), num_samples=1, max_tokens=2)
    sampled = engine.generate(None, request)

    def broken(now: float) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine._dispatcher._turns, "take", broken)
    release.set()
    for future in (held, snapshot, sampled):
        with pytest.raises(RequestFailedError, match=r"died \(ZeroDivisionError: a bug\)") as caught:
            future.result(30)
        assert caught.value.category == "server"
    for again in (lambda: engine.snapshot(Lane(), adapter), lambda: engine.generate(None, request)):
        with pytest.raises(RequestFailedError, match="died"):
            again()
    while engine._dispatcher.thread.is_alive():
        time.sleep(0.001)
    answer = get(app, "/healthz")
    assert answer.status_code == 503 and f"engine {model!r} is dead" in answer.json()["status"]
    up = parse(get(app, "/metrics").text)["jax_client_engine_up"]["values"]
    assert {key[0][1]: value for key, value in up.items() if model in key[0][1]} == {model: 1.0, f"{model}#2": 0.0}
    server.close(30)
    assert engine.monitor.health()["state"] == "closed"


def test_a_failed_serve_task_does_not_leave_later_samples_waiting(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerationRequest(tokens_T=np.array([1, 2, 3], np.int32), num_samples=1, max_tokens=2)
    adapter = served.engine.open_adapter(Lane(), LoraSpec(rank=4, seed=0)).result(60)
    weights = served.engine.snapshot(Lane(), adapter).result(60)
    served.engine.release(adapter)

    def broken() -> Any:
        raise SystemExit("no ordinary error")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(served.engine.sampler, "_round", broken)
        with pytest.raises(SystemExit):
            served.engine.generate(weights, request).result(30)
    assert served.engine.generate(weights, request).result(60).rows[0].stop_reason in ("stop", "length")
