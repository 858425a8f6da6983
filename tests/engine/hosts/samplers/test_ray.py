"""Do samplers in processes of their own compute the trainer's bits, survive kills and hangs, and end with the trainer?

Each test starts a Ray cluster of its own, whatever others run on this machine.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.config import EngineConfig
from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.hosts.samplers.engine import EngineWithSamplers
from jax_client.errors import BadRequestError
from jax_client.runs.lifecycle.base_models import open_engine
from jax_client.values import AdapterState
from jax_client.weights.read.source import resolve
from support.golden_cases import CASES, base_values, lora_values
from support.golden_engine import SPEC, to_ours
from support.samplers import program
from support.samplers.fakes import until
from support.weight_files import write_hf

pytest.importorskip("ray")
CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 512}
# Ray's own agents of a host wait that long for its dead head.
AGENTS_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("m"), CONFIG, base_values(CONFIG))


@pytest.fixture(autouse=True)
def own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")


Open = Callable[[int], EngineWithSamplers]


@pytest.fixture
def opened(model: Path) -> Iterator[Open]:
    engines: list[Any] = []

    def open_with(samplers: int) -> EngineWithSamplers:
        config = EngineConfig(dtype="float32", compilation_cache_dir="", precompile=False, samplers=samplers)
        engines.append(open_engine(resolve(str(model)), config)[0])
        return engines[-1]

    yield open_with
    for engine in engines:
        engine.close()


def request(seed: int, **fields: Any) -> GenerationRequest:
    tokens_T = np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], 40 + seed).astype(np.int32)
    return GenerationRequest(**({"tokens_T": tokens_T, "max_tokens": 12, "seed": seed} | fields))


def identical(got: GenerationResult, wanted: GenerationResult) -> None:
    """Compare bits."""
    for one, other in zip(got.rows, wanted.rows, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    if wanted.prompt_logprobs_T is not None:
        assert got.prompt_logprobs_T is not None
        np.testing.assert_array_equal(got.prompt_logprobs_T, wanted.prompt_logprobs_T)


def snapshot_of(engine: EngineWithSamplers) -> Any:
    state = AdapterState(spec=SPEC, step=3, weights=to_ours(CONFIG, lora_values(CONFIG)))
    return engine.snapshot(engine.open_lane(), state).result()


def pids(engine: EngineWithSamplers) -> list[int]:
    return [sampler["pid"] for sampler in engine.monitor.describe()["samplers"]]


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_a_sampler_computes_the_trainers_bits_and_ends_with_it(opened: Open) -> None:
    jax.devices()  # as where a model was loaded before: jax then warns of each fork
    before = set(program.below(os.getpid()))  # those that other tests have left
    engine = opened(1)
    version = snapshot_of(engine)
    sent = request(1, prompt_logprobs=True)
    identical(engine.generate(version, sent).result(300), engine._trainer.generate(version, sent).result(300))
    with pytest.raises(BadRequestError, match="cannot be sent to another process"):
        engine.generate(version, request(2, find_stop=threading.Lock().acquire)).result(300)
    (sampler,) = engine.monitor.describe()["samplers"]
    assert (sampler["state"], sampler["versions"], sampler["rows"]) == ("ready", 1, 0)
    assert sampler["pid"] not in (None, os.getpid()) and Path(sampler["logs"]).is_dir()
    assert engine.monitor.usage()["sampling"]["sampled_tokens"] == 24
    cancelled = engine.generate(version, request(3, max_tokens=400))
    assert cancelled.cancel()
    del version, cancelled
    gc.collect()
    until(lambda: engine.monitor.describe()["samplers"][0]["versions"] == 0)
    processes = set(program.below(os.getpid())) - before
    assert sampler["pid"] in processes
    engine.close()
    until(lambda: all(map(gone, processes)), 60)
    assert "ray" in sys.modules and not sys.modules["ray"].is_initialized()


@pytest.mark.full
def test_every_replica_computes_the_same_bits(opened: Open) -> None:
    engine = opened(2)
    for version in (None, snapshot_of(engine)):
        for seed in range(12):
            sent = request(seed, prompt_logprobs=seed % 2 == 0, topk_sample=seed % 3, num_samples=1 + seed % 2)
            identical(engine.generate(version, sent).result(300), engine._trainer.generate(version, sent).result(300))
    samplers = engine.monitor.describe()["samplers"]
    assert all(sampler["requests"] >= 8 for sampler in samplers)
    shares = [os.sched_getaffinity(sampler["pid"]) for sampler in samplers]
    cores = len(os.sched_getaffinity(0))
    assert cores == 1 or not shares[0] & shares[1]
    assert all(sampler["cores"] == max(1, cores // 2) for sampler in samplers)
    assert len(engine.warmup(SPEC, [16], 1, sampling=True).result(300)) > 0


def many(engine: EngineWithSamplers, version: Any) -> tuple[list[GenerationRequest], list[Future[GenerationResult]]]:
    sent = [request(seed, max_tokens=100, num_samples=2) for seed in range(16)]
    return sent, [engine.generate(version, each) for each in sent]


def tokens(answer: GenerationResult) -> list[list[int]]:
    return [row.tokens.tolist() for row in answer.rows]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sampler_that_dies_or_hangs_in_the_middle_loses_nothing(opened: Open, number: signal.Signals) -> None:
    engine = opened(2)
    version = snapshot_of(engine)
    wanted = [tokens(answer.result(300)) for answer in many(engine, version)[1]]
    victim = pids(engine)[0]
    _, answers = many(engine, version)
    until(lambda: engine.monitor.describe()["samplers"][0]["rows"] > 0)
    os.kill(victim, number)
    assert [tokens(answer.result(300)) for answer in answers] == wanted
    until(lambda: gone(victim), 10)
    until(lambda: engine.monitor.describe()["samplers"][0]["state"] == "ready", 120)
    assert victim not in pids(engine)
    again = [tokens(answer.result(300)) for answer in many(engine, version)[1]]
    assert again == wanted
    sampler = engine.monitor.describe()["samplers"][0]
    assert sampler["starts"] == 2 and sampler["lost_because"] and sampler["versions"] == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "number"), [("return", None), ("wait", signal.SIGTERM), ("wait", signal.SIGKILL), ("wait", signal.SIGINT)]
)
def test_nothing_is_left_of_a_program_however_it_ends(model: Path, how: str, number: signal.Signals | None) -> None:
    command = [sys.executable, program.__file__, str(model), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        word, *listed = child.stdout.readline().split()
        assert word == "processes"
        processes = {int(pid): Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0] for pid in listed}
        if number is not None:
            time.sleep(0.3)
            child.send_signal(number)
        child.wait(60)
    agents = [pid for pid, name in processes.items() if name.endswith("Agent")]
    until(lambda: all(gone(pid) for pid in processes if pid not in agents), 20)
    until(lambda: all(map(gone, agents)), AGENTS_S)
