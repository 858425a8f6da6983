"""Which losses are built in, what does each read, and how is it applied to packed rows?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jax_client.losses import cispo, cross_entropy, dro, importance_sampling, ppo

Arrays = Mapping[str, jax.Array]
# From target logprobs, inputs of the same shape and traced settings to (loss per target, statistics per target).
LossFn = Callable[[jax.Array, Arrays, Arrays], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One built-in loss.

    Attributes:
        inputs: by name, whether the datum must carry it; all float32 in the shape of the targets. An optional input
            that is absent has the default given in `defaults`.
        config: the settings and their defaults.
        fn: the loss itself; what it returns is summed over targets and datums, never normalised.
        mask: the input whose nonzero entries count as scored tokens in the metrics.
    """

    name: str
    inputs: Mapping[str, bool]
    fn: LossFn
    mask: str
    config: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)


_SAMPLED = {"logprobs": True, "advantages": True}
_CLIPPED = {**_SAMPLED, "clip_low_threshold": False, "clip_high_threshold": False}

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            name="cross_entropy",
            inputs={"weights": False},
            fn=cross_entropy.loss,
            mask="weights",
            defaults={"weights": 1.0},
        ),
        Loss(name="importance_sampling", inputs=_SAMPLED, fn=importance_sampling.loss, mask="advantages"),
        Loss(name="ppo", inputs=_CLIPPED, fn=ppo.loss, mask="advantages", config=ppo.CONFIG),
        Loss(name="cispo", inputs=_CLIPPED, fn=cispo.loss, mask="advantages", config=cispo.CONFIG),
        Loss(name="dro", inputs=_SAMPLED, fn=dro.loss, mask="advantages", config=dro.CONFIG),
    )
}


def apply_loss(
    name: str, logprobs_BTC: jax.Array, inputs: Arrays, config: Arrays, real_BTC: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return d loss / d logprobs (B, T, C) and the sums from which the metrics are made.

    Args:
        logprobs_BTC: float32.
        inputs: the loss's inputs (B, T, C); zero on padding.
        real_BTC: bool, False on padding.
    """
    loss = LOSSES[name]
    scored_BTC = real_BTC & (inputs[loss.mask] != 0)

    def total(logprobs_BTC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss_BTC, stats = loss.fn(logprobs_BTC, inputs, config)
        return jnp.sum(jnp.where(real_BTC, loss_BTC, 0.0)), stats

    value, pullback, stats = jax.vjp(total, logprobs_BTC, has_aux=True)
    sums = {key: jnp.sum(jnp.where(scored_BTC, stat, 0.0)) for key, stat in stats.items()}
    sums |= {"loss": value, "tokens": jnp.sum(scored_BTC.astype(jnp.float32))}
    return pullback(jnp.ones_like(value))[0], sums


def metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the summed statistics of a call into metrics with the SDK's `name:reduction` keys.

    A mean over no scored token is left out.
    """
    tokens = sums["tokens"]
    means = {f"{key}:mean": value / tokens for key, value in sums.items() if key not in ("loss", "tokens") and tokens}
    return {"loss:sum": sums["loss"], "tokens:sum": tokens, **means}
