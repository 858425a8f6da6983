"""Is what is drawn what the model's distribution says, reproducible, and scored as the trainer scores it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.engine import Engine
from jax_client.engine.sample.device.token_sampling import draw_tokens
from jax_client.values import AdapterState, TrainExample
from support.golden_cases import CASES, lora_values
from support.golden_engine import CROSS_ENTROPY, SPEC, open_engine, to_ours

CONFIG = CASES["qwen2_tied"]
PROMPT = np.array([5, 9, 33, 2, 7], np.int32)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), CONFIG)
    yield engine
    engine.close()


def state() -> AdapterState:
    return AdapterState(spec=SPEC, step=0, weights=to_ours(CONFIG, lora_values(CONFIG)))


def sample(engine: Engine, snapshot: Any = None, **fields: Any) -> GenerationResult:
    request = GenerationRequest(**({"tokens_T": PROMPT, "max_tokens": 12, "seed": 1} | fields))
    return engine.generate(snapshot, request).result()


def test_sampled_logprobs_equal_the_trainers(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter, snapshot = engine.open_adapter(lane, state()).result(), engine.snapshot(lane, state()).result()
    rows = sample(engine, snapshot, num_samples=9, max_tokens=70, temperature=0.7).rows
    data = []
    for row in rows:
        tokens = np.concatenate([PROMPT, row.tokens])
        data.append(TrainExample(tokens_T=tokens[:-1], targets=tokens[1:]))
    scored = engine.score_batch(lane, adapter, data, CROSS_ENTROPY).result().logprobs
    for row, logprobs in zip(rows, scored, strict=True):
        assert row.stop_reason == "length" and len(row.tokens) == 70
        np.testing.assert_allclose(row.logprobs, logprobs[len(PROMPT) - 1 :], atol=1e-4)


def test_greedy_takes_the_likeliest(engine: Engine) -> None:
    greedy = sample(engine, temperature=0.0).rows[0].tokens
    top = sample(engine, tokens_T=np.concatenate([PROMPT, greedy]), num_samples=0, max_tokens=0, topk_prompt=1)
    assert top.topk_ids_Tk is not None
    np.testing.assert_array_equal(top.topk_ids_Tk[len(PROMPT) :, 0], greedy)


def test_seed_decides_and_samples_differ(engine: Engine) -> None:
    first = [r.tokens.tolist() for r in sample(engine, num_samples=3).rows]
    again = [r.tokens.tolist() for r in sample(engine, num_samples=3).rows]
    other = [r.tokens.tolist() for r in sample(engine, num_samples=3, seed=2).rows]
    assert first == again
    assert len({tuple(t) for t in first + other}) == 6


def test_batch_mates_change_nothing(engine: Engine) -> None:
    alone = [sample(engine, seed=s, tokens_T=PROMPT[: 2 + s]).rows[0].tokens.tolist() for s in range(3)]
    requests = [GenerationRequest(tokens_T=PROMPT[: 2 + s], max_tokens=12, seed=s) for s in range(3)]
    futures = [engine.generate(None, request) for request in requests]
    assert [f.result().rows[0].tokens.tolist() for f in futures] == alone


def test_stops(engine: Engine) -> None:
    free = sample(engine, max_tokens=40).rows[0].tokens.tolist()
    stop = next(t for i, t in enumerate(free) if i > 3 and t not in free[:i])
    row = sample(engine, max_tokens=40, stop_ids=(stop, 1000)).rows[0]
    assert row.stop_reason == "stop" and row.tokens.tolist() == free[: free.index(stop) + 1]
    row = sample(engine, max_tokens=40, find_stop=lambda tokens: 6 if len(tokens) >= 6 else None).rows[0]
    assert row.stop_reason == "stop" and row.tokens.tolist() == free[:6] and len(row.logprobs) == 6
    assert sample(engine, max_tokens=3).rows[0].stop_reason == "length"


def test_prompt_scores(engine: Engine) -> None:
    result = sample(engine, num_samples=0, max_tokens=0, prompt_logprobs=True, topk_prompt=64)
    logprobs, ids, top = result.prompt_logprobs_T, result.topk_ids_Tk, result.topk_logprobs_Tk
    assert result.rows == [] and logprobs is not None and ids is not None and top is not None
    assert np.isnan(logprobs[0]) and (ids[0] == 0).all() and (top[0] == -99999.0).all()
    np.testing.assert_allclose(np.exp(top[1:]).sum(-1), 1, atol=1e-5)
    for i in range(1, len(PROMPT)):
        assert top[i][ids[i].tolist().index(PROMPT[i])] == pytest.approx(logprobs[i], abs=1e-4)


def test_settings_compile_nothing(engine: Engine) -> None:
    sample(engine)
    before = len(engine.monitor.describe()["compiled"])
    sample(engine, temperature=0.3, top_k=5, top_p=0.5, seed=9, max_tokens=7, stop_ids=(3,))
    sample(engine, tokens_T=PROMPT[:2], num_samples=4)
    assert len(engine.monitor.describe()["compiled"]) == before


def test_a_custom_loss_compiles_nothing_more(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, state()).result()
    tokens = np.arange(20, dtype=np.int32)
    data = [TrainExample(tokens_T=tokens, targets=tokens, inputs={"weights": np.ones(20, np.float32)})]
    engine.train_batch(lane, adapter, data, CROSS_ENTROPY).result()
    before = len(engine.monitor.describe()["compiled"])
    custom = engine.train_batch(lane, adapter, data, lambda p: (1.0, [-np.ones_like(a) for a in p], {}))
    assert custom.result().metrics["loss:sum"] == 1.0
    assert len(engine.monitor.describe()["compiled"]) == before


def test_training_shapes_are_compiled_once(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, state()).result()
    rng = np.random.default_rng(0)

    def score(*lengths: int) -> None:
        data = [rng.integers(0, 64, n).astype(np.int32) for n in lengths]
        sequences = [TrainExample(tokens_T=t, targets=t) for t in data]
        engine.score_batch(lane, adapter, sequences, CROSS_ENTROPY).result()

    score(20, 30, 9)
    before = len(engine.monitor.describe()["compiled"])
    for lengths in ([64], [1, 2, 3], [10] * 6, [31, 33]):
        score(*lengths)
    assert len(engine.monitor.describe()["compiled"]) == before


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, -1, 1.0), (0.5, -1, 1.0), (1.0, 7, 1.0), (1.0, -1, 0.8), (1.5, 9, 0.7)]
)
def test_frequencies(temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square against the exact distribution; the seed is fixed, the bound is the 0.1 % tail."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=40).astype(np.float32) * 2
    scaled = logits / temperature
    order = np.argsort(-scaled)
    p = np.exp(scaled - scaled.max())
    p[order[top_k if top_k > 0 else 40 :]] = 0
    p /= p.sum()
    p[order[np.searchsorted(np.cumsum(p[order]), top_p) + 1 :]] = 0
    p /= p.sum()
    n = 20000
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), n))
    fill = lambda value, dtype: jnp.full(n, value, dtype)  # noqa: E731
    draws = jax.jit(draw_tokens)(
        jnp.tile(logits, (n, 1)), keys, fill(0, jnp.int32), fill(temperature, jnp.float32),
        fill(top_k, jnp.int32), fill(top_p, jnp.float32),
    )  # fmt: skip
    counts = np.bincount(np.asarray(draws), minlength=40)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi2 = ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum()
    degrees = kept.sum() - 1
    assert chi2 < degrees + 3.1 * np.sqrt(2 * degrees) + 4
