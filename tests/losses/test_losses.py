"""Do the value, the gradient and the statistics of every built-in loss equal its published formula?

The formulas here are numpy in float64. A formula takes the logprobs twice: `p`, and `held`, the same numbers where the
paper has a stop-gradient. The gradient is the central difference over `p` alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client import losses
from jax_client.engine.train import packing
from jax_client.losses import registry
from jax_client.losses.loss import Loss
from jax_client.values import TrainExample

Inputs = Mapping[str, np.ndarray]
Config = Mapping[str, float]
# f(p, held, inputs, config) -> (loss per target, statistics per target)
Formula = Callable[[np.ndarray, np.ndarray, Inputs, Config], tuple[np.ndarray, dict[str, np.ndarray]]]
LENGTHS = (1, 40, 7, 100, 33, 256, 2, 90)
apply_loss = jax.jit(registry.apply_loss)


def off_policy(p: np.ndarray, x: Inputs) -> dict[str, np.ndarray]:
    """The ratio to the sampling policy q and Schulman's k3 estimate of KL(q || p)."""
    ratio = np.exp(p - x["logprobs"])
    return {"ratio": ratio, "kl_sample_train": ratio - 1 - np.log(ratio)}


def surrogate(ratio: np.ndarray, a: np.ndarray, c: Config) -> tuple[np.ndarray, np.ndarray]:
    clipped = np.minimum(np.maximum(ratio, c["clip_low_threshold"]), c["clip_high_threshold"])
    return -np.minimum(ratio * a, clipped * a), (clipped * a < ratio * a).astype(float)


def cross_entropy(p: np.ndarray, held: np.ndarray, x: Inputs, c: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return -x["weights"] * p, {"nll": -p}


def importance_sampling(
    p: np.ndarray, held: np.ndarray, x: Inputs, c: Config
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return -np.exp(p - x["logprobs"]) * x["advantages"], off_policy(p, x)


def ppo(p: np.ndarray, held: np.ndarray, x: Inputs, c: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    value, clipped = surrogate(np.exp(p - x["logprobs"]), x["advantages"], c)
    return value, off_policy(p, x) | {"clip_fraction": clipped}


def cispo(p: np.ndarray, held: np.ndarray, x: Inputs, c: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    ratio = np.exp(held - x["logprobs"])
    inside = (ratio >= c["clip_low_threshold"]) & (ratio <= c["clip_high_threshold"])
    bound = np.where(ratio < c["clip_low_threshold"], c["clip_low_threshold"], c["clip_high_threshold"])
    weight = np.where(inside, ratio, bound)
    return -weight * p * x["advantages"], off_policy(p, x) | {"clip_fraction": (~inside).astype(float)}


def dro(p: np.ndarray, held: np.ndarray, x: Inputs, c: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return c["beta"] / 2 * (p - x["logprobs"]) ** 2 - p * x["advantages"], off_policy(p, x)


def gspo(p: np.ndarray, held: np.ndarray, x: Inputs, c: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    counted = x["sequence_ratio_mask"] != 0
    s = np.exp((held - x["logprobs"])[counted].mean()) if counted.any() else 1.0
    ratio = s * np.exp(p - held)
    value, clipped = surrogate(ratio, x["advantages"], c)
    return value, off_policy(p, x) | {"ratio": ratio, "clip_fraction": clipped}


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)}
MASKS = dict.fromkeys(FORMULAS, "advantages") | {"cross_entropy": "weights"}


def between(low: float, high: float) -> Config:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


# The documented defaults, then others.
CONFIGS: dict[str, list[Config]] = {
    "cross_entropy": [{}],
    "importance_sampling": [{}],
    "ppo": [between(0.8, 1.2), between(0.5, 1.05)],
    "cispo": [between(0.0, 4.0), between(0.7, 1.4)],
    "dro": [{"beta": 0.1}, {"beta": 1.5}],
    "gspo": [between(0.8, 1.2), between(0.95, 1.02)],
}
CASES = [
    pytest.param(name, config, width, id=f"{name}-{'-'.join(map(str, config.values())) or 'plain'}-K{width}")
    for name, configs in CONFIGS.items()
    for config in configs
    for width in ((1,) if name == "gspo" else (1, 3))
]


class Scored(NamedTuple):
    """A datum and the logprobs of its targets under the policy that is trained."""

    datum: TrainExample
    logprobs: np.ndarray


def scored(length: int, width: int, seed: int) -> Scored:
    """A datum whose ratios lie on both sides of any of the bounds, with a fifth of its targets masked."""
    rng = np.random.default_rng(seed)
    shape = (length,) if width == 1 else (length, width)
    sampled, counted = rng.uniform(-6, -2.5, shape), rng.random(shape) < 0.7
    log_ratio = rng.choice([-1.0, -0.3, 0.02, 0.3, 1.7], shape) * rng.uniform(0.5, 1, shape)
    # The mean ratio of a whole sequence lies below, inside or above the bounds.
    log_ratio += (-0.3, 0.0, 0.3)[seed % 3] - (log_ratio[counted].mean() if counted.any() else 0.0)
    inputs = {
        "weights": rng.normal(size=shape) * (rng.random(shape) < 0.8),
        "logprobs": sampled,
        "advantages": rng.normal(size=shape) * (rng.random(shape) < 0.8),
        "sequence_ratio_mask": counted * rng.normal(2, 1, shape),
    }
    tokens, targets = rng.integers(0, 99, length), rng.integers(0, 99, shape)
    datum = TrainExample(
        tokens_T=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        inputs={name: value.astype(np.float32) for name, value in inputs.items()},
    )
    return Scored(datum, (sampled + log_ratio).astype(np.float32))


def expected(name: str, config: Config, one: Scored) -> tuple[float, np.ndarray, dict[str, float]]:
    """The loss, its gradient by the logprobs, and the statistics summed over the scored targets."""
    x = {key: np.asarray(value, np.float64) for key, value in one.datum.inputs.items()}
    p, step = np.asarray(one.logprobs, np.float64), 1e-6
    formula = FORMULAS[name]
    value, stats = formula(p, p, x, config)
    # A loss per target depends on its own logprob and on held ones: one difference gives all of the gradient.
    gradient = (formula(p + step, p, x, config)[0] - formula(p - step, p, x, config)[0]) / (2 * step)
    counts = x[MASKS[name]] != 0
    sums = {key: stat[counts].sum() for key, stat in stats.items()}
    return value.sum(), gradient, sums | {"loss": value.sum(), "tokens": counts.sum()}


def micro_batches(name: str, config: Config, data: Sequence[TrainExample]) -> Iterator[packing.MicroBatch]:
    """Pack the data, two rows to a micro-batch."""
    limits = packing.Limits(ways=2, tokens=256)
    defaults = dict.fromkeys(registry.INPUTS, 0.0) | config
    for plan in packing.plan_call([len(datum.tokens_T) for datum in data], limits):
        yield packing.fill(plan, data, defaults, MASKS[name])


def computed(name: str, config: Config, batch: Sequence[Scored]) -> tuple[list[np.ndarray], dict[str, float]]:
    """What the package makes of the data: a gradient for each datum, and the sums over all of them."""
    data, logprobs = [one.datum for one in batch], [one.logprobs for one in batch]
    gradients, total = [np.zeros(0)] * len(data), {}
    for filled in micro_batches(name, config, data):
        p_BTC = packing.scatter(filled.plan, data, logprobs)
        # Nothing may come of the padding, whatever stands there.
        p_BTC = jnp.where(filled.real_BTC, p_BTC, 3.0)
        inputs = {key: jnp.where(filled.real_BTC, value, 2.0) for key, value in filled.inputs.items()}
        number = jnp.int32(registry.loss_number(name))
        g_BTC, sums = apply_loss(number, p_BTC, inputs, filled.real_BTC, filled.segments_BT)
        assert not np.asarray(g_BTC)[~filled.real_BTC].any()
        packing.unpack(filled.plan, data, np.asarray(g_BTC), gradients)  # type: ignore[arg-type]
        total = {key: total.get(key, 0.0) + float(value) for key, value in sums.items()}
    return gradients, total


@pytest.mark.parametrize(("name", "config", "width"), CASES)
def test_value_and_gradient_equal_the_formula_packed_and_alone(name: str, config: Config, width: int) -> None:
    batch = [scored(length, width, seed) for seed, length in enumerate(LENGTHS)]
    gradients, sums = computed(name, config, batch)
    references = [expected(name, config, one) for one in batch]
    assert sums["loss"] == pytest.approx(sum(value for value, _, _ in references), rel=1e-5)
    for one, packed, (value, gradient, _) in zip(batch, gradients, references, strict=True):
        assert packed.shape == one.datum.targets.shape
        np.testing.assert_allclose(packed, gradient, rtol=2e-5, atol=1e-6)
        (alone,), own = computed(name, config, [one])
        assert own["loss"] == pytest.approx(value, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(alone, gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "config", "width"), CASES)
def test_statistics_are_sums_over_the_scored_targets(name: str, config: Config, width: int) -> None:
    batch = [scored(length, width, seed) for seed, length in enumerate(LENGTHS)]
    _, sums = computed(name, config, batch)
    references = [expected(name, config, one)[2] for one in batch]
    known = references[0].keys()
    for key in known:
        assert sums[key] == pytest.approx(sum(sums[key] for sums in references), rel=1e-5), key
    assert not any(value for key, value in sums.items() if key not in known)


def test_every_loss_is_covered_with_its_documented_configuration() -> None:
    assert {name: configs[0] for name, configs in CONFIGS.items()} == {n: x.config for n, x in registry.LOSSES.items()}


def test_every_loss_reads_and_reports_what_is_documented() -> None:
    sampled = {"logprobs": True, "advantages": True}
    clipped = sampled | {"clip_low_threshold": False, "clip_high_threshold": False}
    ratio = ("ratio", "kl_sample_train")
    assert {name: (dict(loss.inputs), loss.stats, dict(loss.defaults)) for name, loss in registry.LOSSES.items()} == {
        "cross_entropy": ({"weights": False}, ("nll",), {"weights": 1.0}),
        "importance_sampling": (sampled, ratio, {}),
        "ppo": (clipped, (*ratio, "clip_fraction"), {}),
        "cispo": (clipped, (*ratio, "clip_fraction"), {}),
        "dro": (sampled, ratio, {}),
        "gspo": (clipped | {"sequence_ratio_mask": False}, (*ratio, "clip_fraction"), {}),
    }
    assert [name for name, loss in registry.LOSSES.items() if loss.one_target] == ["gspo"]
    copies = {name: dict(loss.copies) for name, loss in registry.LOSSES.items() if loss.copies}
    assert copies == {"gspo": {"sequence_ratio_mask": "advantages"}}
    assert registry.INPUTS == (
        "advantages", "beta", "clip_high_threshold", "clip_low_threshold", "logprobs", "sequence_ratio_mask", "weights",
    )  # fmt: skip


def test_metrics_are_sums_and_means_over_the_scored_targets() -> None:
    sums = {"loss": 6.0, "tokens": 4.0, "ratio": 2.0, "kl_sample_train": 1.0, "clip_fraction": 3.0, "nll": 8.0}
    assert registry.metrics("cross_entropy", sums) == {"loss:sum": 6.0, "tokens:sum": 4.0, "nll:mean": 2.0}
    assert registry.metrics("ppo", sums) == {
        "loss:sum": 6.0,
        "tokens:sum": 4.0,
        "ratio:mean": 0.5,
        "kl_sample_train:mean": 0.25,
        "clip_fraction:mean": 0.75,
    }
    assert registry.metrics("dro", sums | {"tokens": 0.0}) == {"loss:sum": 6.0, "tokens:sum": 0.0}


def test_a_loss_is_a_value() -> None:
    loss = registry.LOSSES["ppo"]
    with pytest.raises(FrozenInstanceError):
        loss.mask = "weights"  # type: ignore[misc]
    assert not hasattr(loss, "__dict__")
    with pytest.raises(TypeError):
        Loss(*(getattr(loss, field.name) for field in fields(loss)))  # type: ignore[misc]


def test_every_file_that_ends_with_a_loss_is_in_the_registry() -> None:
    modules = [importlib.import_module(f"jax_client.losses.{m.name}") for m in pkgutil.iter_modules(losses.__path__)]
    found = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Loss)}
    assert found == registry.LOSSES


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_the_data_has_targets_on_both_sides_of_both_bounds(name: str) -> None:
    """Of either sign of the advantage: else a formula with one wrong bound would pass."""
    low, high = CONFIGS[name][1].values()
    seen = set()
    for seed, length in enumerate(LENGTHS):
        one = scored(length, 1, seed)
        x = {key: np.asarray(value, np.float64) for key, value in one.datum.inputs.items()}
        stats = FORMULAS[name](one.logprobs, one.logprobs, x, CONFIGS[name][1])[1]
        counts = x["advantages"] != 0
        places = zip((stats["ratio"] * np.ones(length))[counts], x["advantages"][counts], strict=True)
        seen |= {("low" if r < low else "high" if r > high else "inside", a > 0) for r, a in places}
    assert len(seen) == 6


@pytest.mark.parametrize("name", FORMULAS)
def test_a_masked_target_has_a_gradient_only_where_the_table_says_so(name: str) -> None:
    """The head leaves out what a gradient needs where the table says that there is none."""
    loss = registry.LOSSES[name]
    one = scored(100, 1, 0)
    (gradient,), _ = computed(name, CONFIGS[name][0], [one])
    masked = one.datum.inputs[loss.mask] == 0
    assert masked.any() and not masked.all()
    assert bool(gradient[masked].any()) == loss.masked_has_gradient


@pytest.mark.parametrize("name", [name for name, loss in registry.LOSSES.items() if "ratio" in loss.stats])
def test_on_the_sampling_policy_every_gradient_is_the_policy_gradient(name: str) -> None:
    """Ratio 1, nothing clipped, no divergence: -A per target."""
    one = scored(100, 1, 3)
    one = Scored(one.datum, one.datum.inputs["logprobs"])
    (gradient,), sums = computed(name, CONFIGS[name][0], [one])
    np.testing.assert_allclose(gradient, -one.datum.inputs["advantages"], rtol=1e-6)
    assert sums["ratio"] == sums["tokens"] and sums["kl_sample_train"] == 0 == sums["clip_fraction"]


def test_no_loss_leaves_everything_to_the_host() -> None:
    one = scored(10, 1, 0)
    (filled,) = micro_batches("ppo", {}, [one.datum])
    p_BTC = jnp.asarray(packing.scatter(filled.plan, [one.datum], [one.logprobs]))
    g_BTC, sums = apply_loss(jnp.int32(registry.NO_LOSS), p_BTC, filled.inputs, filled.real_BTC, filled.segments_BT)
    assert g_BTC.shape == p_BTC.shape and not g_BTC.any() and not any(sums.values())
    of_a_loss = apply_loss(jnp.int32(0), p_BTC, filled.inputs, filled.real_BTC, filled.segments_BT)[1]
    assert sums.keys() == of_a_loss.keys()
