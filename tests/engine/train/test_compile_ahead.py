"""Which rectangles does a call use while others are compiled, and does it get the same numbers from each?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.engine.core import programs
from jax_client.values import TrainExample
from support.golden_cases import CASES
from support.golden_engine import CROSS_ENTROPY, SPEC, open_engine

CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 512}


def examples(lengths: list[int]) -> list[TrainExample]:
    source = np.random.default_rng(0)
    tokens = [source.integers(0, CONFIG["vocab_size"], n).astype(np.int32) for n in lengths]
    return [TrainExample(tokens_T=t, targets=t, inputs={"weights": np.ones(len(t), np.float32)}) for t in tokens]


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Path]:
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_largest_rectangle_serves_while_the_smaller_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(programs, "PAUSE_S", 0.01)
    engine = open_engine(
        tmp_path, CONFIG, precompile=True, compilation_cache_dir=own_cache, max_tokens_per_micro_batch=1024
    )
    lane, data = engine.open_lane(), examples([500, 200])
    adapter = engine.open_adapter(lane, SPEC).result()

    def passed() -> tuple[Any, list[str]]:
        before = len(engine.monitor.compiled())
        result = engine.train_batch(lane, adapter, data, CROSS_ENTROPY).result()
        return result, [r.shapes for r in engine.monitor.compiled(before) if r.program == "forward"]

    first, compiled = passed()
    assert len(compiled) == 1 and compiled[0].startswith("1x512x1")
    end = time.monotonic() + 60
    while not any(r.shapes.startswith("1x256x1") for r in engine.monitor.compiled() if r.program == "backward"):
        second, _ = passed()
        assert time.monotonic() < end
        time.sleep(0.05)
    last, compiled = passed()
    assert not compiled
    for each in (first, second, last):
        for ours, others in zip(each.logprobs, last.logprobs, strict=True):
            np.testing.assert_allclose(ours, others, atol=1e-5)
    counts = [r.program for r in engine.monitor.compiled()]
    assert counts.count("backward") == counts.count("forward") == 2, "what was compiled beside is what runs"
    engine.close()
