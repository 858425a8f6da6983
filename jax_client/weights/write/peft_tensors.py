"""Which tensors of an adapter file are the matrices of which linear layers? The others are refused by name.

peft saves more than A and B in some cases: biases, modules trained as a whole, copies of the base model's embedding.
Only copies that are equal to the base model's change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.values import LoraSpec
from jax_client.weights.read import safetensors
from jax_client.weights.read.tensors import EMBEDDING, HEAD, TensorInfo, TensorReader
from jax_client.weights.towers import module_name
from jax_client.weights.write.adapter_file import AdapterFile, open_adapter
from jax_client.weights.write.adapter_names import covered, linear_names, linear_sizes
from jax_client.weights.write.peft_config import CONFIG, PeftConfig, matrices_in, way_out

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
# VeLoRA's estimate of activations, which only its gradients read.
UNREAD = ".lora_velora_embed"
# What the ends of other names mean.
OTHER = (
    ("lora_magnitude_vector", "DoRA's magnitudes"),
    ("lora_embedding_", "an adapter on the embedding"),
    (".bias", "biases"),
    ("embed_tokens.", "an embedding of its own"),
    ("lm_head.weight", "an output projection of its own"),
    ("norm.weight", "norms of its own"),
    ("token_adapter", "trained tokens"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTensors:
    """The matrices of an adapter file.

    Attributes:
        path, file: the file, opened.
        ranks: by the linear layers that they adapt, such as "model.layers.0.self_attn.q_proj".
    """

    path: Path
    file: AdapterFile
    ranks: Mapping[str, int]

    @property
    def linears(self) -> Collection[str]:
        """The names of the linear layers."""
        return self.ranks.keys()

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    def module(self, linear: str) -> str:
        """Return peft's name of what a linear layer is a part of, by which its configuration gives rank and alpha."""
        return self.file.parameters.get(linear, linear)

    def matrix(self, linear: str, part: str) -> np.ndarray:
        """Return A (R, in) or B (out, R) of one linear layer, float32."""
        return self.file.read(tensor_name(linear, part)).astype(np.float32)

    def spec(self) -> LoraSpec:
        """Return the smallest configuration that covers these linear layers."""
        names = {part for linear in self.linears for part in linear.split(".")}
        return LoraSpec(
            rank=self.rank,
            seed=0,
            train_attn=not names.isdisjoint(("self_attn", "linear_attn")),
            train_mlp="mlp" in names,
            train_unembed="lm_head" in names,
        )


def copies_of(model: ModelConfig) -> dict[str, str]:
    """Return where peft saves a copy of the base model's embedding or output projection, and what it is a copy of."""
    return {
        f"{PREFIX}{module_name(name.removesuffix('.weight'), model)}{middle}.weight": name
        for name in (EMBEDDING, HEAD)
        for middle in ("", ".base_layer")
    }


def tensor_name(linear: str, part: str) -> str:
    """Return peft's name of A or B of a linear layer."""
    return f"{PREFIX}{linear}.lora_{part}.weight"


def read_tensors(path: Path, config: PeftConfig, model: ModelConfig, base: TensorReader | None) -> AdapterTensors:
    """Find the matrices of an adapter file.

    Args:
        path: a .safetensors file.
        config: of the adapter.
        model: the base model's.
        base: the base model's files, to compare copies with; None takes the copies' word.

    Raises:
        UnsupportedError: tensors that are more than A and B of linear layers, or of a dtype that is not read.
        BadRequestError: missing, extra, misshapen or not finite: how many, and the first five.
    """
    file = open_adapter(path, model, PREFIX)
    entries = {n: info for n, info in file.infos.items() if not n.endswith(UNREAD)}
    every, known_copies = LoraSpec(rank=1, seed=0), copies_of(model)
    known = {name for module in covered(model, every) for name in linear_names(module, model)}
    present = {name for name in known if any(tensor_name(name, part) in entries for part in "AB")}
    if not present:
        _refuse_more(path, config, [name for name in entries if name not in known_copies])
        example = linear_names("q", model)[0]
        raise BadRequestError(
            f"{path}: none of its {len(entries)} tensors is LoRA's on a linear layer of this model "
            f"({'; '.join(list(entries)[:5])}). Give an adapter of a causal language model of the same kind and number "
            f"of layers, with tensors such as {tensor_name(example, 'A')}."
        )
    linears = present
    if config.targets is not None:
        named = config.targets.among(known | set(file.parameters.values()))
        linears = {name for name in known if name in named or file.parameters.get(name) in named}
    if config.of_experts:
        linears |= {name for name in known if ".experts." in name}
    copies = {name: known_copies[name] for name in entries if name in known_copies}
    sizes = linear_sizes(model, every)
    expected: dict[str, tuple[int, ...]] = {}
    ranks = {linear: _rank(config, file, linear) for linear in sorted(linears)}
    for linear, rank in ranks.items():
        n_in, n_out = sizes[linear]
        expected |= {tensor_name(linear, "A"): (rank, n_in), tensor_name(linear, "B"): (n_out, rank)}
    ours = {tensor_name(linear, part) for linear in known for part in "AB"}
    _refuse_more(path, config, [name for name in entries if name not in ours and name not in copies])
    _refuse_other_copies(file, copies, model, base)
    _check(file, config, {n: e for n, e in entries.items() if n not in copies}, expected)
    return AdapterTensors(path=path, file=file, ranks=ranks)


def _rank(config: PeftConfig, file: AdapterFile, linear: str) -> int:
    """Return the rank of a linear layer's matrices; those that peft has as one share its rank out."""
    parameter = file.parameters.get(linear, linear)
    return config.rank_of(parameter) // matrices_in(parameter)


def _refuse_more(path: Path, config: PeftConfig, names: list[str]) -> None:
    """Raise UnsupportedError if a tensor is of a kind that changes the model beyond A and B."""
    for name in names:
        if meaning := next((meaning for end, meaning in OTHER if end in name), None):
            field = f" ({CONFIG}: bias is {config.bias!r})" if meaning == "biases" and config.bias != "none" else ""
            raise UnsupportedError(
                f"{path}: the tensor {name} holds {meaning}{field}, which is not supported: only LoRA on linear layers "
                f"is read. {way_out(path.parent)}"
            )


def _refuse_other_copies(
    file: AdapterFile,
    copies: Mapping[str, str],
    model: ModelConfig,
    base: TensorReader | None,
) -> None:
    """Raise UnsupportedError if the adapter brings an embedding or output projection that is not the base model's."""
    path, entries = file.path, file.infos
    for name, original in copies.items():
        stored = EMBEDDING if model.tied_embeddings else original
        shape = (model.vocab_size, model.d_model)
        if entries[name].shape != shape:
            difference = f"has the shape {entries[name].shape}, and the base model's {shape}"
        elif base is not None and base.tensors[stored].dtype not in safetensors.NUMPY_DTYPES:
            logger.warning(
                "%s: %s is not read; whether it is that of the base model cannot be seen, because the base model is "
                "quantised (%s)",
                path,
                name,
                base.tensors[stored].dtype,
            )
            continue
        elif base is not None and not _is_copy(file.read(name), base.read(stored)):
            difference = f"is not the base model's {stored}"
        else:
            logger.info("%s: %s is not read; it is the base model's own", path, name)
            continue
        raise UnsupportedError(
            f"{path}: the tensor {name} {difference}: the adapter was trained with another, which is not supported. "
            f"{way_out(path.parent)}"
        )


def _is_copy(copy: np.ndarray, original: np.ndarray, rows: int = 4096) -> bool:
    """Return whether one is the other, rounded to its dtype; compared a few rows at a time."""
    strips = (slice(first, first + rows) for first in range(0, len(copy), rows))
    return all(np.array_equal(copy[s], original[s].astype(copy.dtype)) for s in strips)


def _check(
    file: AdapterFile,
    config: PeftConfig,
    entries: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise unless the file holds exactly the adapter's matrices, finite and in a dtype that is read."""
    path = file.path
    wrong: dict[str, list[str]] = {"missing": [], "misshapen": [], "extra": [], "not finite": []}
    wrong["missing"] = [f"{n}: expected {shape}, not there" for n, shape in expected.items() if n not in entries]
    for name, entry in entries.items():
        if name not in expected:
            wrong["extra"].append(f"{name}: not expected, found {entry.shape}")
        elif expected[name] != entry.shape:
            wrong["misshapen"].append(f"{name}: expected {expected[name]}, found {entry.shape}")
        elif entry.dtype not in safetensors.NUMPY_DTYPES:
            raise UnsupportedError(
                f"{path}: tensor {name} has dtype {entry.dtype}, which is not loaded; supported are "
                f"{', '.join(safetensors.NUMPY_DTYPES)}. Save the adapter in one of them."
            )
        elif not np.isfinite(file.read(name)).all():
            wrong["not finite"].append(f"{name}: values that are not finite")
    if any(wrong.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
        first = "; ".join([text for names in wrong.values() for text in names][:5])
        raise BadRequestError(
            f"{path}: the tensors do not fit the base model and {CONFIG} (r {config.rank}, target_modules, "
            f"rank_pattern): {counts}. First: {first}. Use an adapter of this very base model, with its own {CONFIG}."
        )
