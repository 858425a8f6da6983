"""What are the logits of a short text over the whole vocabulary? One forward pass that keeps them all.

Training and sampling never hold (T, V) logits; the check of an export does, for a few tokens.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import AnyProgram, CompileRecord, Program
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD
from jax_client.models.layers import contract, from_bits
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.lora import lora_scale
from jax_client.models.transformer import context, forward_pass
from jax_client.sharding import replicated


def logits_program(dtype: jnp.dtype, attention: Attention, mesh: Mesh, log: list[CompileRecord]) -> AnyProgram:
    """Return `f(params, weights, tokens_BT, *, model) -> logits_TV`, whole on every device."""
    run = partial(full_logits, dtype=dtype, attention=attention)
    tokens = lambda _, __, tokens_BT: f"{tokens_BT.shape[1]} tokens"  # noqa: E731
    return Program("logits", run, log, lambda *_: replicated(mesh), tokens)


def full_logits(
    params: Params,
    weights: Weights,
    tokens_BT: jax.Array,
    *,
    model: ModelConfig,
    dtype: jnp.dtype,
    attention: Attention,
) -> jax.Array:
    """Return float32 logits (T, V) of one text, int32 (1, T), with an adapter's weights."""
    c = context(jnp.arange(tokens_BT.shape[1])[None], model, dtype, attention)
    h_BTD, _ = forward_pass(params, weights["layers"], tokens_BT, jnp.ones_like(tokens_BT), c, None)
    h_TD, unembed = h_BTD[0], weights["unembed"]
    logits_TV = contract("TD,VD->TV", h_TD, from_bits(output_head_VD(params)), dtype)
    if unembed:
        u_TR = contract("TD,RD->TR", h_TD, unembed["A"], dtype) * lora_scale(unembed["A"])
        logits_TV += contract("TR,RV->TV", u_TR, unembed["B"], dtype)
    return logits_TV
