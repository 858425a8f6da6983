"""Which parameters does a decoder have, in which layout, under which logical axes?

One stored layout serves training and decoding. It is stacked by layer for `lax.scan`, each kind of part for itself,
fuses q|k|v and gate|up into one matmul each, and groups the heads so that a tensor shard keeps whole key/value heads
with their queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_client.models.config import ModelConfig
from jax_client.models.parts.kind import Kind
from jax_client.models.plan import count, kinds
from jax_client.models.specs import ParamSpec

Params = dict[str, Any]


class Frozen(nnx.Variable):
    """A base-model parameter: never trained, no gradient, no optimizer state."""


Create = Callable[[tuple[int, ...], Any], jax.Array]


def frozen(create: Create, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> Frozen:
    """Make a frozen parameter that carries its logical axes as `axes` (nnx's own sharding keys demand a mesh)."""
    return Frozen(create(shape, dtype), axes=axes)


class Stacks(nnx.Module):
    """Parameters of all parts of one kind, stacked on a leading axis in the order of their layers."""

    def __init__(self, kind: Kind, c: ModelConfig, dtype: Any, create: Create):
        norm = ParamSpec(shape=(c.d_model,), dtype=jnp.dtype(jnp.float32), axes=(None,))
        norms = dict.fromkeys(("norm_LD", "post_norm_LD")[: 1 + c.post_norms], norm)
        for name, p in (norms | kind.params(c, dtype)).items():
            setattr(self, name, frozen(create, (count(c, kind), *p.shape), p.dtype, (None, *p.axes)))


class Layers(nnx.Module):
    """Parameters of all layers, by kind of part."""

    def __init__(self, c: ModelConfig, dtype: Any, create: Create):
        for kind in kinds(c):
            setattr(self, kind.name, Stacks(kind, c, dtype, create))


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
