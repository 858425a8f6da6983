"""What do the client tests run on? A fake engine: one number per adapter, one worker thread per engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import pytest

import jax_client
from jax_client import errors, types
from jax_client.config import EngineConfig
from jax_client.engine.core.adapters import Adapter, Snapshot, Version, Weights, snapshot_of
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.core.requests import (
    AdamSettings,
    CustomLoss,
    GeneratedRow,
    GenerationRequest,
    GenerationResult,
    LossSpec,
    TrainResult,
)
from jax_client.engine.core.turns import Lane
from jax_client.engine.protocol import Description, Engine, Health, Usage
from jax_client.models.config import ModelConfig
from jax_client.runs.lifecycle.base_models import BaseModels, Loader
from jax_client.values import AdapterState, LoraSpec, TrainExample
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.source import ModelSource

T = TypeVar("T")
MODEL = "tiny/model"
CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    d_model=8,
    d_ff=8,
    n_layers=1,
    n_heads=1,
    n_kv_heads=1,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_embeddings=True,
    max_context=32,
    eos_token_ids=(2,),
)


# One number stands for all arrays of an adapter.
def tree(value: float) -> Weights:
    return cast(Weights, {"layers": {"w": {"A": np.array([value], np.float32)}}, "unembed": {}})


def number(weights: Weights) -> float:
    return float(weights["layers"]["w"]["A"][0])


class FakeMonitor:
    """What a fake engine says about itself: nothing ever waits, and nothing is compiled."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def describe(self) -> Description:
        return {"model": self._source.name, "dtype": "float32"}

    def usage(self) -> Usage:
        memory = {"weights": 1, "adapters": 0, "optimizer": 0, "gradients": 0, "cache": 0, "available": 9}
        rows, prompt = ("rows_running", "rows_waiting"), ("prompt_tokens", "prompt_tokens_cached")
        names: list[str] = [*rows, *prompt, "sampled_tokens", "decode_rows", "decode_slots"]
        counts = dict.fromkeys(names, 0.0)
        return {"memory_bytes": memory, "sampling": counts, "training": {}, "owner_seconds": {}}

    def health(self) -> Health:
        return {"state": "idle", "waiting": 0, "stalled_seconds": 0.0, "compiling": []}

    def compiled(self, since: int = 0) -> list[CompileRecord]:
        return []


class FakeEngine:
    """Implements `protocol.Engine` over one thread; `gate` holds the device, `log` is what it did."""

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        self.source = source
        self.model = CONFIG
        self.dtype = np.dtype(np.float32)
        self.monitor = FakeMonitor(source)
        self.log: list[str] = []
        self.requests: list[GenerationRequest] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = threading.Event()
        self._device = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._device.shutdown(wait=True)
        self.closed.set()

    def open_lane(self, owner: str = "") -> Lane:
        return Lane(owner)

    def _run(self, name: str, work: Callable[[], T]) -> Future[T]:
        def job() -> T:
            assert self.gate.wait(30)
            self.log.append(name)
            return work()

        return self._device.submit(job)

    def open_adapter(self, lane: Lane, start: LoraSpec | AdapterState) -> Future[Adapter]:
        def work() -> Adapter:
            if isinstance(start, LoraSpec):
                return Adapter(spec=start, weights=tree(0), mu=tree(0), nu=tree(0))
            return _restored(Adapter(spec=start.spec, weights=tree(0), mu=tree(0), nu=tree(0)), start)

        return self._run("open_adapter", work)

    def restore(self, lane: Lane, adapter: Adapter, state: AdapterState) -> Future[Version]:
        def work() -> Version:
            _restored(adapter, state).loads += 1
            return adapter.version

        return self._run("restore", work)

    def release(self, adapter: Adapter) -> None:
        self.log.append("release")

    def score_batch(
        self, lane: Lane, adapter: Adapter | None, examples: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        return self._run("score_batch", lambda: _result(adapter, examples, {"loss:sum": 1.0}))

    def train_batch(
        self, lane: Lane, adapter: Adapter, examples: list[TrainExample], loss: LossSpec | CustomLoss
    ) -> Future[TrainResult]:
        def work() -> TrainResult:
            metrics = {"loss:sum": 1.0, "kl:mean": math.nan}
            if not isinstance(loss, LossSpec):
                logprobs = _result(adapter, examples, {}).logprobs
                with ThreadPoolExecutor(1) as own:
                    own.submit(loss, logprobs).result()
                metrics = {"tokens:sum": 3.0}
            adapter.grads = tree(1 + (0 if adapter.grads is None else number(adapter.grads)))
            return _result(adapter, examples, metrics)

        return self._run("train_batch", work)

    def optim_step(self, lane: Lane, adapter: Adapter, settings: AdamSettings) -> Future[dict[str, float]]:
        def work() -> dict[str, float]:
            if adapter.grads is None:
                raise errors.RequestFailedError("no gradients since step 0", request_id="r1", category="user")
            with adapter.lock:
                adapter.weights = tree(number(adapter.weights) + settings.learning_rate)
                adapter.mu = tree(number(adapter.mu) + number(adapter.grads))
                adapter.grads, adapter.step = None, adapter.step + 1
            return {"grad_norm:mean": 1.0, "update_norm:mean": math.inf}

        return self._run("optim_step", work)

    def snapshot(
        self, lane: Lane | None, source: Adapter | AdapterState, *, optimizer: bool = False
    ) -> Future[Snapshot]:
        if lane is None and isinstance(source, Adapter):
            now: Future[Snapshot] = Future()
            now.set_result(snapshot_of(source, optimizer))
            return now

        def work() -> Snapshot:
            if isinstance(source, Adapter):
                return snapshot_of(source, optimizer)
            return Snapshot(spec=source.spec, weights=tree(source.weights["w.A"][0]), step=source.step)

        return self._run("snapshot", work)

    def generate(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        self.requests.append(request)
        length = len(request.tokens_T)

        def work() -> GenerationResult:
            logprob = np.float32(-1.0 if snapshot is None else -1.0 - number(snapshot.weights))
            row = GeneratedRow(tokens=np.array([5, 2], np.int32), logprobs=np.full(2, logprob), stop_reason="stop")
            reported = 1 if request.score_last is None else length - request.score_last
            prompt_T = np.full(length, logprob)
            prompt_T[:reported] = np.nan
            ids_Tk = np.full((length, request.topk_prompt), 7, np.int32)
            top_Tk = np.full((length, request.topk_prompt), logprob)
            if request.score_last is not None:
                ids_Tk[:reported], top_Tk[:reported] = 0, -99999.0
            return GenerationResult(
                rows=[row] * request.num_samples,
                prompt_logprobs_T=prompt_T if request.prompt_logprobs else None,
                topk_ids_Tk=ids_Tk if request.topk_prompt else None,
                topk_logprobs_Tk=top_Tk if request.topk_prompt else None,
            )

        return self._run("generate", work)

    def logits(
        self, lane: Lane, tokens_T: np.ndarray, state: AdapterState | None, model: ModelSource | None = None
    ) -> Future[np.ndarray]:
        weight = 0.0 if state is None else state.weights["w.A"][0]
        return self._run("logits", lambda: np.full((len(tokens_T), self.model.vocab_size), weight, np.float32))

    def warmup(
        self, spec: LoraSpec, lengths: list[int], targets_per_position: int, *, sampling: bool = False
    ) -> Future[list[CompileRecord]]:
        return self._run("warmup", list)


def _restored(adapter: Adapter, state: AdapterState) -> Adapter:
    moment = 0.0 if state.mu is None else state.mu["w.A"][0]
    adapter.weights, adapter.mu = tree(state.weights["w.A"][0]), tree(moment)
    adapter.step, adapter.grads = state.step, None
    return adapter


def _result(adapter: Adapter | None, examples: list[TrainExample], metrics: dict[str, float]) -> TrainResult:
    weight = 0.0 if adapter is None else number(adapter.weights)
    return TrainResult(
        logprobs=[np.full(example.targets.shape, -1.0 - weight, np.float32) for example in examples], metrics=metrics
    )


def _text(ids: list[int], **_: object) -> str:
    return str(ids)


class FakeModels(BaseModels):
    """Base models on fake engines; `opened` are the engines.

    Args:
        files: whether names are those of real files, whose weights alone are not read; else any name but "missing" is
            a model.
    """

    def __init__(self, *, files: bool = False) -> None:
        self.opened: list[FakeEngine] = []
        self._fingerprint: Callable[[ModelSource], str] = lambda source: f"weights of {source.name}"
        tokenizer = lambda source: cast(Any, SimpleNamespace(name=source.name, decode=_text))  # noqa: E731
        loader = Loader(open_engine=self._open, load_tokenizer=tokenizer)
        if files:
            self._fingerprint = fingerprint
        else:
            loader = replace(loader, resolve=_resolve, stamp=lambda source: (), identity=lambda source: source.name)
        super().__init__(loader)

    def _open(self, source: ModelSource, config: EngineConfig) -> tuple[Engine, str]:
        engine = FakeEngine(source, config)
        self.opened.append(engine)
        return engine, self._fingerprint(source)


def _resolve(name: str) -> ModelSource:
    if name == "missing":
        raise errors.NotFoundError("there is no model 'missing'")
    return ModelSource(name=name, path=Path("/models") / name, kind="hf")


@pytest.fixture
def models() -> FakeModels:
    """Where the clients of a test load their models."""
    return FakeModels()


@pytest.fixture
def loaded(models: FakeModels) -> list[FakeEngine]:
    """The engines that were opened."""
    return models.opened


@pytest.fixture
def service(models, tmp_path):
    with jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=tmp_path), _models=models) as client:
        yield client


@pytest.fixture
def client(service):
    return service.create_lora_training_client(MODEL, rank=8).result()


def datum(extra=None):
    inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0], **(extra or {})}
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)


DATA = [datum()]
PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])
ADAM = types.AdamParams(learning_rate=0.5)
PARAMS = types.SamplingParams(max_tokens=4)


def step(client):
    client.forward_backward(DATA, "cross_entropy")
    return client.optim_step(ADAM).result()


def logprob(client):
    return client.forward(DATA, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()[0]
