"""Which losses are built in, and how is one applied to packed rows?

`LOSSES` holds them by name, and `apply_loss` computes the one whose number it gets. A loss's settings are inputs like
the others, one value per target. So neither the choice of a loss nor its settings compile anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

# A loss is built in by its import here: `LOSSES` collects every `Loss` among this module's names.
from jax_client.losses.cispo import CISPO as CISPO
from jax_client.losses.cross_entropy import CROSS_ENTROPY as CROSS_ENTROPY
from jax_client.losses.dro import DRO as DRO
from jax_client.losses.gspo import GSPO as GSPO
from jax_client.losses.importance_sampling import IMPORTANCE_SAMPLING as IMPORTANCE_SAMPLING
from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.ppo import PPO as PPO

LOSSES: dict[str, Loss] = {value.name: value for value in tuple(globals().values()) if isinstance(value, Loss)}
# The inputs of `apply_loss`: those of all losses.
INPUTS = tuple(sorted({name for loss in LOSSES.values() for name in (*loss.inputs, *loss.config)}))
_STATS = tuple(sorted({name for loss in LOSSES.values() for name in loss.stats}))
NO_LOSS = len(LOSSES)


def loss_number(name: str) -> int:
    """Return the number that tells `apply_loss` which loss to compute; `NO_LOSS` leaves it to the host."""
    return list(LOSSES).index(name)


@jax.named_scope("loss")
def apply_loss(
    number: jax.Array, logprobs_BTC: jax.Array, inputs: Arrays, real_BTC: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return d loss / d logprobs (B, T, C) and the sums from which the metrics are made.

    Args:
        number: int32 scalar, see `loss_number`.
        logprobs_BTC: float32.
        inputs: all of `INPUTS`, float32 (B, T, C); any finite value where the loss does not read one.
        real_BTC: bool, False on padding.
        segments_BT: int32; the positions of one datum are adjacent in one row and share a number.
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
