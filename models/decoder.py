"""Which parameters does a decoder have, in which layout, under which logical axes?

One stored layout serves training and decoding. It is stacked by layer for `lax.scan`, fuses q|k|v and gate|up into one
matmul each, and groups the heads so that a tensor shard keeps whole key/value heads with their queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_client.models.config import ModelConfig

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpec:
    """Shape, dtype and logical axis names of one stored parameter."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


class Frozen(nnx.Variable):
    """A base-model parameter: never trained, no gradient, no optimizer state."""


Create = Callable[[tuple[int, ...], Any], jax.Array]


def frozen(create: Create, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> Frozen:
    """Make a frozen parameter that carries its logical axes as `axes` (nnx's own sharding keys demand a mesh)."""
    return Frozen(create(shape, dtype), axes=axes)


class Layers(nnx.Module):
    """Parameters of all layers, stacked on a leading axis."""

    def __init__(self, c: ModelConfig, dtype: Any, create: Create):
        L, D, F, K, G, H = c.n_layers, c.d_model, c.d_ff, c.n_kv_heads, c.group, c.head_dim
        f32 = jnp.float32
        self.attn_norm_LD = frozen(create, (L, D), f32, (None, None))
        # q|k|v of a key/value head after those of the one before. Not with the heads apart: a TPU lays out the last two
        # axes in tiles of 8 x 128, and each use would copy the matrix into another layout first.
        self.qkv_LDO = frozen(create, (L, D, K * (G + 2) * H), dtype, (None, "embed", "kv_heads"))
        if c.qkv_bias:
            self.qkv_bias_LKJH = frozen(create, (L, K, G + 2, H), f32, (None, "kv_heads", None, None))
        if c.qk_norm:
            self.q_norm_LH = frozen(create, (L, H), f32, (None, None))
            self.k_norm_LH = frozen(create, (L, H), f32, (None, None))
        self.o_LKGHD = frozen(create, (L, K, G, H, D), dtype, (None, "kv_heads", None, None, "embed"))
        self.mlp_norm_LD = frozen(create, (L, D), f32, (None, None))
        self.gate_up_L2DF = frozen(create, (L, 2, D, F), dtype, (None, None, "embed", "ffw"))
        self.down_LFD = frozen(create, (L, F, D), dtype, (None, "ffw", "embed"))


class Decoder(nnx.Module):
    """Parameters of a decoder: embedding, layers, final norm and, unless tied, the output projection."""

    def __init__(self, c: ModelConfig, dtype: Any, create: Create = jnp.zeros):
        self.embed_VD = frozen(create, (c.vocab_size, c.d_model), dtype, ("vocab", "embed"))
        self.layers = Layers(c, dtype, create)
        self.final_norm_D = frozen(create, (c.d_model,), jnp.float32, (None,))
        if not c.tied_embeddings:
            self.unembed_VD = frozen(create, (c.vocab_size, c.d_model), dtype, ("vocab", "embed"))


def param_specs(config: ModelConfig, dtype: Any) -> Params:
    """Return the tree of `ParamSpec` of a model; nothing is allocated.

    The tree is a nested dict with the module's attribute names, the form in which programs take the parameters.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype))
    state = nnx.state(abstract, Frozen)

    def spec(variable: Frozen) -> ParamSpec:
        value = variable.get_value()
        return ParamSpec(shape=tuple(value.shape), dtype=value.dtype, axes=variable.get_metadata()["axes"])

    return jax.tree.map(spec, nnx.to_pure_dict(state, lambda v: v), is_leaf=lambda v: isinstance(v, Frozen))


def output_head_VD(params: Params) -> jax.Array:
    """Return the output projection (V, D): the embedding where they are tied."""
    return params.get("unembed_VD", params["embed_VD"])
