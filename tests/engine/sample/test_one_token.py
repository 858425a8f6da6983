"""Is a scored prompt free of the context's last place, and of the decode program?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.engine import Engine
from support.golden_cases import CASES
from support.golden_engine import open_engine

CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 128}
CONTEXT = CONFIG["max_position_embeddings"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), CONFIG)
    yield engine
    engine.close()


def send(engine: Engine, length: int, **fields: Any) -> Future[GenerationResult]:
    tokens_T = np.random.default_rng(length).integers(0, CONFIG["vocab_size"], length).astype(np.int32)
    return engine.generate(None, GenerationRequest(tokens_T=tokens_T, max_tokens=1, seed=3, **fields))


def scored(engine: Engine, length: int, **fields: Any) -> GenerationResult:
    return send(engine, length, prompt_logprobs=True, **fields).result()


def test_a_prompt_that_fills_the_context_is_scored_and_nothing_is_decoded(engine: Engine) -> None:
    found, alone = scored(engine, CONTEXT), scored(engine, CONTEXT, num_samples=0)
    assert found.rows[0].stop_reason == "length" and len(found.rows[0].tokens) == 1 and not alone.rows
    assert found.prompt_logprobs_T is not None and alone.prompt_logprobs_T is not None
    assert found.prompt_logprobs_T.tobytes() == alone.prompt_logprobs_T.tobytes()
    for length in (1, 32, 33):
        assert len(scored(engine, length, num_samples=3).rows) == 3
    assert {record.program for record in engine.monitor.compiled()} == {"prefill"}
    assert engine.monitor.usage()["sampling"]["decode_blocks"] == 0
    assert engine.monitor.usage()["sampling"]["pages_used"] == 0


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_k": 5, "temperature": 1.5}, {"top_p": 0.6}, {"topk_sample": 4}]
)
def test_the_token_is_that_of_a_decode_step(engine: Engine, fields: dict[str, Any]) -> None:
    for length in (1, 31, 32, 33, 70):
        sampled = send(engine, length, num_samples=3, **fields).result()
        found = scored(engine, length, num_samples=3, **fields)
        for ours, decoded in zip(found.rows, sampled.rows, strict=True):
            assert ours.tokens.tolist() == decoded.tokens.tolist() and ours.stop_reason == "length"
            np.testing.assert_allclose(ours.logprobs, decoded.logprobs, atol=1e-5)
            if ours.top_ids is not None:
                assert ours.top_ids.tolist() == (decoded.top_ids if decoded.top_ids is not None else []).tolist()


def test_stops_and_other_scores_are_those_of_any_request(engine: Engine) -> None:
    (token,) = scored(engine, 40).rows[0].tokens.tolist()
    assert scored(engine, 40, stop_ids=(token,)).rows[0].stop_reason == "stop"
    cut = scored(engine, 40, find_stop=lambda drawn: 0 if drawn == [token] else None).rows[0]
    assert cut.stop_reason == "stop" and not len(cut.tokens) and not len(cut.logprobs)
    several = send(engine, 40, alternatives=3, topk_prompt=2, num_samples=2).result()
    apart = send(engine, 40, alternatives=3, topk_prompt=2, num_samples=0).result()
    for name in ("alternative_ids_Tk", "alternative_logprobs_Tk", "topk_ids_Tk", "topk_logprobs_Tk"):
        assert getattr(several, name).tobytes() == getattr(apart, name).tobytes(), name
