"""Which matrices are in an adapter file? Those of experts and of a gated delta rule look apart, whatever their layout.

The layouts are those of `expert_layouts` and `delta_layouts`. Most matrices are views of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import Experts, GatedDelta, ModelConfig
from jax_client.weights.read import safetensors
from jax_client.weights.read.tensors import TensorInfo
from jax_client.weights.towers import module_name
from jax_client.weights.write import delta_layouts, expert_layouts
from jax_client.weights.write.peft_config import way_out

FUSED = re.compile(r"(.*\.experts)\.(base_layer\.)?lora_([AB])\.weight")
SHARED = re.compile(r"(.*\.experts)\.(w[123])\.lora_([AB])\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """The tensors of an adapter file.

    Attributes:
        path: the file.
        infos: the tensors by name, with experts and products of a gated delta rule apart.
        parameters: by the linear layer of an expert, such as "model.layers.0.mlp.experts.3.up_proj", peft's name of the
            parameter that it is a part of, where it came from a matrix of peft's for all experts; by that of a product,
            its name of the linear layer of all products, unless the file has them apart.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    parameters: Mapping[str, str]
    _views: Mapping[str, Callable[[], np.ndarray]]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a view of the file, in the file's dtype."""
        return self._views[name]()


def open_adapter(path: Path, c: ModelConfig, prefix: str) -> AdapterFile:
    """Read the header of an adapter file, and take the matrices that all experts of a layer have in one tensor apart.

    Args:
        path: a .safetensors file.
        c: the base model's.
        prefix: before every name.

    Raises:
        BadRequestError: a damaged file; matrices of experts that are missing or misshapen, by name.
        UnsupportedError: gate and up, or products of a gated delta rule, that share ranks, which no adapter here can.
    """
    entries = safetensors.read_header(path)
    infos = {n: TensorInfo(shape=e.shape, dtype=e.dtype, file=str(path)) for n, e in entries.items()}
    views: dict[str, Callable[[], np.ndarray]] = {
        name: (lambda entry=entry: safetensors.view(path, entry)) for name, entry in entries.items()
    }
    parameters: dict[str, str] = {}
    # f(matrix) -> its parts, by the tensors that are taken apart.
    takes: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {}
    if c.experts is not None:
        takes |= _experts_in(entries, c, c.experts, path, prefix, parameters)
    if c.delta is not None:
        takes |= _products_in(entries, c, c.delta, path, prefix, parameters)
    for name, take in takes.items():
        if infos[name].dtype not in safetensors.NUMPY_DTYPES:
            continue  # refused by this name, with the others
        for part, matrix in take(views[name]()).items():
            infos[part] = TensorInfo(shape=matrix.shape, dtype=infos[name].dtype, file=str(path))
            views[part] = lambda matrix=matrix: matrix
        del infos[name], views[name]
    return AdapterFile(path=path, infos=infos, parameters=parameters, _views=views)


def _experts_in(
    names: Collection[str],
    c: ModelConfig,
    experts: Experts,
    path: Path,
    prefix: str,
    parameters: dict[str, str],
) -> dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Return how to take the tensors apart that all experts of a layer have; add peft's names to `parameters`."""
    stacked = [match for name in names if (match := FUSED.fullmatch(name) or SHARED.fullmatch(name))]
    for module in dict.fromkeys(match[1] for match in stacked if match.re is FUSED):
        plain = module.removeprefix(prefix)
        for parameter, projections in expert_layouts.PARAMETERS.items():
            linears = (f"{plain}.{e}.{p}" for e in range(experts.count) for p in projections)
            parameters |= dict.fromkeys(linears, f"{plain}.{parameter}")
    return {
        match[0]: partial(_fused if match.re is FUSED else _shared, match, c=c, experts=experts, path=path)
        for match in stacked
    }


def _products_in(
    names: Collection[str], c: ModelConfig, delta: GatedDelta, path: Path, prefix: str, parameters: dict[str, str]
) -> dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Return how to take the tensors apart that all products of a rule have; add peft's names to `parameters`."""
    found, outputs = {}, delta_layouts.product_outputs(c, delta)
    for layer in delta.layers:
        plain = module_name(f"model.layers.{layer}.linear_attn", c)
        if any(f"{prefix}{plain}.{name}.lora_{ab}.weight" in names for name in outputs for ab in "AB"):
            continue
        linear = f"{plain}.{delta_layouts.fused_name(c)}"
        parameters |= {f"{plain}.{name}": linear for name in outputs}
        for letter in "AB":
            if (name := f"{prefix}{linear}.lora_{letter}.weight") in names:
                found[name] = partial(_products, name, letter, c=c, delta=delta, path=path)
    return found


def _products(
    name: str, letter: str, whole: np.ndarray, c: ModelConfig, delta: GatedDelta, path: Path
) -> dict[str, np.ndarray]:
    """Return each product's matrix of one of all, A (n R, in) or B (out, n R)."""
    outputs = delta_layouts.product_outputs(c, delta)
    width = sum(map(len, outputs.values()))
    if whole.ndim != 2 or (letter == "B" and len(whole) != width):
        expected = f"a matrix with {width} rows" if letter == "B" else "a matrix"
        raise BadRequestError(
            f"{path}: tensor {name} is {whole.shape}; expected {expected}. Use an adapter of this very base model."
        )
    matrices = delta_layouts.apart(c, delta, letter, whole)
    if matrices is None:
        raise UnsupportedError(
            f"{path}: tensor {name}: {', '.join(outputs)} share ranks, as peft trains them, and here each has its own. "
            f"{way_out(path.parent)}"
        )
    stem = name.removesuffix(f"{delta_layouts.fused_name(c)}.lora_{letter}.weight")
    return {f"{stem}{product}.lora_{letter}.weight": matrix for product, matrix in matrices.items()}


def _fused(
    match: re.Match[str], whole: np.ndarray, c: ModelConfig, experts: Experts, path: Path
) -> dict[str, np.ndarray]:
    """Return each expert's matrices of one of peft's, A (E r, in) or B (out, r E)."""
    module, of_gate_up, letter = match.groups()
    E, (axis, lines) = experts.count, (0, "rows") if letter == "A" else (1, "columns")
    blocks = 2 if of_gate_up else 1
    if whole.ndim != 2 or whole.shape[axis] % (E * blocks) or (blocks == 2 and axis == 1 and len(whole) % 2):
        raise BadRequestError(
            f"{path}: tensor {match[0]} is {whole.shape}; expected a matrix with {lines} for {E} experts"
            f"{', for gate and up of each' if of_gate_up else ''}. Use an adapter of this very base model."
        )
    by_expert = whole.reshape(E, -1, whole.shape[1]) if letter == "A" else whole.reshape(len(whole), -1, E)
    matrices = by_expert if letter == "A" else np.moveaxis(by_expert, -1, 0)
    if not of_gate_up:
        return {f"{module}.{e}.down_proj.lora_{letter}.weight": matrices[e] for e in range(E)}
    found: dict[str, np.ndarray] = {}
    rank = matrices.shape[1 if letter == "A" else 2] // 2
    ranks = {"gate_proj": slice(0, rank), "up_proj": slice(rank, None)}
    rows = expert_layouts.gate_up_rows(c)
    for which, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if letter == "B" and matrices[:, rows[which], ranks[other]].any():
            raise UnsupportedError(
                f"{path}: tensor {match[0]}: gate and up of an expert share ranks, as peft trains them, and here each "
                f"has its own. {way_out(path.parent)}"
            )
        part = matrices[:, ranks[which]] if letter == "A" else matrices[:, rows[which], ranks[which]]
        found |= {f"{module}.{e}.{which}.lora_{letter}.weight": part[e] for e in range(E)}
    return found


def _shared(
    match: re.Match[str], whole: np.ndarray, c: ModelConfig, experts: Experts, path: Path
) -> dict[str, np.ndarray]:
    """Return each expert's matrices of an array (E, ...), or (1, ...) where all share it."""
    module, short, letter = match.groups()
    projection = next(name for name, found in expert_layouts.SHARED.items() if found == short)
    if whole.ndim != 3 or len(whole) not in (1, experts.count):
        raise BadRequestError(
            f"{path}: tensor {match[0]} is {whole.shape}; expected 1 or {experts.count} matrices, one for each expert. "
            "Use an adapter of this very base model."
        )
    return {
        f"{module}.{e}.{projection}.lora_{letter}.weight": whole[min(e, len(whole) - 1)] for e in range(experts.count)
    }
