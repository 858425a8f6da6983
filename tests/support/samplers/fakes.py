"""What do the tests of the pool run on? Replicas without processes, which a test answers, loses or lets hang."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from jax_client.config import EngineConfig
from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.requests import GeneratedRow, GenerationRequest, GenerationResult
from jax_client.engine.hosts.samplers.members import CUMULATIVE
from jax_client.engine.hosts.samplers.messages import Answer, Opened, Opening, ReplicaLostError, Report
from jax_client.engine.hosts.samplers.pool import SamplerPool
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.read.source import ModelSource
from support.fake_engine import tree

OPENING = Opening(
    source=ModelSource(name="m", path=Path("/m"), kind="hf"), fingerprint="f", config=EngineConfig(dtype="float32")
)
COUNTS: dict[str, float] = dict.fromkeys((*CUMULATIVE, "rows_running", "rows_waiting", "pages_used"), 0)


def result(request: GenerationRequest) -> GenerationResult:
    """What (seed, sample) decide: a function of the request alone."""
    rows = [
        GeneratedRow(
            tokens=np.arange(request.seed, request.seed + request.max_tokens, dtype=np.int32) + 100 * i,
            logprobs=np.full(request.max_tokens, -1, np.float32),
            stop_reason="length",
        )
        for i in range(request.num_samples)
    ]
    return GenerationResult(rows=rows)


class FakeReplica:
    """Implements `messages.Replica`; `calls` is what it was asked, `pending` the requests that a test answers."""

    def __init__(self, host: str = "here", *, opens: bool = True) -> None:
        self.host = host
        self.opens = opens
        self.hangs = False
        self.refuses: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.pending: dict[int, tuple[int, GenerationRequest, Future[Answer]]] = {}
        self.counts = dict(COUNTS)
        self.alive = True

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls.copy() if call[0] == name]

    def start(self, opening: Opening) -> Future[Opened]:
        self.calls.append(("start",))
        future: Future[Opened] = Future()
        self.alive = True
        if self.refuses is not None:
            future.set_exception(self.refuses)
        elif self.opens:
            opened = Opened(host=self.host, pid=1, logs="/logs", device="1 x cpu", cores=1, slots=32, counts=COUNTS)
            future.set_result(opened)
        return future

    def bind(self, version: int, weights: object) -> Future[None]:
        self.calls.append(("bind", version, weights))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def free(self, version: int) -> None:
        self.calls.append(("free", version))

    def generate(self, number: int, version: int, request: GenerationRequest) -> Future[Answer]:
        future: Future[Answer] = Future()
        self.pending[number] = version, request, future
        self.calls.append(("generate", number, version, request.seed))
        return future

    def cancel(self, number: int) -> None:
        self.calls.append(("cancel", number))

    def warm(self, spec: LoraSpec) -> Future[list[Any]]:
        self.calls.append(("warm", spec.rank))
        future: Future[list[Any]] = Future()
        future.set_result([self.host])
        return future

    def ping(self) -> Future[Report]:
        future: Future[Report] = Future()
        if not self.hangs:
            future.set_result(Report(counts=self.counts, memory_bytes={"weights": 1}, compiling=[]))
        return future

    def kill(self, *, hung: bool = False) -> None:
        self.alive = False
        self.calls.append(("kill",))

    def wait_ended(self, seconds: float) -> None:
        self.calls.append(("wait_ended",))

    def answer(self, count: int | None = None) -> None:
        """Answer the oldest requests, all without a count."""
        for number in list(self.pending)[:count]:
            _, request, future = self.pending.pop(number)
            self.counts = self.counts | {"sampled_tokens": self.counts["sampled_tokens"] + request.max_tokens}
            future.set_result(Answer(result=result(request), counts=self.counts))

    def fail(self, error: BaseException) -> None:
        """Answer all requests with an error."""
        for number in list(self.pending):
            self.pending.pop(number)[2].set_result(Answer(error=error, counts=self.counts))

    def lose(self) -> None:
        """End the process, with its requests."""
        self.counts = dict(COUNTS)
        for number in list(self.pending):
            self.pending.pop(number)[2].set_exception(ReplicaLostError("it was killed."))


class FakeTrainer:
    """What serves where there are no samplers."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        self.seeds.append(request.seed)
        future: Future[GenerationResult] = Future()
        future.set_result(result(request))
        return future


_seeds = itertools.count()


def request(tokens: Any = None, **fields: Any) -> GenerationRequest:
    """A request of a prompt of its own, unless tokens are given."""
    seed = next(_seeds)
    prompt = np.full(70, 1000 + seed) if tokens is None else np.asarray(tokens)
    return GenerationRequest(**({"tokens_T": prompt.astype(np.int32), "max_tokens": 4, "seed": seed} | fields))


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot(spec=LoraSpec(rank=4, seed=0), weights=tree(value), step=3)


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def pool_of(*replicas: FakeReplica, **settings: Any) -> SamplerPool:
    shared: list[AdapterState] = []

    def share(state: AdapterState) -> object:
        shared.append(state)
        return state

    pool = SamplerPool(replicas, OPENING, share, settings.pop("trainer", FakeTrainer()), **settings)
    vars(pool)["shared_states"] = shared
    return pool
