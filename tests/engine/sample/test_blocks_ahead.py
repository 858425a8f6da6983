"""Does a decode block that is launched before the one before it was looked at change anything but the time?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.engine import Engine
from jax_client.engine.sample import sized
from jax_client.engine.sample.schedule import Schedule
from support.golden_cases import CASES
from support.golden_engine import open_engine

CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 512}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("engine") / "m", CONFIG)
    yield engine
    engine.close()


@pytest.fixture
def ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launch blocks ahead, as on an accelerator; return the number of rows of each."""
    blocks, take_ahead = list[int](), Schedule.take_ahead

    def counted(self: Schedule, rows: Any, flying: int, steps: int) -> Any:
        taken = take_ahead(self, rows, flying, steps)
        if taken is not None:
            blocks.append(len(self.placed))
        return taken

    monkeypatch.setattr(Schedule, "take_ahead", counted)
    monkeypatch.setattr(engine.sampler, "launches_ahead", True)
    return blocks


def send(engine: Engine, **fields: Any) -> Future[Any]:
    request = GenerationRequest(tokens_T=np.arange(1, 40, dtype=np.int32), max_tokens=90, num_samples=2)
    return engine.generate(None, replace(request, **fields))


def find_stop(tokens: list[int]) -> int | None:
    return next((i + 1 for i, token in enumerate(tokens) if token == 7 and i > 50), None)


def load(engine: Engine) -> list[Any]:
    """Rows that end at a stop token, at a stop string, by their length, early and late."""
    requests = [{"seed": 1, "stop_ids": (3,)}, {"seed": 2, "find_stop": find_stop}, {"seed": 3, "topk_sample": 3}]
    futures = [send(engine, **requests[0]), send(engine, **requests[1], max_tokens=200), send(engine, **requests[2])]
    return [future.result(240) for future in futures]


def same(got: list[Any], expected: list[Any]) -> None:
    for row, other in zip((r for a in got for r in a.rows), (r for a in expected for r in a.rows), strict=True):
        assert row.tokens.tolist() == other.tokens.tolist() and row.stop_reason == other.stop_reason
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-5)
        if other.top_ids is not None:
            np.testing.assert_array_equal(row.top_ids, other.top_ids)


def test_the_same_tokens_are_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch, ahead: list[int]) -> None:
    got = load(engine)
    assert len(ahead) >= 5 and ahead[-1] < ahead[0], "rows end, and the others go on without a stop"
    monkeypatch.setattr(engine.sampler, "launches_ahead", False)
    same(got, load(engine))
    described = engine.monitor.describe()["sampling"]
    assert described["pages_used"] == described["rows_running"] == 0


def test_the_cache_can_go_while_two_blocks_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ahead: list[int]
) -> None:
    expected, calls, released, extend = load(engine), itertools.count(), [], sized.extend

    def release() -> Any:
        freed = engine.sampler.release_cache()
        engine.sampler._open()  # as a warmup does
        if len(released) % 2:
            engine.sampler.release_cache()
        return freed
        yield

    def extend_without_cache(*args: Any) -> None:
        if next(calls) % 4 == 1:
            released.append(engine._dispatcher.submit(engine.open_lane(), release()).result())
        extend(*args)

    monkeypatch.setattr(sized, "extend", extend_without_cache)
    same(load(engine), expected)
    assert any(released) and len(ahead) >= 5


def test_who_comes_meanwhile_joins(engine: Engine, ahead: list[int]) -> None:
    long = send(engine, max_tokens=400, num_samples=1)
    while len(ahead) < 2 and not long.done():
        time.sleep(0.001)
    short = send(engine, max_tokens=4, seed=9)
    short.result(240)
    assert not long.done()
    assert len(long.result(240).rows[0].tokens) == 400
