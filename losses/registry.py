"""Which losses are built in, what does each read, and how is it applied to packed rows?

A loss's settings reach it as inputs too, one value per target, and the loss itself as a number: so neither the choice
of a loss nor its settings compile anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from jax_client.losses import cispo, cross_entropy, dro, gspo, importance_sampling, ppo

Arrays = Mapping[str, jax.Array]
# From target logprobs and inputs of the same shape to (loss per target, statistics per target). Beside the inputs there
# is `segments_BT`, which says what belongs to one datum.
LossFn = Callable[[jax.Array, Arrays], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One built-in loss.

    Attributes:
        inputs: by name, whether the datum must carry it; all float32 in the shape of the targets. An optional input
            that is absent has the value given in `defaults` or `config`.
        config: the settings and their defaults.
        fn: the loss itself; what it returns is summed over targets and datums, never normalised.
        stats: the statistics that `fn` returns.
        mask: the input whose nonzero entries count as scored tokens in the metrics.
        masked_has_gradient: whether a target outside the mask can have a gradient.
        one_target: whether the loss has no meaning for several targets per position.
    """

    name: str
    inputs: Mapping[str, bool]
    fn: LossFn
    stats: tuple[str, ...]
    mask: str
    config: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)
    masked_has_gradient: bool = False
    one_target: bool = False


_SAMPLED = {"logprobs": True, "advantages": True}
_CLIPPED = {**_SAMPLED, "clip_low_threshold": False, "clip_high_threshold": False}
_RATIO = ("ratio", "kl_sample_train")

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            name="cross_entropy",
            inputs={"weights": False},
            fn=cross_entropy.loss,
            stats=("nll",),
            mask="weights",
            defaults={"weights": 1.0},
        ),
        Loss(
            name="importance_sampling",
            inputs=_SAMPLED,
            fn=importance_sampling.loss,
            stats=_RATIO,
            mask="advantages",
        ),
        Loss(
            name="ppo",
            inputs=_CLIPPED,
            fn=ppo.loss,
            stats=(*_RATIO, "clip_fraction"),
            mask="advantages",
            config=ppo.CONFIG,
        ),
        Loss(
            name="cispo",
            inputs=_CLIPPED,
            fn=cispo.loss,
            stats=(*_RATIO, "clip_fraction"),
            mask="advantages",
            config=cispo.CONFIG,
        ),
        Loss(
            name="dro",
            inputs=_SAMPLED,
            fn=dro.loss,
            stats=_RATIO,
            mask="advantages",
            config=dro.CONFIG,
            masked_has_gradient=True,
        ),
        Loss(
            name="gspo",
            inputs={**_CLIPPED, "sequence_ratio_mask": True},
            fn=gspo.loss,
            stats=(*_RATIO, "clip_fraction"),
            mask="advantages",
            config=gspo.CONFIG,
            one_target=True,
        ),
    )
}
# What the loss program takes, whichever loss it is told to compute.
INPUTS = tuple(sorted({name for loss in LOSSES.values() for name in (*loss.inputs, *loss.config)}))
_STATS = tuple(sorted({name for loss in LOSSES.values() for name in loss.stats}))
NO_LOSS = len(LOSSES)


def loss_number(name: str) -> int:
    """Return the number that tells `apply_loss` which loss to compute; `NO_LOSS` leaves it to the host."""
    return list(LOSSES).index(name)


def apply_loss(
    number: jax.Array, logprobs_BTC: jax.Array, inputs: Arrays, real_BTC: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return d loss / d logprobs (B, T, C) and the sums from which the metrics are made.

    Args:
        number: int32 scalar, see `loss_number`.
        logprobs_BTC: float32.
        inputs: all of `INPUTS` (B, T, C); those that the loss does not read hold anything finite.
        real_BTC: bool, False on padding.
        segments_BT: int32; positions of one datum lie side by side in one row and share a number.
    """
    branches = [partial(_apply, loss) for loss in LOSSES.values()]
    inputs = {**inputs, "segments_BT": segments_BT}
    return jax.lax.switch(number, [*branches, _nothing], logprobs_BTC, inputs, real_BTC)


def _apply(
    loss: Loss, logprobs_BTC: jax.Array, inputs: Arrays, real_BTC: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    scored_BTC = real_BTC & (inputs[loss.mask] != 0)

    def total(logprobs_BTC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss_BTC, stats = loss.fn(logprobs_BTC, inputs)
        return jnp.sum(jnp.where(real_BTC, loss_BTC, 0.0)), stats

    value, pullback, stats = jax.vjp(total, logprobs_BTC, has_aux=True)
    sums = {key: jnp.sum(jnp.where(scored_BTC, stats[key], 0.0)) if key in stats else jnp.zeros(()) for key in _STATS}
    sums |= {"loss": value, "tokens": jnp.sum(scored_BTC.astype(jnp.float32))}
    return pullback(jnp.ones_like(value))[0], sums


def _nothing(logprobs_BTC: jax.Array, inputs: Arrays, real_BTC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jnp.zeros_like(logprobs_BTC), dict.fromkeys((*_STATS, "loss", "tokens"), jnp.zeros(()))


def metrics(name: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the summed statistics of a call into metrics with the SDK's `name:reduction` keys.

    A mean over no scored token is left out.
    """
    tokens = sums["tokens"]
    means = {f"{key}:mean": sums[key] / tokens for key in LOSSES[name].stats if tokens}
    return {"loss:sum": sums["loss"], "tokens:sum": tokens, **means}
