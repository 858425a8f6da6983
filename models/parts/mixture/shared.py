"""What does an expert compute that all tokens share? A gated MLP, of which each token takes a share of its own.

    s = sigmoid(h w_s)
    y = s (silu(h W_gate) * (h W_up)) W_down

It is stored and adapted as the MLP of a dense layer, under names of its own. w_s is frozen and float32, as the router
is; the gradient goes through s. Every function gives nothing for a mixture without such an expert.

Source: arXiv 2401.06066; the share, as in Qwen1.5-MoE and transformers.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.layers import contract
from jax_client.models.parts.activations import activation_of
from jax_client.models.parts.dense import DENSE
from jax_client.models.parts.kind import Context, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair
from jax_client.models.specs import LoraArray, ParamSpec

PREFIX = "shared_"
GATE_UP, DOWN, SHARE = "shared_gate_up_L2DF", "shared_down_LFD", "shared_share_LD"
# What the backward pass reads beside its input, and recomputes where it is not kept.
SAVED = ("shared_gate", "shared_up")
F32 = jnp.dtype(jnp.float32)


def width(c: ModelConfig) -> int:
    """Return the expert's hidden width; 0 where there is none."""
    return 0 if c.experts is None else c.experts.shared_d_ff or 0


def params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    """Return what is stored: matrices as of a dense layer, and w_s."""
    if not width(c):
        return {}
    matrices = DENSE.params(replace(c, d_ff=width(c)), dtype)
    share = {SHARE: ParamSpec(shape=(c.d_model,), dtype=F32, axes=(None,))}
    return {PREFIX + leaf: spec for leaf, spec in matrices.items()} | share


def modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    """Return what an adapter may have."""
    if not width(c):
        return {}
    return {PREFIX + module: pair for module, pair in DENSE.modules(replace(c, d_ff=width(c)), rank).items()}


def pairs(lora: Adapter) -> dict[str, Pair]:
    """Return the pairs of the modules that the adapter has."""
    own = {name.removeprefix(PREFIX): pair for name, pair in lora.items() if name.startswith(PREFIX)}
    return {PREFIX + matmul: pair for matmul, pair in DENSE.pairs(own).items()}


@jax.named_scope("shared_expert")
def forward(h_MD: jax.Array, w: Weights, linears: Linears | MixedLinears, c: Context) -> tuple[jax.Array, Saved]:
    """Return y (M, D), float32, and gate and up (M, F) under the names of `SAVED`."""
    gate_MF, up_MF = linears.forward("shared_gate_up", h_MD, *w[GATE_UP])
    (y_MD,) = linears.forward("shared_down", activation_of(c.config).forward(gate_MF, up_MF), w[DOWN])
    return _share(h_MD, w)[:, None] * y_MD, dict(zip(SAVED, (gate_MF, up_MF), strict=True))


@jax.named_scope("shared_expert")
def backward(dy_MD: jax.Array, h_MD: jax.Array, saved: Saved, w: Weights, linears: Linears, c: Context) -> jax.Array:
    """Return the cotangent of h (M, D), float32, for that of y.

    What `saved` lacks of gate and up is recomputed, and so is the adapter's u of both matmuls: XLA drops the
    products beside it that nothing reads.
    """
    share_M, activation = _share(h_MD, w), activation_of(c.config)
    anew = dict(zip(SAVED, linears.forward("shared_gate_up", h_MD, *w[GATE_UP]), strict=True))
    gate_MF, up_MF = (saved.get(name, anew[name]) for name in SAVED)
    a_MF = activation.forward(gate_MF, up_MF)
    linears.forward("shared_down", a_MF, w[DOWN])
    da_MF = linears.backward("shared_down", [share_M[:, None] * dy_MD], a_MF, w[DOWN])
    _, dgate_MF, dup_MF = activation.backward(da_MF, gate_MF, up_MF)
    dh_MD = linears.backward("shared_gate_up", [dgate_MF, dup_MF], h_MD, *w[GATE_UP])
    # <a, da> = s <y / s, dy> = s ds: the output need be neither kept nor recomputed.
    dlogit_M = jnp.sum(a_MF * da_MF.astype(jnp.float32), axis=-1) * (1 - share_M)
    return dh_MD + dlogit_M[:, None] * w[SHARE]


def _share(h_MD: jax.Array, w: Weights) -> jax.Array:
    return jax.nn.sigmoid(contract("MD,D->M", h_MD, w[SHARE], F32))
