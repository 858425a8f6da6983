"""What is a kind of residual part, and what do all parts of a pass share?

A layer is a list of residual parts, each x + f(norm(x)) or x + norm(f(norm(x))). `f` belongs to a `Kind`: a record of
functions, which says what it stores, which of its matmuls an adapter covers, and how it runs forwards and backwards.
Training, prefill and decoding share the forward function; only what mixes a row's tokens there differs (`Mixing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.models.config import LayerOptions, ModelConfig, Rope
from jax_client.models.parts.attention import Attention, Extras
from jax_client.models.parts.lora import Adapter, Pair
from jax_client.models.specs import LoraArray, ParamSpec

Saved = dict[str, Any]
Kept = Any  # what an attention keeps, as one tree of arrays
Remat = Literal["none", "selective", "full"]
Weights = Mapping[str, Any]


class Mixing(NamedTuple):
    """How the tokens of a row meet, in training over the rows themselves, in sampling over what is stored of each row.

    Attributes:
        attend: `f(q_BTKGH, k_BTKH, v_BTKH, **extras) -> (o_BTKGH, kept)`, with rotated q and k, the keywords of
            `Context.extras`, and what the caller wants to keep.
        recur: `f(inputs, weights) -> (o_BTPY, kept)`, of `parts.gated_delta.mixing.Inputs`.
    """

    attend: Callable[..., tuple[jax.Array, Kept]]
    recur: Callable[..., tuple[jax.Array, Kept]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of a pass shares: the model, the matmul type, the attention, the rotary tables; and its options.

    Attributes:
        tables: by rotation, cos and sin (B, T, d/2), of the d values of a head that rotate.
        options: of the layer that runs; see `of_layer`.
        on_cpu: whether the program runs on a CPU, where what is kept of bfloat16 are its bits.
        one_cpu: whether it runs on one CPU device, where some layouts are worth a constraint.
        one_gpu: whether it runs on one GPU, where the layout of what is kept is worth one.
        accelerator: whether it runs on a TPU or a GPU. What the attention and the gated activation read there, and the
            cotangents of what they return, is rounded to the matmul type: the widest results are written and read at
            half the size. They are kept for the backward pass in that type, and products take them in it, all the same.
        split_rows: `split_rows(x_BTD) -> x_BTD` keeps the residual stream split by rows over a mesh. The embedding and
            the weights are split by width over the same axis: left to itself, XLA would follow them, and compute all
            rows everywhere.
        mesh: of several devices; None where there is one.
        on_device: whether the program is one that each device runs over its own part of the arrays.
    """

    config: ModelConfig
    dtype: jnp.dtype
    attention: Attention
    tables: Mapping[Rope, tuple[jax.Array, jax.Array]]
    options: LayerOptions
    on_cpu: bool = False
    one_cpu: bool = False
    one_gpu: bool = False
    accelerator: bool = False
    split_rows: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD
    mesh: Mesh | None = None
    on_device: bool = False

    def of_layer(self, options: LayerOptions) -> Context:
        """Return what a layer with these options has."""
        return replace(self, options=options)

    @property
    def rotary(self) -> tuple[jax.Array, jax.Array]:
        """The table of this layer: cos and sin."""
        return self.tables[self.options.rope]

    def extras(self, w: Weights) -> Extras:
        """Return what this layer's attention has beside causality and segments; `w` are its weights."""
        found: Extras = {}
        if self.options.window is not None:
            found["window"] = self.options.window
        if self.config.query_scale is not None:
            found["scale"] = self.config.query_scale
        if self.config.sinks:
            found["sinks"] = w["sinks_LKG"]
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kind:
    """One kind of residual part. Arrays are those of one layer; M are its tokens, all rows behind each other.

    Attributes:
        name: under which the parameters are stored.
        flag: the field of `LoraSpec` that has an adapter cover it.
        params: `f(config, dtype) -> {leaf: ParamSpec}`, what is stored beside the norm; dtype is of matmul weights.
        modules: `f(config, rank) -> {module: {"A" and "B": LoraArray}}`, what an adapter may have. Names are the
            kind's own: no other kind has a module of that name.
        pairs: `f(adapter) -> {matmul: Pair}` of the modules that the adapter has, linear in it: its transpose takes the
            gradients of the pairs to those of the modules.
        forward: `f(h_MD, rows, weights, linears, context, mixing, known) -> (y_MD, saved, kept)` for the normed stream
            of `rows` (B, T); `saved` is what `backward` reads, and `kept` what `mixing` wants to keep, if a function of
            it was called. `known` is what an earlier run saved, where this one computes the rest of it again.
        backward: `f(dy_MD, h, saved, weights, linears, context, segments_BT) -> dh_MD`; `h() -> h_MD` is computed where
            it is called.
        saved: names in `saved`, with "u_" and a matmul's name for an adapter's u and "attention" for what the attention
            kept, by remat setting; "x", the part's input, comes with them. "full" recomputes whole layers from the
            input of their first part, and what is in `always`.
        always: names that every setting keeps.
        needed: without which `backward` cannot run: `forward` runs again where one of them is not kept.
        exact: of them, those that are not rounded to the matmul type.
        in_stack: leaves that `forward` and `backward` cut out of all layers' stack themselves (`InStack`).
        us: how many ranks wide the adapter's u's are.
        widths: `f(config, tensor) -> {name: values per token}` of the names in `saved`, on each of `tensor` devices.
        live: `f(config) -> (hidden, heads)`, the widths beside D of what exists while the part runs.
        multiply_adds: `f(config) -> (all, recomputed by "selective", recomputed by "full")`, of a token's products with
            frozen weights.
    """

    name: str
    flag: Literal["train_attn", "train_mlp"]
    params: Callable[[ModelConfig, jnp.dtype], dict[str, ParamSpec]]
    modules: Callable[[ModelConfig, int], dict[str, dict[str, LoraArray]]]
    pairs: Callable[[Adapter], dict[str, Pair]]
    forward: Callable[..., tuple[jax.Array, Saved, Kept]]
    backward: Callable[..., jax.Array]
    saved: Mapping[Literal["none", "selective"], tuple[str, ...]]
    always: tuple[str, ...] = ()
    needed: frozenset[str]
    exact: frozenset[str] = field(default_factory=frozenset)
    in_stack: frozenset[str] = field(default_factory=frozenset)
    us: Mapping[str, int]
    widths: Callable[[ModelConfig, int], dict[str, int]]
    live: Callable[[ModelConfig], tuple[int, int]]
    multiply_adds: Callable[[ModelConfig], tuple[int, int, int]]

    @property
    def scope(self) -> str:
        """Its name in profiles."""
        return "attention" if self.flag == "train_attn" else "mlp"
