"""Does the bundled SmolLM2 give transformers' numbers, and does its sampler agree with its trainer?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jax_client.config import EngineConfig
from jax_client.engine.core.requests import AdamSettings, GenerationRequest, LossSpec
from jax_client.engine.engine import Engine
from jax_client.values import LoraSpec, TrainExample
from jax_client.weights.read.source import EMBEDDED_MODEL, resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from support.golden_cases import REAL_GOLDEN, REAL_TEXT, real_logprobs, real_model
from support.golden_engine import compile_threads

pytestmark = pytest.mark.real
CROSS_ENTROPY = LossSpec(name="cross_entropy")
ADAM = AdamSettings(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=0.0)
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "The three primary colors are",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(resolve(EMBEDDED_MODEL), EngineConfig(dtype="float32", precompile=False, compilation_cache_dir=""))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def reference() -> Any:
    pytest.importorskip("torch")
    return real_model()


def test_logprobs_equal_the_stored_ones_of_transformers(engine: Engine, tokenizer: Any) -> None:
    tokens = np.array(tokenizer.encode(REAL_TEXT)[:201], np.int32)
    stored = np.load(REAL_GOLDEN)
    np.testing.assert_array_equal(tokens, stored["tokens"])
    request = GenerationRequest(tokens_T=tokens, num_samples=0, prompt_logprobs=True)
    got = engine.generate(None, request).result().prompt_logprobs_T
    assert got is not None
    np.testing.assert_allclose(got[1:], stored["logprobs"], atol=1e-3)


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # transformers' own, about its GGUF reader
def test_the_stored_logprobs_are_what_transformers_says_now(reference: Any) -> None:
    stored = np.load(REAL_GOLDEN)
    np.testing.assert_allclose(real_logprobs(reference, stored["tokens"]), stored["logprobs"], atol=1e-4)


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_greedy_equals_transformers(engine: Engine, tokenizer: Any, reference: Any) -> None:
    import torch

    prompts = [np.array(tokenizer.encode(p), np.int32) for p in PROMPTS]
    futures = [engine.generate(None, GenerationRequest(tokens_T=p, max_tokens=32, temperature=0.0)) for p in prompts]
    for prompt, future in zip(prompts, futures, strict=True):
        tokens = torch.from_numpy(prompt)[None].long()
        with torch.no_grad():
            for _ in range(32):
                tokens = torch.cat([tokens, reference(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert future.result().rows[0].tokens.tolist() == tokens[0, len(prompt) :].tolist()


@pytest.mark.full
def test_a_first_step_compiles_nothing_on_the_dispatch_thread(tokenizer: Any) -> None:
    """One step of reinforcement learning, with neither a warm-up nor a cache."""
    with compile_threads() as threads:
        engine = Engine(resolve(EMBEDDED_MODEL), EngineConfig(dtype="float32", compilation_cache_dir=""))
        lane = engine.open_lane()
        adapter = engine.open_adapter(lane, LoraSpec(rank=8, seed=0)).result()
        del threads[:]
        prompt_T = np.array(tokenizer.encode(PROMPTS[0]), np.int32)
        request = GenerationRequest(tokens_T=prompt_T, num_samples=4, max_tokens=16)
        rows = engine.generate(engine.snapshot(lane, adapter).result(), request).result().rows
        data = []
        for row in rows:
            tokens_T, drawn = np.concatenate([prompt_T, row.tokens]), np.zeros(len(prompt_T) - 1, np.float32)
            logprobs_T = np.concatenate([drawn, row.logprobs])
            inputs = {"logprobs": logprobs_T, "advantages": np.where(logprobs_T < 0, 1, 0).astype(np.float32)}
            data.append(TrainExample(tokens_T=tokens_T[:-1], targets=tokens_T[1:], inputs=inputs))
        engine.train_batch(lane, adapter, data, LossSpec(name="importance_sampling")).result()
        engine.optim_step(lane, adapter, ADAM).result()
        engine.close()
    assert threads and all(name.startswith(("jax_client-compile", "jax_client-precompile")) for name in threads)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_equals_trainer(dtype: Any, engine: Engine, tokenizer: Any) -> None:
    """Over 2,048 tokens sampled at temperature 1; the bounds are those of docs/design.md."""
    if dtype != "float32":
        engine = Engine(resolve(EMBEDDED_MODEL), EngineConfig(dtype=dtype, precompile=False))
    lane = engine.open_lane()
    prompts = [np.array(tokenizer.encode(p), np.int32) for p in PROMPTS[:4]]
    requests = [GenerationRequest(tokens_T=p, num_samples=8, max_tokens=64, seed=i) for i, p in enumerate(prompts)]
    results = [f.result() for f in [engine.generate(None, r) for r in requests]]
    data, sampled = [], []
    for prompt, result in zip(prompts, results, strict=True):
        for row in result.rows:
            tokens = np.concatenate([prompt, row.tokens])
            data.append(TrainExample(tokens_T=tokens[:-1], targets=tokens[1:]))
            sampled.append(row.logprobs)
    scored = engine.score_batch(lane, None, data, CROSS_ENTROPY).result().logprobs
    gap = np.concatenate([p[-len(q) :] - q for p, q in zip(scored, sampled, strict=True)])
    k3 = np.mean(np.exp(gap) - 1 - gap)
    print(
        f"{dtype}: {len(gap)} tokens, |gap| mean {np.abs(gap).mean():.2e}, 99th percentile "
        f"{np.quantile(np.abs(gap), 0.99):.2e}, maximum {np.abs(gap).max():.2e}, k3 {k3:.2e}"
    )
    assert len(gap) >= 2000
    if dtype == "float32":
        assert np.abs(gap).max() <= 1e-4
    else:
        engine.close()
        assert np.abs(gap).mean() <= 0.015
        assert np.quantile(np.abs(gap), 0.99) <= 0.06
        assert k3 <= 3e-4
