"""Which linear layer of a Hugging Face model does each module of an adapter cover? A table names them by projection.

An adapter keeps A (R, in...) and B (R, out...) with heads apart and layers stacked; others keep two matrices per linear
layer. The views here are matrices: A (R, in) and B (R, out), with in and out counted as Hugging Face counts them. What
all experts of a layer share is in the pair of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models import lora_arrays
from jax_client.models.config import ModelConfig
from jax_client.models.plan import kinds, layers_of
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.towers import module_name

UNEMBED = "unembed"
# By module: the part of a layer, and the projection there.
PROJECTIONS = {
    "q": ("self_attn.", "q_proj"),
    "k": ("self_attn.", "k_proj"),
    "v": ("self_attn.", "v_proj"),
    "o": ("self_attn.", "o_proj"),
    "delta_q": ("linear_attn.", "in_proj_q"),
    "delta_k": ("linear_attn.", "in_proj_k"),
    "delta_v": ("linear_attn.", "in_proj_v"),
    "delta_z": ("linear_attn.", "in_proj_z"),
    "delta_out": ("linear_attn.", "out_proj"),
    "gate": ("mlp.", "gate_proj"),
    "up": ("mlp.", "up_proj"),
    "down": ("mlp.", "down_proj"),
    "experts_gate": ("mlp.experts.{expert}.", "gate_proj"),
    "experts_up": ("mlp.experts.{expert}.", "up_proj"),
    "experts_down": ("mlp.experts.{expert}.", "down_proj"),
    "shared_gate": ("mlp.shared_expert.", "gate_proj"),
    "shared_up": ("mlp.shared_expert.", "up_proj"),
    "shared_down": ("mlp.shared_expert.", "down_proj"),
    UNEMBED: ("", "lm_head"),
}

# (A, B) by the name of the linear layer, such as "model.layers.0.self_attn.q_proj".
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def covered(c: ModelConfig, spec: LoraSpec) -> list[str]:
    """Return the modules that an adapter of this configuration has."""
    arrays = lora_arrays.lora_arrays(c, spec)
    return [*arrays["layers"], *([UNEMBED] if arrays["unembed"] else [])]


def linear_names(module: str, c: ModelConfig) -> list[str]:
    """Return Hugging Face's names of the linear layers that a module covers, without ".weight"; experts in order."""
    part, projection = PROJECTIONS[module]
    if module == UNEMBED:
        return [projection]
    kind = next(kind for kind in kinds(c) if module in kind.modules(c, 1))
    experts = range(c.experts.count) if "{expert}" in part and c.experts is not None else (0,)
    return [
        module_name(f"model.layers.{layer}.{part.format(expert=expert)}{projection}", c)
        for layer in layers_of(c, kind)
        for expert in experts
    ]


def linear_sizes(c: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer that an adapter of this configuration covers."""
    arrays, sizes = lora_arrays.flatten(lora_arrays.lora_arrays(c, spec)), {}
    for module in covered(c, spec):
        n_in, n_out = (_width(module, arrays[f"{module}.{ab}"]) for ab in "AB")
        sizes |= dict.fromkeys(linear_names(module, c), (n_in, n_out))
    return sizes


def _width(module: str, array: lora_arrays.LoraArray) -> int:
    """Return the width of one linear layer's matrix."""
    rank = 0 if module == UNEMBED else 1
    return prod(n for n, axis in zip(array.shape[rank + 1 :], array.axes[rank + 1 :], strict=True) if axis != "experts")


def to_pairs(state: AdapterState, c: ModelConfig) -> Pairs:
    """Return an adapter's matrices, as views of its arrays but for a q with gates.

    Raises:
        BadRequestError: the arrays are not those of this model: how many, and the first five with both shapes. Or
            numbers are not finite, or too large: how many, and the first.
    """
    advice = "Give the base model that it was trained on."
    lora_arrays.refuse_other_shapes("the adapter", state.weights, c, state.spec, advice)
    if (wrong := lora_arrays.out_of_range(state.weights)) is not None:
        raise BadRequestError(f"the adapter cannot be used: {wrong}. Take an earlier checkpoint of its run.")
    arrays = lora_arrays.flatten(lora_arrays.lora_arrays(c, state.spec))
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for module in covered(c, state.spec):
        names = linear_names(module, c)
        of = {ab: state.weights[f"{module}.{ab}"] for ab in "AB"}
        if module == "q" and c.output_gate:
            of["B"] = _reordered(of["B"], 2, c.group)
        a, b = (_each(of[ab], arrays[f"{module}.{ab}"], len(names), state.spec.rank) for ab in "AB")
        pairs |= dict(zip(names, zip(a, b, strict=True), strict=True))
    return pairs


def _reordered(b_LRKJH: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Return B of a q with gates in its other order: its outputs go by `outer` times `inner`, then the reverse.

    Here those of each key/value head are all queries, then all gates; in files each query has its gate behind it.
    """
    shape_LRK, H = b_LRKJH.shape[:3], b_LRKJH.shape[-1]
    return b_LRKJH.reshape(*shape_LRK, outer, inner, H).swapaxes(3, 4).reshape(b_LRKJH.shape)


def _each(values: np.ndarray, array: lora_arrays.LoraArray, count: int, rank: int) -> list[np.ndarray]:
    """Return one array's matrix (R, width) of each of `count` linear layers, with those of experts apart."""
    if "experts" in array.axes:
        return [values[layer, :, e] for layer, e in np.ndindex(values.shape[0], values.shape[2])]
    matrices = values.reshape(-1, rank, prod(values.shape) // rank // (1 if len(array.shape) == 2 else values.shape[0]))
    return [matrices[i * len(matrices) // count] for i in range(count)]


def from_pairs(pairs: Pairs, c: ModelConfig, spec: LoraSpec) -> dict[str, np.ndarray]:
    """Return an adapter's arrays, float32 by flat name, from the matrices of every linear layer that it covers.

    Raises:
        UnsupportedError: experts of a layer have matrices of their own where an adapter here has one for all of them.
    """
    arrays = {}
    for name, array in lora_arrays.flatten(lora_arrays.lora_arrays(c, spec)).items():
        module, part = name.split(".")
        names = linear_names(module, c)
        matrices = [pairs[linear]["AB".index(part)] for linear in names]
        if "experts" in array.axes:
            L, R, E, width = array.shape
            stacked = np.stack(matrices, dtype=np.float32).reshape(L, E, R, width)
            arrays[name] = np.ascontiguousarray(np.moveaxis(stacked, 1, 2))
            continue
        of_layer = len(names) // (1 if module == UNEMBED else array.shape[0])
        for i, matrix in enumerate(matrices):
            first = i - i % of_layer
            if not np.array_equal(matrix, matrices[first]):
                raise UnsupportedError(
                    f"{names[i]}: its {part} is not that of {names[first]}, and an adapter here has one {part} for all "
                    "experts of a layer. Held apart they would need the rank times the number of experts. Merge the "
                    "adapter into its base model with the program that trained it, and train on that."
                )
        arrays[name] = np.stack(matrices[::of_layer], dtype=np.float32).reshape(array.shape)
        if name == "q.B" and c.output_gate:
            arrays[name] = _reordered(arrays[name], c.group, 2)
    return arrays
