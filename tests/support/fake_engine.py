"""What do the client tests run on? A fake engine: one scalar per adapter, one worker thread per engine."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jax_client
from jax_client import errors, types
from jax_client.engine.core.requests import GeneratedRow, GenerationResult, TrainResult
from jax_client.runs.lifecycle import base_models
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.read.source import ModelSource

MODEL = "tiny/model"


@dataclass
class FakeAdapter:
    spec: LoraSpec
    weight: float = 0.0
    step: int = 0
    passes: int = 0
    moment: float = 0.0
    loads: int = 0


class FakeEngine:
    """The engine's surface over one thread; `gate` holds the device, `log` is what it did."""

    def __init__(self, source, config):
        self.source = source
        self.model = SimpleNamespace(vocab_size=64, family="llama", eos_token_ids=(2,))
        self.max_context = 32
        self.log = []
        self.requests = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = threading.Event()
        self._device = ThreadPoolExecutor(1)

    def describe(self):
        return {"model": self.source.name, "dtype": "float32"}

    def usage(self):
        memory = {"weights": 1, "adapters": 0, "optimizer": 0, "gradients": 0, "cache": 0, "available": 9}
        sampling = ("rows_running", "rows_waiting", "prompt_tokens", "prompt_tokens_cached", "sampled_tokens")
        counts = dict.fromkeys((*sampling, "decode_rows", "decode_slots"), 0)
        return {"memory_bytes": memory, "sampling": counts, "training": {}}

    def health(self):
        return {"state": "idle", "waiting": 0, "stalled_seconds": 0.0, "compiling": []}

    def compiled(self, since=0):
        return []

    def close(self):
        self._device.shutdown(wait=True)
        self.closed.set()

    def open_lane(self):
        return object()

    def _run(self, name, work):
        def job():
            assert self.gate.wait(30)
            self.log.append(name)
            return work()

        return self._device.submit(job)

    def create_adapter(self, lane, spec):
        return self._run("create", lambda: FakeAdapter(spec))

    def release(self, adapter):
        self.log.append("release")

    def load_adapter(self, lane, state):
        return self._run("load", lambda: self._restore(FakeAdapter(state.spec), state))

    def _restore(self, adapter, state):
        adapter.weight, adapter.step, adapter.passes = float(state.weights["w"][0]), state.step, 0
        adapter.moment = float(state.mu["w"][0]) if state.mu else 0.0
        return adapter

    def _result(self, adapter, sequences, metrics):
        logprobs = [np.full(s.targets.shape, -1.0 - adapter.weight, np.float32) for s in sequences]
        return TrainResult(logprobs=logprobs, metrics=metrics)

    def forward(self, lane, adapter, sequences, loss):
        return self._run("forward", lambda: self._result(adapter, sequences, {"loss:sum": 1.0}))

    def forward_backward(self, lane, adapter, sequences, loss):
        def work():
            adapter.passes += 1
            return self._result(adapter, sequences, {"loss:sum": 1.0, "kl:mean": math.nan})

        return self._run("forward_backward", work)

    def forward_backward_custom(self, lane, adapter, sequences, custom):
        def work():
            result = self._result(adapter, sequences, {})
            own: Future = Future()

            def call():
                try:
                    own.set_result(custom(result.logprobs))
                except BaseException as error:
                    own.set_exception(error)

            threading.Thread(target=call, daemon=True).start()
            own.result()
            adapter.passes += 1
            return replace(result, metrics={"tokens:sum": 3.0})

        return self._run("custom", work)

    def optim_step(self, lane, adapter, settings):
        def work():
            if not adapter.passes:
                raise errors.RequestFailedError("no gradients since step 0", request_id="r1", category="user")
            adapter.weight += settings.learning_rate
            adapter.moment += adapter.passes
            adapter.passes, adapter.step = 0, adapter.step + 1
            return {"grad_norm:mean": 1.0, "update_norm:mean": math.inf}

        return self._run("optim_step", work)

    def snapshot(self, lane, adapter):
        return self._run("snapshot", lambda: adapter.weight)

    def load_snapshot(self, lane, state):
        return self._run("load_snapshot", lambda: float(state.weights["w"][0]))

    def hold_state(self, lane, adapter, optimizer):
        return self._run("hold_state", lambda: self.current_state(adapter, optimizer))

    def current_state(self, adapter, optimizer):
        def array(value):
            return {"w": np.array([value], np.float32)}

        moments = {"mu": array(adapter.moment), "nu": array(0)} if optimizer else {}
        state = AdapterState(spec=adapter.spec, step=adapter.step, weights=array(adapter.weight), **moments)
        return SimpleNamespace(
            step=state.step,
            version=(adapter.loads, state.step),
            accumulating=adapter.passes > 0,
            fetch=lambda: state,
        )

    def restore_state(self, lane, adapter, state):
        def work():
            self._restore(adapter, state).loads += 1
            return adapter.loads, adapter.step

        return self._run("restore", work)

    def generate(self, lane, snapshot, request):
        self.requests.append(request)
        length = len(request.tokens_T)

        def work():
            logprob = np.float32(-1.0 if snapshot is None else -1.0 - snapshot)
            row = GeneratedRow(tokens=np.array([5, 2], np.int32), logprobs=np.full(2, logprob), stop_reason="stop")
            prompt = np.full(length, logprob)
            prompt[0] = np.nan
            topk = {}
            if request.topk_prompt:
                shape = (length, request.topk_prompt)
                topk = {"topk_ids_Tk": np.full(shape, 7, np.int32), "topk_logprobs_Tk": np.full(shape, logprob)}
            return GenerationResult(
                rows=[row] * request.num_samples,
                prompt_logprobs_T=prompt if request.prompt_logprobs else None,
                **topk,
            )

        return self._run("generate", work)


@pytest.fixture
def loaded(monkeypatch):
    """Replace loading; returns the engines that were opened."""
    return replace_loading(monkeypatch)


def replace_loading(monkeypatch):
    opened = []

    def resolve(name):
        if name == "missing":
            raise errors.NotFoundError("there is no model 'missing'")
        return ModelSource(name=name, path=Path("/models") / name, kind="hf")

    def open_engine(source, config):
        engine = FakeEngine(source, config)
        opened.append(engine)
        return engine, f"weights of {source.name}"

    monkeypatch.setattr(base_models, "_entries", {})
    monkeypatch.setattr(base_models, "resolve", resolve)
    monkeypatch.setattr(base_models, "open_engine", open_engine)
    monkeypatch.setattr(base_models, "load_tokenizer", lambda source: SimpleNamespace(name=source.name, decode=str))
    return opened


@pytest.fixture
def service(loaded, tmp_path):
    with jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=tmp_path)) as client:
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
