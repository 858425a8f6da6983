"""Which linear layer of a Hugging Face model does each module of an adapter cover? A table names them by projection.

An adapter keeps A (R, in...) and B (R, out...) with heads apart and layers stacked; others keep two matrices per linear
layer. The views here are matrices: A (R, in) and B (R, out), with in and out counted as Hugging Face counts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jax_client.errors import BadRequestError
from jax_client.models import lora_arrays
from jax_client.models.config import ModelConfig
from jax_client.values import AdapterState, LoraSpec

UNEMBED = "unembed"
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
PROJECTIONS = ATTENTION | MLP | {UNEMBED: "lm_head"}

# (A, B) by the name of the linear layer, such as "model.layers.0.self_attn.q_proj".
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def covered(spec: LoraSpec) -> list[str]:
    """Return the modules that an adapter of this configuration has."""
    groups = ((spec.train_attn, ATTENTION), (spec.train_mlp, MLP), (spec.train_unembed, (UNEMBED,)))
    return [module for is_covered, modules in groups if is_covered for module in modules]


def linear_names(module: str, c: ModelConfig) -> list[str]:
    """Return Hugging Face's names of the linear layers that a module covers, without ".weight"."""
    if module == UNEMBED:
        return [PROJECTIONS[module]]
    block = "self_attn" if module in ATTENTION else "mlp"
    return [f"model.layers.{layer}.{block}.{PROJECTIONS[module]}" for layer in range(c.n_layers)]


def linear_sizes(c: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer that an adapter of this configuration covers."""
    shapes, sizes = lora_arrays.array_shapes(c, spec), {}
    for module in covered(spec):
        names = linear_names(module, c)
        n_in, n_out = (math.prod(shapes[f"{module}.{ab}"]) // (len(names) * spec.rank) for ab in "AB")
        sizes |= dict.fromkeys(names, (n_in, n_out))
    return sizes


def to_pairs(state: AdapterState, c: ModelConfig) -> Pairs:
    """Return an adapter's matrices, as views of its arrays.

    Raises:
        BadRequestError: the arrays are not those of this model: how many, and the first five with both shapes. Or
            numbers are not finite, or too large: how many, and the first.
    """
    advice = "Give the base model that it was trained on."
    lora_arrays.refuse_other_shapes("the adapter", state.weights, c, state.spec, advice)
    if (wrong := lora_arrays.out_of_range(state.weights)) is not None:
        raise BadRequestError(f"the adapter cannot be used: {wrong}. Take an earlier checkpoint of its run.")
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for module in covered(state.spec):
        names = linear_names(module, c)
        a, b = (state.weights[f"{module}.{ab}"].reshape(len(names), state.spec.rank, -1) for ab in "AB")
        pairs |= dict(zip(names, zip(a, b, strict=True), strict=True))
    return pairs


def from_pairs(pairs: Pairs, c: ModelConfig, spec: LoraSpec) -> dict[str, np.ndarray]:
    """Return an adapter's arrays, float32 by flat name, from the matrices of every linear layer that it covers."""
    arrays = {}
    for name, shape in lora_arrays.array_shapes(c, spec).items():
        module, part = name.split(".")
        matrices = [pairs[linear]["AB".index(part)] for linear in linear_names(module, c)]
        arrays[name] = np.stack(matrices, dtype=np.float32).reshape(shape)
    return arrays
