"""Do settings at the ends of float32's range mean what they say, and do broken weights reach no one else?"""

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
from jax_client.errors import RequestFailedError
from jax_client.models.lora_arrays import LARGEST_WEIGHT
from jax_client.values import AdapterState
from support.golden_cases import CASES, lora_values
from support.golden_engine import SPEC, open_engine, to_ours

CONFIG = CASES["llama_tied"]
PROMPT = np.array([5, 9, 33, 2, 7], np.int32)
TINY = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)


def draws(logits: np.ndarray, *, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> set[int]:
    n = 200
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), n))
    fill = lambda value, dtype: jnp.asarray(np.full(n, value, dtype))  # noqa: E731
    drawn = jax.jit(draw_tokens)(
        jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)), keys, fill(0, np.int32), fill(temperature, np.float32),
        fill(top_k, np.int32), fill(top_p, np.float32),
    )  # fmt: skip
    return set(np.asarray(drawn).tolist())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0, 1e6])
def test_the_ends_of_every_setting(scale: float) -> None:
    logits = np.random.default_rng(1).normal(size=700) * scale
    best = {int(np.argmax(logits))}
    for top_p in (0.0, TINY, 1e-45, 1e-40, 1.1754944e-38, 1e-37, 1e-30, 1e-6):
        for temperature in (1e-3, 1.0, LARGEST):
            assert draws(logits, top_p=top_p, temperature=temperature) == best or temperature == LARGEST, top_p
    for temperature in (0.0, TINY, 1e-40, 1e-38, 1e-37, 1e-30, 1e-21, 9e-21, 2e-20, 1e-15):
        assert draws(logits, temperature=temperature) == best, temperature
        assert draws(logits, temperature=temperature, top_p=TINY, top_k=2**31 - 1) == best, temperature
    assert draws(logits, top_k=1) == draws(logits, top_k=1, top_p=TINY, temperature=1e30) == best
    for temperature in (1e38, LARGEST):
        uniform = draws(np.r_[logits[:4], np.full(3, -scale)], temperature=temperature)
        assert uniform == set(range(7)), "every token is as likely"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), CONFIG)
    yield engine
    engine.close()


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**({"tokens_T": PROMPT, "max_tokens": 40, "seed": 1} | fields))


def same(one: GenerationResult, other: GenerationResult) -> bool:
    rows = zip(one.rows, other.rows, strict=True)
    return all(a.tokens.tolist() == b.tokens.tolist() and a.logprobs.tolist() == b.logprobs.tolist() for a, b in rows)


@pytest.fixture
def overflowing(engine: Engine) -> Any:
    """Weights of which each is in range, and whose products are not."""
    weights = to_ours(CONFIG, lora_values(CONFIG))
    large = {name: np.full_like(weights[name], LARGEST_WEIGHT) for name in ("v.A", "v.B")}
    state = AdapterState(spec=SPEC, step=8, weights=weights | large)
    return engine.snapshot(engine.open_lane(), state).result()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 3},
        {"num_samples": 0, "max_tokens": 0, "prompt_logprobs": True},
        {"max_tokens": 1, "prompt_logprobs": True},
        {"num_samples": 0, "max_tokens": 0, "targets_TK": np.full((4, 2), 6, np.int32)},
    ],
)
def test_logits_that_are_not_finite_fail_the_request(engine: Engine, overflowing: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestFailedError, match=r"adapter of step 8 computes logits that are not finite") as caught:
        engine.generate(overflowing, request(**fields)).result(300)
    assert caught.value.category == "user"


def test_an_overflow_stays_in_its_request(engine: Engine, overflowing: Any) -> None:
    honest = request(tokens_T=np.arange(3, 30, dtype=np.int32), num_samples=2)
    alone = engine.generate(None, honest).result(300)
    both = [engine.generate(snapshot, honest) for snapshot in (overflowing, None, overflowing, None)]
    for future in both[::2]:
        with pytest.raises(RequestFailedError, match="not finite"):
            future.result(300)
    for future in both[1::2]:
        assert [r.tokens.tolist() for r in future.result(300).rows] == [r.tokens.tolist() for r in alone.rows]


def test_a_pool_holds_no_value_that_is_not_finite(engine: Engine, overflowing: Any) -> None:
    """Its weight 0 in a later row would not help. The key says instead that there was one."""
    with pytest.raises(RequestFailedError, match="not finite"):
        engine.generate(overflowing, request()).result(300)
    pool = {name: np.asarray(pages) for name, pages in engine.sampler._pool.items()}
    assert np.isnan(pool["k"]).any() and np.isfinite(pool["v"]).all()


def test_what_earlier_rows_left_in_a_page_is_not_read(engine: Engine) -> None:
    honest = request(num_samples=2, prompt_logprobs=True)
    before = engine.generate(None, honest).result(300)
    sampler = engine.sampler
    # As a row leaves it whose keys and values were not finite, or as large as can be.
    worst = {"k": jnp.nan, "v": jnp.finfo(jnp.float32).max}
    sampler._pool = {name: jnp.full_like(pages, worst[name]) for name, pages in sampler._pool.items()}
    # Other tokens: pages of the same would be found again.
    other = request(tokens_T=PROMPT + 1, num_samples=2)
    after = engine.generate(None, other).result(300)
    sampler.release_cache()
    assert same(engine.generate(None, other).result(300), after)
    assert same(engine.generate(None, honest).result(300), before)
