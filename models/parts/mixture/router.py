"""To which experts does a token go, and with which weights? The k of largest probability.

Float32 at full precision on every platform: a choice that flips between two passes is an error of a whole expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract

F32 = jnp.dtype(jnp.float32)


@jax.named_scope("router")
def route(
    h_MD: jax.Array, router_DE: jax.Array, k: int, *, normalized: bool, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the choices (M, k), int32, and their weights, float32.

    Args:
        h_MD: float32, the normed residual stream.
        router_DE: float32.
        k: choices of a token. Of equal probabilities the lower expert comes first.
        normalized: whether a token's weights sum to 1, and so are a softmax over those chosen; else they are the
            probabilities among all experts.
        bias_E: float32, added to the logits.
    """
    probability_ME = jax.nn.softmax(_logits(h_MD, router_DE, bias_E))
    weight_Mk, choice_Mk = jax.lax.top_k(probability_ME, k)
    if normalized:
        weight_Mk /= jnp.sum(weight_Mk, axis=-1, keepdims=True)
    return choice_Mk, weight_Mk


@jax.named_scope("router")
def route_backward(
    dweight_Mk: jax.Array,
    h_MD: jax.Array,
    choice_Mk: jax.Array,
    weight_Mk: jax.Array,
    router_DE: jax.Array,
    *,
    normalized: bool,
    bias_E: jax.Array | None = None,
) -> jax.Array:
    """Return the cotangent of h (M, D), float32, for that of the weights; the choices have none."""
    mean_M1 = jnp.sum(weight_Mk * dweight_Mk, axis=-1, keepdims=True)
    rows_M1 = jnp.arange(len(h_MD))[:, None]
    if normalized:  # the softmax over all experts and the norm are one softmax over those chosen
        nothing_ME = jnp.zeros((len(h_MD), router_DE.shape[1]))
        dlogits_ME = nothing_ME.at[rows_M1, choice_Mk].set(weight_Mk * (dweight_Mk - mean_M1))
    else:
        probability_ME = jax.nn.softmax(_logits(h_MD, router_DE, bias_E))
        dlogits_ME = (-probability_ME * mean_M1).at[rows_M1, choice_Mk].add(weight_Mk * dweight_Mk)
    return contract("ME,DE->MD", dlogits_ME, router_DE, F32)


def _logits(h_MD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    logits_ME = contract("MD,DE->ME", h_MD, router_DE, F32)
    return logits_ME if bias_E is None else logits_ME + bias_E
