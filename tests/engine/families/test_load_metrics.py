"""Do the metrics of experts say how evenly tokens went to them?"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.train.results import load_metrics
from jax_client.models.transformer import expert_load
from support.families import cases


def test_even_and_uneven_loads() -> None:
    even, one = np.full(4, 5.0), np.array([0.0, 0.0, 20.0, 0.0])
    assert load_metrics(np.stack([even, even])) == {
        "e_frac_with_tokens:mean": 1.0,
        "e_max_violation:mean": 0.0,
        "e_max_violation:max": 0.0,
    }
    found = load_metrics(np.stack([even, one]))
    assert found["e_frac_with_tokens:mean"] == pytest.approx(5 / 8)
    assert found["e_max_violation:mean"] == pytest.approx(1.5)
    assert found["e_max_violation:max"] == pytest.approx(3.0)


def test_padding_is_not_counted() -> None:
    config = cases.model_config("qwen3_moe_mixed")
    choice_LMk = jnp.asarray([[[0, 1], [1, 2], [7, 7]], [[3, 4], [3, 5], [7, 7]]])
    saved = {"layers": [[[{"x": 0}, {"choice": choice_LMk}]]]}
    load_LE = expert_load(saved, jnp.asarray([[1, 1, 0]]), config)
    np.testing.assert_array_equal(load_LE, [[1, 2, 1, 0, 0, 0, 0, 0], [0, 0, 0, 2, 1, 1, 0, 0]])
