"""Does a step that would leave float32's range fail, name its setting, and leave the adapter as it was?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.models.lora_arrays import LARGEST_WEIGHT, flatten, nest
from jax_client.values import AdapterState
from support.golden_cases import CASES, lora_values
from support.golden_engine import CROSS_ENTROPY, SPEC, data, open_engine, to_ours

CONFIG = CASES["llama_tied"]
ADAM = AdamSettings(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0)
WEIGHTS = to_ours(CONFIG, lora_values(CONFIG))


def one_moment(mu: float, nu: float) -> dict[str, dict[str, np.ndarray]]:
    """Moments that are zeros, but for one place of one array."""
    moments = {}
    for name, value in (("mu", mu), ("nu", nu)):
        moments[name] = {key: np.zeros_like(array) for key, array in WEIGHTS.items()}
        moments[name]["q.B"].flat[0] = value
    return moments


STATE = AdapterState(spec=SPEC, step=3, weights=WEIGHTS, **one_moment(1e-3, 1e-6))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), CONFIG)
    yield engine
    engine.close()


def held(adapter: Any) -> list[bytes]:
    trees = (adapter.weights, adapter.mu, adapter.nu, adapter.grads)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]


@pytest.mark.parametrize(
    ("setting", "changes", "state"),
    [
        ("learning_rate 1e+30", {"learning_rate": 1e30}, STATE),
        ("learning_rate 3e+38", {"learning_rate": 3e38, "weight_decay": 0.0}, STATE),
        ("weight_decay 1e+30", {"weight_decay": 1e30}, STATE),
        ("weight_decay 3e+38", {"weight_decay": 3e38}, STATE),
        # No gradient has the size of the first moment: its root is 0, and eps alone divides.
        ("eps 1.2e-38", {"eps": 1.2e-38, "beta2": 0.0, "clear": 1.0}, STATE),
        # At the first step, bias correction divides what is left of another beta's moment by 1 - beta1.
        (
            "beta1 0.9999999",
            {"beta1": 0.9999999, "learning_rate": 1.0},
            replace(STATE, step=0, **one_moment(1e18, 1.0)),
        ),
        # Each is harmless without the other.
        ("learning_rate 1e+18", {"learning_rate": 1e18, "eps": 1e-10}, replace(STATE, **one_moment(1e3, 0.0))),
    ],
)
def test_the_setting_is_named_and_nothing_changes(
    engine: Engine, setting: str, changes: dict[str, float], state: AdapterState
) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, state).result()
    engine.train_batch(lane, adapter, data(CONFIG), CROSS_ENTROPY).result()
    if changes.pop("clear", None):
        adapter.grads = jax.tree.map(lambda g: g * 0, adapter.grads)
    before, work = held(adapter), replace(adapter.work)
    with pytest.raises(RequestFailedError, match="optim_step: ") as caught:
        engine.optim_step(lane, adapter, replace(ADAM, **changes)).result()
    assert caught.value.category == "user" and f"optim_step: {setting} would take" in str(caught.value)
    assert f"step {state.step}, and the accumulated gradient is kept" in str(caught.value)
    assert held(adapter) == before and adapter.step == state.step and adapter.skipped_in_a_row == 0
    assert adapter.work.tokens == work.tokens
    engine.optim_step(lane, adapter, ADAM).result()
    twin = engine.open_adapter(lane, state).result()
    engine.train_batch(lane, twin, data(CONFIG), CROSS_ENTROPY).result()
    if "eps 1.2" not in setting:
        engine.optim_step(lane, twin, ADAM).result()
        assert held(twin) == held(adapter), "as if the failed step had not been asked for"


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e15}, {"eps": 3e38}, {"grad_clip_norm": 3e38}, {"beta1": 0.9999999}, {"beta2": 0.9999999}],
)
def test_settings_that_are_large_in_range_are_taken(engine: Engine, changes: dict[str, float]) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, STATE).result()
    engine.train_batch(lane, adapter, data(CONFIG), CROSS_ENTROPY).result()
    assert engine.optim_step(lane, adapter, replace(ADAM, **changes)).result()["step:max"] == STATE.step + 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * LARGEST_WEIGHT])
@pytest.mark.parametrize("which", ["weights", "mu", "nu"])
def test_a_state_that_no_step_leaves_is_not_loaded(engine: Engine, which: str, value: float) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, STATE).result()
    before = held(adapter)
    arrays = {name: array.copy() for name, array in getattr(STATE, which).items()}
    arrays["o.A"].flat[7] = value
    state = replace(STATE, **{which: arrays})
    if which == "nu" and np.isfinite(value):  # a square may be as large
        engine.restore(lane, adapter, state).result()
        return
    for call in (engine.open_adapter(lane, state), engine.restore(lane, adapter, state), engine.snapshot(lane, state)):
        with pytest.raises(
            BadRequestError,
            match=rf"saved adapter cannot be loaded: in its {which} {re.escape(str(value))} at o\.A\[0, 0, 0, ",
        ):
            call.result()
    assert held(adapter) == before


def test_damaged_memory_is_not_saved(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, STATE).result()
    flat = flatten(adapter.nu)
    adapter.nu = nest(flat | {"down.B": flat["down.B"].at[0, 1, 2].set(np.nan)})
    with pytest.raises(RequestFailedError, match=r"step 3 cannot be saved: in its nu nan at down\.B\[0, 1, 2\]"):
        engine.snapshot(lane, adapter, optimizer=True).result().fetch()
    assert engine.snapshot(lane, adapter).result().fetch().step == 3, "the weights alone are whole"
