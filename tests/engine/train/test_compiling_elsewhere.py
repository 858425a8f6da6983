"""Is nothing compiled on the dispatch thread, and do other clients' requests go on while one's are compiled?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.engine.core.programs import Program
from jax_client.engine.core.requests import AdamSettings, GenerationRequest, LossSpec
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.engine.engine import Engine
from jax_client.errors import RequestFailedError
from jax_client.values import LoraSpec, TrainExample
from support.golden_cases import CASES
from support.golden_engine import SPEC, compile_threads, open_engine

CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 512}
ADAM = AdamSettings(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=0.0)
POLICY = LossSpec(name="importance_sampling")
OTHER = replace(SPEC, rank=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("engine") / "m", CONFIG)
    yield engine
    engine.close()


def sample(engine: Engine, snapshot: Any, **fields: Any) -> Future[Any]:
    request = GenerationRequest(tokens_T=np.arange(1, 20, dtype=np.int32), max_tokens=6)
    return engine.generate(snapshot, replace(request, **fields))


class Client:
    """A client's adapter and what a step of reinforcement learning asks for."""

    def __init__(self, engine: Engine, spec: LoraSpec) -> None:
        self.engine, self.lane = engine, engine.open_lane()
        self.adapter = engine.open_adapter(self.lane, spec).result()

    def sample(self) -> Any:
        return sample(self.engine, self.engine.snapshot(self.lane, self.adapter).result(), num_samples=2).result(240)

    def train(self) -> Future[Any]:
        tokens_T = np.arange(1, 20, dtype=np.int32)
        floats_T = np.ones(len(tokens_T), np.float32)
        inputs = {"advantages": floats_T, "logprobs": -5 * floats_T}
        example = TrainExample(tokens_T=tokens_T, targets=tokens_T, inputs=inputs)
        return self.engine.train_batch(self.lane, self.adapter, [example], POLICY)

    def step(self) -> Any:
        self.sample()
        self.train().result(240)
        return self.engine.optim_step(self.lane, self.adapter, ADAM).result(240)


def hold_compiles(monkeypatch: pytest.MonkeyPatch, spec: LoraSpec) -> tuple[threading.Event, threading.Event]:
    """Have the compiles of programs for adapters of this rank wait; return events: one waits, and all may go on."""
    lowered, waits, go_on = Program._lowered, threading.Event(), threading.Event()

    def held(self: Any, args: tuple[object, ...], static: dict[str, object]) -> Any:
        if any(spec.rank in a.shape for a in jax.tree.leaves(args)):
            waits.set()
            assert go_on.wait(240)
        return lowered(self, args, static)

    monkeypatch.setattr(Program, "_lowered", held)
    return waits, go_on


def compile_seconds(metrics: dict[str, float]) -> float:
    return metrics["compile_seconds:sum"]


def test_a_first_step_compiles_nothing_on_the_dispatch_thread(tmp_path: Path) -> None:
    """Neither programs nor single operations."""
    with compile_threads() as threads:
        engine = open_engine(tmp_path / "m", CONFIG)
        client = Client(engine, OTHER)
        del threads[:]
        client.step()
        client.step()
        engine.close()
    assert threads and all(name.startswith("jax_client-compile") for name in threads), set(threads)


def test_training_of_others_goes_on_while_a_program_is_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, known = Client(engine, OTHER), Client(engine, SPEC)
    known.step()
    waits, go_on = hold_compiles(monkeypatch, OTHER)
    waiting = other.train()
    assert waits.wait(240)
    metrics = known.step()
    assert compile_seconds(metrics) == 0, "another's compile is not its own"
    end = time.monotonic() + 60
    while not {"forward", "backward"} <= {each["program"] for each in engine.monitor.health()["compiling"]}:
        assert time.monotonic() < end, "they are compiled side by side"
        time.sleep(0.01)
    assert engine.monitor.health()["state"] == "compiling" and not waiting.done()
    time.sleep(0.1)
    go_on.set()
    waiting.result(240)
    assert compile_seconds(engine.optim_step(other.lane, other.adapter, ADAM).result(240)) > 0.1


def test_sampling_of_others_goes_on_while_a_program_is_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Client(engine, replace(SPEC, rank=7))
    known = Client(engine, SPEC)
    expected = known.sample()
    waits, go_on = hold_compiles(monkeypatch, third.adapter.spec)
    snapshot = engine.snapshot(third.lane, third.adapter).result()
    waiting, cancelled = sample(engine, snapshot), sample(engine, snapshot)
    assert waits.wait(240)
    for _ in range(3):
        assert [row.tokens.tolist() for row in known.sample().rows] == [row.tokens.tolist() for row in expected.rows]
    assert cancelled.cancel() and not waiting.done()
    go_on.set()
    assert len(waiting.result(240).rows[0].tokens) == 6


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_sampling_program_that_cannot_be_compiled_fails_its_own_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """And the next request tries again."""
    fourth, known = Client(engine, replace(SPEC, rank={"prefill": 11, "decode": 13}[program])), Client(engine, SPEC)
    known.sample()
    lowered: Callable[..., Any] = Program._lowered
    rank = fourth.adapter.spec.rank

    def broken(self: Any, args: tuple[object, ...], static: dict[str, object]) -> Any:
        if self.name == program and any(rank in a.shape for a in jax.tree.leaves(args)):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.")
        return lowered(self, args, static)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "_lowered", broken)
        snapshot = engine.snapshot(fourth.lane, fourth.adapter).result()
        long = sample(engine, engine.snapshot(known.lane, known.adapter).result(), max_tokens=400)
        with pytest.raises(RequestFailedError, match="out of memory"):
            sample(engine, snapshot).result(240)
        assert len(long.result(240).rows[0].tokens) == 400
    assert len(fourth.sample().rows) == 2


def test_warmup_covers_sampling(engine: Engine) -> None:
    spec = replace(SPEC, rank=9)
    warmed = engine.warmup(spec, [20], 1, sampling=True).result(240)
    assert [record.program for record in warmed].count("prefill") == 2
    assert [record.program for record in warmed].count("decode") == 2
    before = len(engine.monitor.compiled())
    Client(engine, spec).step()
    assert engine.monitor.compiled(before) == []


def test_a_url_of_the_compilation_cache_is_for_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        enable_compilation_cache("gs://bucket/programs")
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"  # type: ignore[attr-defined]
    finally:
        enable_compilation_cache(before)
    assert list(tmp_path.iterdir()) == []
