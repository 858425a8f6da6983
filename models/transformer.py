"""How do the layers run in sequence, forwards and backwards?

Each segment of the plan is scanned over its runs, so that compile time does not grow with depth.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.layers import from_bits, rms_norm, rms_norm_backward, to_bits
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.block import layer_backward, layer_forward, mixing_of_rows, saved_for_backward
from jax_client.models.parts.kind import Context, Remat, Saved
from jax_client.models.parts.linears import Linears
from jax_client.models.parts.lora import Adapter
from jax_client.models.plan import PlacedLayer, Segment, layers, plan
from jax_client.models.rope import rope_table
from jax_client.models.stacks import SegmentStacks

# Gradients of the stacked adapters, by module, then "A" or "B".
Gradients = dict[str, dict[str, jax.Array]]


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
        work: bool scalar, for a pass that unrolls its layers: whether there are rows to compute. The rotary tables are
            computed under this condition, which keeps XLA from computing it again in every layer.
    """
    every = layers(config)
    ropes = tuple(dict.fromkeys(layer.options.rope for layer in every))

    def tables() -> list[tuple[jax.Array, jax.Array]]:
        return [rope_table(positions_BT, config, rope) for rope in ropes]

    def zeros() -> list[tuple[jax.Array, jax.Array]]:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(tables))

    found = tables() if work is None else jax.lax.cond(work, tables, zeros)
    shared: Any = {"config": config, "dtype": dtype, "attention": attention, "options": every[0].options}
    return Context(**shared, tables=dict(zip(ropes, found, strict=True)), **more)


@jax.named_scope("embed")
def embed(params: dict[str, Any], tokens_BT: jax.Array, c: Context) -> jax.Array:
    """Return the float32 residual stream (B, T, D) that enters the first layer."""
    return scaled(from_bits(jnp.take(params["embed_VD"], tokens_BT, axis=0)).astype(jnp.float32), c)


def scaled(x_BTD: jax.Array, c: Context) -> jax.Array:
    """Return embeddings as the first layer takes them. The scale is rounded to the matmul type, as a release's is."""
    scale = c.config.embedding_scale
    return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, c.dtype).astype(jnp.float32)


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
        remat: what to keep for `backward_pass`, see `Kind.saved`; None keeps nothing (no backward pass will follow).

    Returns:
        h_BTD float32, the input of the output projection, and what `backward_pass` needs.
    """
    mixing = mixing_of_rows(segments_BT, c)
    x_BTD, kept = c.split_rows(embed(params, tokens_BT, c)), []
    for segment in plan(c.config):
        stacks = SegmentStacks(segment, c.config, params["layers"], lora)

        def step(x_BTD: jax.Array, xs: Any, segment: Segment = segment, stacks: SegmentStacks = stacks) -> Any:
            i, scanned = xs
            every = []
            for layer in segment.layers:

                def run(x_BTD: jax.Array, j: jax.Array | int, layer: PlacedLayer = layer) -> tuple[jax.Array, Any]:
                    ws, loras = stacks.of_layer(layer, i, j, scanned)
                    kinds, own_c = layer.kinds, c.of_layer(layer.options)
                    linears = [Linears(kind, own, own_c) for kind, own in zip(kinds, loras, strict=True)]
                    with jax.named_scope("layer"):
                        x_BTD, saved, _ = layer_forward(x_BTD, kinds, ws, linears, own_c, mixing)
                    names = [()] * len(kinds) if remat is None else saved_for_backward(kinds, remat, c.config)
                    found = [{n: own[n] for n in wanted if n in own} for wanted, own in zip(names, saved, strict=True)]
                    return c.split_rows(x_BTD), to_bits(found) if c.on_cpu else found

                x_BTD, found = run(x_BTD, 0) if layer.times == 1 else jax.lax.scan(run, x_BTD, jnp.arange(layer.times))
                every.append(found)
            return x_BTD, every

        x_BTD, found = jax.lax.scan(step, x_BTD, (jnp.arange(segment.repeats), stacks.scanned))
        kept.append(found)
    saved = {} if remat is None else {"layers": kept, "last": x_BTD}
    return rms_norm(x_BTD, params["final_norm_D"], c.config.norm_eps), saved


@jax.named_scope("load")
def expert_load(saved: Saved, segments_BT: jax.Array, config: ModelConfig) -> jax.Array | None:
    """Return how many tokens each expert got (L, E), float32, padding not counted; None for a model without experts.

    Args:
        saved: of `forward_pass`.
        segments_BT: as it was given.
        config: the model.
    """
    if config.experts is None:
        return None
    E, real_M1 = config.experts.count, (segments_BT > 0).reshape(-1, 1).astype(jnp.float32)

    def of_layer(choice_Mk: jax.Array) -> jax.Array:
        return jnp.zeros(E).at[choice_Mk].add(jnp.broadcast_to(real_M1, choice_Mk.shape))

    every = [layer for segment in saved["layers"] for layer in segment]
    choices = [part["choice"] for layer in every for part in layer if "choice" in part]
    flat = [
        choice.reshape(-1, *choice.shape[-2:]) for choice in choices
    ]  # of a layer that runs in runs of a block, too
    return jnp.concatenate([jax.vmap(of_layer)(choice_LMk) for choice_LMk in flat])


def _add_at(place: jax.Array, total: jax.Array, new: jax.Array) -> jax.Array:
    return total.at[place].add(new)


def backward_pass(
    params: dict[str, Any],
    lora: Adapter,
    segments_BT: jax.Array,
    saved: Saved,
    dh_BTD: jax.Array,
    c: Context,
    accumulated: Adapter,
) -> Gradients:
    """Return the accumulated gradients plus those of the stacked adapters for the cotangent of `forward_pass`'s output.

    Added layer by layer, so that the gradients of all layers exist once.
    """
    dx_BTD = rms_norm_backward(saved["last"], params["final_norm_D"], c.config.norm_eps, c.split_rows(dh_BTD))
    total = {module: dict(pair) for module, pair in accumulated.items()}
    for segment, kept in reversed(list(zip(plan(c.config), saved["layers"], strict=True))):
        stacks = SegmentStacks(segment, c.config, params["layers"], lora)
        whole = {module: total[module] for _, loras in stacks.scanned.values() for module in loras}

        def step(carry: Any, xs: Any, segment: Segment = segment, stacks: SegmentStacks = stacks) -> Any:
            (dy_BTD, total), (i, scanned, kept, whole) = carry, xs
            new: Gradients = {}
            for layer, found in reversed(list(zip(segment.layers, kept, strict=True))):

                def run(carry: Any, xs: Any, layer: PlacedLayer = layer) -> tuple[Any, Gradients]:
                    (dy_BTD, total), (j, found), new = carry, xs, {}
                    ws, loras = stacks.of_layer(layer, i, j, scanned)
                    own_c, found = c.of_layer(layer.options), from_bits(found)
                    with jax.named_scope("layer"):
                        dy_BTD, grads = layer_backward(dy_BTD, found, segments_BT, layer.kinds, ws, loras, own_c)
                    for part, own in zip(layer.parts, grads, strict=True):
                        if stacks.is_scanned(part):
                            new |= jax.tree.map(jnp.add, {module: whole[module] for module in own}, own)
                        else:
                            add = partial(_add_at, part.place(i, j))
                            total = total | jax.tree.map(add, {module: total[module] for module in own}, own)
                    return (c.split_rows(dy_BTD), total), new

                if layer.times == 1:
                    (dy_BTD, total), own = run((dy_BTD, total), (0, found))
                    new |= own
                else:  # none of its parts is scanned
                    xs = jnp.arange(layer.times), found
                    (dy_BTD, total), _ = jax.lax.scan(run, (dy_BTD, total), xs, reverse=True)
            return (dy_BTD, total), new

        rest = {module: pair for module, pair in total.items() if module not in whole}
        xs = jnp.arange(segment.repeats), stacks.scanned, kept, whole
        (dx_BTD, rest), new = jax.lax.scan(step, (dx_BTD, rest), xs, reverse=True)
        total = rest | new
    return total
