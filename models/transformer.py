"""How do the layers run in sequence, forwards and backwards?

The layers are scanned over their stacked parameters, so that compile time does not grow with depth.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.layers import from_bits, rms_norm, rms_norm_backward, rope_table, to_bits
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.block import (
    SAVED_FOR_BACKWARD,
    Context,
    Linears,
    Remat,
    Saved,
    layer_backward,
    layer_forward,
    row_attention,
)
from jax_client.models.parts.lora import Adapter


def context(
    positions_BT: jax.Array,
    config: ModelConfig,
    dtype: jnp.dtype,
    attention: Attention,
    *,
    work: jax.Array | None = None,
    **more: Any,
) -> Context:
    """Return what every layer of a pass over these positions shares; `more` are fields of `Context`.

    Args:
        work: bool scalar, for a pass that unrolls its layers: whether there are rows to compute. The rotary table is
            computed under this condition, which keeps XLA from computing it again in every layer.
    """

    def table() -> tuple[jax.Array, jax.Array]:
        return rope_table(positions_BT, config)

    def zeros() -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(table))

    cos_BTH, sin_BTH = table() if work is None else jax.lax.cond(work, table, zeros)
    return Context(config=config, dtype=dtype, attention=attention, cos_BTH=cos_BTH, sin_BTH=sin_BTH, **more)


@jax.named_scope("embed")
def embed(params: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    """Return the float32 residual stream (B, T, D) that enters the first layer."""
    return from_bits(jnp.take(params["embed_VD"], tokens_BT, axis=0)).astype(jnp.float32)


def forward_pass(
    params: dict[str, Any],
    lora: Adapter,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    c: Context,
    remat: Remat | None,
) -> tuple[jax.Array, Saved]:
    """Run all layers and the final norm over packed rows.

    Args:
        lora: the stacked adapters of the layers, by module name; empty for the base model.
        tokens_BT, segments_BT: int32; segment 0 is padding.
        remat: what to keep for `backward_pass`, see `block.SAVED_FOR_BACKWARD`; None keeps nothing (no backward pass
            will follow).

    Returns:
        h_BTD float32, the input of the output projection, and what `backward_pass` needs.
    """
    attend = row_attention(segments_BT, c)

    def step(x_BTD: jax.Array, layer: tuple[dict[str, jax.Array], Adapter]) -> tuple[jax.Array, Any]:
        w, layer_lora = from_bits(layer)
        with jax.named_scope("layer"):
            y_BTD, saved, (_, _, residual) = layer_forward(x_BTD, w, Linears(layer_lora, c), c, attend)
        saved["attention"] = residual
        names = () if remat is None else SAVED_FOR_BACKWARD[remat]
        kept = {name: saved[name] for name in names if name in saved}
        return c.split_rows(y_BTD), to_bits(kept) if c.on_cpu else kept

    x_BTD = c.split_rows(embed(params, tokens_BT))
    x_BTD, kept = jax.lax.scan(step, x_BTD, (params["layers"], lora))
    saved = {} if remat is None else {"layers": kept, "last": x_BTD}
    return rms_norm(x_BTD, params["final_norm_D"], c.config.norm_eps), saved


def backward_pass(
    params: dict[str, Any],
    lora: Adapter,
    segments_BT: jax.Array,
    saved: Saved,
    dh_BTD: jax.Array,
    c: Context,
    accumulated: Adapter,
) -> dict[str, dict[str, jax.Array]]:
    """Return the accumulated gradients plus those of the stacked adapters for the cotangent of `forward_pass`'s output.

    Added layer by layer, so that the gradients of all layers exist once.
    """

    def step(dy_BTD: jax.Array, layer: tuple[dict[str, jax.Array], Adapter, Saved, Adapter]) -> tuple[jax.Array, Any]:
        w, layer_lora, kept, total = from_bits(layer)
        with jax.named_scope("layer"):
            dx_BTD, grads = layer_backward(dy_BTD, kept, segments_BT, w, layer_lora, c)
        return c.split_rows(dx_BTD), jax.tree.map(jnp.add, total, grads)

    dx_BTD = rms_norm_backward(saved["last"], params["final_norm_D"], c.config.norm_eps, c.split_rows(dh_BTD))
    layers = params["layers"], lora, saved["layers"], accumulated
    return jax.lax.scan(step, dx_BTD, layers, reverse=True)[1]
