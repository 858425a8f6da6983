"""How does an adapter become a PEFT directory, and the reverse? Its matrices are renamed and laid out as PEFT has them.

vLLM and SGLang load such directories, too. `peft_config` reads the configuration, this module the tensors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.read import hf, safetensors
from jax_client.weights.write.adapter_names import (
    ATTENTION,
    MLP,
    PROJECTIONS,
    UNEMBED,
    covered,
    from_pairs,
    linear_sizes,
    to_pairs,
)
from jax_client.weights.write.peft_config import CONFIG, PeftConfig, read_peft_config
from jax_client.weights.write.shards import Tensor, check_space, write_file

logger = logging.getLogger(__name__)
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
F32 = np.dtype("<f4")
# What peft saves beside an adapter on the output projection: a copy of the base model's.
HEAD_COPY = f"{PREFIX}lm_head.base_layer.weight"


def write_adapter(directory: Path, state: AdapterState, config: ModelConfig, base_model: str) -> None:
    """Write an adapter as a PEFT directory, float32.

    Args:
        directory: there already, and empty.
        state: its weights; the optimizer's moments have no place in PEFT.
        config: of the base model.
        base_model: its name or path, for `PeftModel`-loading tools that fetch the base model by it.

    Raises:
        UnsupportedError: an adapter on the output projection of a model that ties it to its embedding.
        BadRequestError: the adapter is not one of this model.
        RequestFailedError: there is not enough space on the disk.
    """
    pairs = to_pairs(state, config)
    if state.spec.train_unembed and config.tied_embeddings:
        raise UnsupportedError(
            "train_unembed is True, but this model's output projection is its embedding: PEFT warns of such an adapter "
            "and merges it into the embedding too. Export the merged model (--format merged), which gets an output "
            "projection of its own; or train with train_unembed=False."
        )
    matrices = {
        f"{PREFIX}{name}.lora_{part}.weight": matrix
        for name, (a_RI, b_RO) in pairs.items()
        for part, matrix in (("A", a_RI), ("B", b_RO.T))
    }
    tensors = [Tensor(name=name, shape=m.shape, rows=_slicer(m)) for name, m in matrices.items()]
    check_space(directory, sum(tensor.nbytes(F32) for tensor in tensors))
    write_file(directory / WEIGHTS, tensors, F32)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": state.spec.rank,
        "lora_alpha": int(LORA_ALPHA),
        "lora_dropout": 0.0,
        "target_modules": [PROJECTIONS[module] for module in covered(state.spec)],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (directory / CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n")


def read_adapter(directory: Path, config: ModelConfig) -> AdapterState:
    """Read a PEFT adapter to start training from: step 0, without moments.

    The engine's alpha is fixed; another one is honoured by scaling B, so that the adapter computes the same.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        config: of the base model.

    Raises:
        NotFoundError: a file is missing.
        UnsupportedError: anything but plain LoRA on whole groups of modules, by the name of the field; pickled weights.
        BadRequestError: damaged files; tensors that are missing, extra, misshapen or not finite: how many, and the
            first five.
    """
    found = read_peft_config(directory)
    path = _weights_file(directory)
    entries = safetensors.read_header(path)
    spec = _spec(path, entries, found)
    _check(path, entries, config, spec)
    factors = {name: found.plain_alpha(name) / LORA_ALPHA for name in linear_sizes(config, spec)}
    pairs = {}
    for name, factor in factors.items():
        a_RI, b_OR = (
            safetensors.view(path, entries[f"{PREFIX}{name}.lora_{part}.weight"]).astype(np.float32) for part in "AB"
        )
        pairs[name] = a_RI, (b_OR * np.float32(factor)).T
    _say_what_differs(path, entries, found, factors)
    return AdapterState(spec=spec, step=0, weights=from_pairs(pairs, config, spec))


def _weights_file(directory: Path) -> Path:
    if (directory / WEIGHTS).exists():
        return hf.inside(directory, WEIGHTS)
    if (directory / PICKLE).exists():
        raise UnsupportedError(
            f"{directory / PICKLE}: pickled weights are not loaded, because reading them runs code from the file. "
            "Convert them where you trust the source: load the adapter with peft and call save_pretrained."
        )
    raise NotFoundError(f"{directory}: looked for {WEIGHTS} beside {CONFIG}; give the directory that holds both.")


def _spec(path: Path, entries: dict[str, safetensors.Entry], found: PeftConfig) -> LoraSpec:
    """Return the configuration that the tensors amount to; `target_modules` may be a pattern of any form."""
    names = {
        name.removeprefix(PREFIX).rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in entries if ".lora_" in name
    }
    present = {module for module, projection in PROJECTIONS.items() if projection in names}
    for setting, group in (("train_attn", ATTENTION), ("train_mlp", MLP)):
        if present & group.keys() and not group.keys() <= present:
            have = ", ".join(PROJECTIONS[m] for m in group if m in present)
            raise UnsupportedError(
                f"{path}: the adapter covers {have} only; {setting} covers {', '.join(group.values())} together. Train "
                "the adapter on all of them, or merge it into the base model (peft's merge_and_unload) and start from "
                "that."
            )
    if not present:
        first = "; ".join(list(entries)[:5])
        raise BadRequestError(
            f"{path}: none of its {len(entries)} tensors is LoRA's on a linear layer of this model ({first}). Give an "
            f"adapter of a causal language model, with tensors such as {PREFIX}lm_head.lora_A.weight."
        )
    listed = found.listed_projections()
    if listed is not None and (listed ^ {PROJECTIONS[m] for m in present}) & set(PROJECTIONS.values()):
        raise BadRequestError(
            f"{path}: it holds tensors of {', '.join(PROJECTIONS[m] for m in PROJECTIONS if m in present)}, but "
            f"target_modules of {CONFIG} lists {', '.join(sorted(listed))}. Use both files of one adapter."
        )
    return LoraSpec(
        rank=found.rank,
        seed=0,
        train_attn="q" in present,
        train_mlp="gate" in present,
        train_unembed=UNEMBED in present,
    )


def _check(path: Path, entries: dict[str, safetensors.Entry], c: ModelConfig, spec: LoraSpec) -> None:
    """Raise unless the file holds exactly the adapter's matrices, finite and in a dtype that is read."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, (n_in, n_out) in linear_sizes(c, spec).items():
        expected[f"{PREFIX}{name}.lora_A.weight"] = (spec.rank, n_in)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (n_out, spec.rank)
    known = expected | ({HEAD_COPY: (c.vocab_size, c.d_model)} if spec.train_unembed else {})
    wrong: dict[str, list[str]] = {"missing": [], "misshapen": [], "extra": [], "not finite": []}
    wrong["missing"] = [f"{n}: expected {shape}, not there" for n, shape in expected.items() if n not in entries]
    for name, entry in entries.items():
        if name not in known:
            wrong["extra"].append(f"{name}: not expected, found {entry.shape}")
        elif known[name] != entry.shape:
            wrong["misshapen"].append(f"{name}: expected {known[name]}, found {entry.shape}")
        elif entry.dtype not in safetensors.NUMPY_DTYPES:
            raise UnsupportedError(
                f"{path}: tensor {name} has dtype {entry.dtype}, which is not loaded; supported are "
                f"{', '.join(safetensors.NUMPY_DTYPES)}. Save the adapter in one of them."
            )
        elif name in expected and not np.isfinite(safetensors.view(path, entry)).all():
            wrong["not finite"].append(f"{name}: values that are not finite")
    if any(wrong.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
        first = "; ".join([text for names in wrong.values() for text in names][:5])
        raise BadRequestError(
            f"{path}: the tensors do not fit the base model and r {spec.rank}: {counts}. First: {first}. Use an "
            "adapter of this very base model, with its own adapter_config.json."
        )


def _say_what_differs(
    path: Path, entries: dict[str, safetensors.Entry], found: PeftConfig, factors: dict[str, float]
) -> None:
    if different := {factor for factor in factors.values() if factor != 1.0}:
        logger.warning(
            "%s: its scale is not alpha %g over the rank; B was multiplied by %s, so that the adapter computes the "
            "same. An optimizer step moves this B like any other, so its effect is one over that factor of what it was",
            path,
            LORA_ALPHA,
            ", ".join(f"{factor:.6g}" for factor in sorted(different)),
        )
    if found.dropout:
        logger.warning("%s: lora_dropout %g is not applied; there is no dropout in training here", path, found.dropout)
    if HEAD_COPY in entries:
        logger.info("%s: %s is not read; the base model's own output projection is used", path, HEAD_COPY)


def _slicer(matrix: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda first, end: matrix[first:end]
