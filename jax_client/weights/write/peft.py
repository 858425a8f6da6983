"""How does an adapter become a PEFT directory, and the reverse? Its matrices are renamed and laid out as PEFT has them.

vLLM and SGLang load such directories, too. `peft_config` reads the configuration, `peft_tensors` finds the matrices.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from jax_client.errors import NotFoundError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.models.families.registry import FAMILIES
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.values import AdapterState
from jax_client.weights.read import hf
from jax_client.weights.read.tensors import TensorReader
from jax_client.weights.write import delta_layouts, expert_layouts
from jax_client.weights.write.adapter_names import Pairs, from_pairs, linear_sizes, to_pairs
from jax_client.weights.write.peft_config import CONFIG, PEFT_VERSION, PeftConfig, matrices_in, read_peft_config
from jax_client.weights.write.peft_tensors import PREFIX, AdapterTensors, read_tensors
from jax_client.weights.write.shards import Tensor, check_space, write_file

logger = logging.getLogger(__name__)
# A program that loads an exported adapter.
Program = Literal["peft", "vllm", "sglang"]
WEIGHTS, PICKLES = "adapter_model.safetensors", ("adapter_model.bin", "adapter_model.pt")
F32 = np.dtype("<f4")


def write_adapter(
    directory: Path, state: AdapterState, config: ModelConfig, base_model: str, program: Program | None = None
) -> None:
    """Write an adapter as a PEFT directory, float32.

    An adapter on an output projection that is the embedding computes the same in peft as long as it is not merged; it
    is written for peft alone, by name.

    Args:
        directory: there already, and empty.
        state: its weights; the optimizer's moments have no place in PEFT.
        config: of the base model.
        base_model: its name or path, for `PeftModel`-loading tools that fetch the base model by it.
        program: what will load it; None may be any.

    Raises:
        UnsupportedError: an adapter on the output projection of a model that ties it to its embedding, for another
            program than peft; one on experts in a form that the program does not read.
        BadRequestError: the adapter is not one of this model.
        RequestFailedError: there is not enough space on the disk.
    """
    pairs = to_pairs(state, config)
    if state.spec.train_unembed and config.tied_embeddings:
        _refuse_tied_head(program)
    if program != "sglang":
        pairs = delta_layouts.fused(config, pairs)
    # The other towers of a model have modules of the same names.
    whole_names = FAMILIES[config.family].files.tower is not None
    modules = list(dict.fromkeys(name.rpartition(".")[2] for name in pairs))
    changes: dict[str, object] = {"target_modules": list(pairs) if whole_names else modules}
    matrices = {f"{name}.lora_{ab}": m for name, (a, b) in pairs.items() for ab, m in (("A", a), ("B", b.T))}
    together = {name: n for name in modules if (n := matrices_in(name)) > 1}
    if together and program != "peft":
        _say_who_reads(together, state.spec.rank, program)
    if expert_layouts.has_experts(config, pairs):
        matrices, changed = _of_experts(config, pairs, state.spec.rank, program, matrices)
        changes |= changed
        if changed:
            together[expert_layouts.GATE_UP] = matrices_in(expert_layouts.GATE_UP)
    tensors = [Tensor(name=f"{PREFIX}{n}.weight", shape=m.shape, rows=_slicer(m)) for n, m in matrices.items()]
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
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        # Where peft has several matrices as one, alpha grows with the rank, so that the scale is that of the others.
        "rank_pattern": {name: n * state.spec.rank for name, n in together.items()},
        "alpha_pattern": {name: n * int(LORA_ALPHA) for name, n in together.items()},
    }
    (directory / CONFIG).write_text(json.dumps(adapter_config | changes, indent=2) + "\n")


def _say_who_reads(together: Mapping[str, int], rank: int, program: Program | None) -> None:
    """Log which rank vLLM must be started with for products of a gated delta rule that are one matrix."""
    for name, count in together.items():
        logger.warning(
            "the adapter covers %s. This layout is that of peft and vLLM; vLLM's --max-lora-rank must be %d at least, "
            "since %d products are one matrix there, with the ranks of each%s",
            name,
            count * rank,
            count,
            "" if program else ". SGLang reads them apart: --for sglang",
        )


def _of_experts(
    config: ModelConfig, pairs: Pairs, rank: int, program: Program | None, apart: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return the matrices of an adapter on experts as a program reads them, and what its configuration says of them.

    Args:
        apart: the matrices, with those of each expert apart.
    """
    in_one = expert_layouts.in_one_tensor(config)
    if program == "peft" or (in_one and program != "sglang"):
        _refuse_other_mlps(config)
        if in_one and program != "peft":
            logger.warning(
                "the adapter covers experts. This layout is that of peft and vLLM for this model; vLLM's "
                "--max-lora-rank must be %d at least, since gate and up are one matrix of twice the rank",
                2 * rank,
            )
        changes: dict[str, object] = {
            "target_modules": [name for name in pairs if ".experts." not in name],
            "target_parameters": expert_layouts.TARGETS,
        }
        return expert_layouts.fused(config, pairs), changes
    if program == "sglang":
        if FAMILIES[config.family].files.experts == "interleaved":
            raise UnsupportedError(
                "this model has the columns of gate and up by turns, and no version of SGLang is known that reads an "
                "adapter of such experts. Export the merged model (--format merged), or the adapter --for vllm."
            )
        return expert_layouts.shared(config, pairs), {}
    if program is None:
        logger.warning(
            "the adapter covers experts, which programs read in layouts of their own: this one is for vLLM. For "
            "others name the program: --for peft, --for sglang"
        )
    return apart, {}


def _refuse_other_mlps(config: ModelConfig) -> None:
    """Raise UnsupportedError for a model with other MLPs beside experts, where peft leaves adapters out of them."""
    if config.experts is not None and config.experts.dense_layers:
        raise UnsupportedError(
            f"the layers {', '.join(map(str, config.experts.dense_layers[:5]))} of this model have one MLP and the "
            "others have experts: peft reads gate_proj, up_proj and down_proj as the experts' and leaves them out of "
            "the former, without a word. Export the merged model (--format merged), or the adapter --for vllm."
        )
    if config.experts is not None and config.experts.shared_d_ff and not expert_layouts.in_one_tensor(config):
        raise UnsupportedError(
            "the layers of this model have an expert that all tokens share beside the others: peft reads gate_proj, "
            "up_proj and down_proj as the others' and leaves them out of the shared one, without a word. Export the "
            "merged model (--format merged), or the adapter --for vllm."
        )


def _refuse_tied_head(program: Program | None) -> None:
    """Raise UnsupportedError unless the program computes an adapter on an output projection that is the embedding."""
    if program == "peft":
        logger.warning(
            "the adapter covers the output projection, which is the model's embedding: peft computes it exactly, with "
            "a warning, but its merge_and_unload changes the embedding too. For a merged model export --format merged"
        )
        return
    servers = {"vllm": "vLLM", "sglang": "SGLang"}
    who = servers[program] if program else "vLLM and SGLang"
    for_peft = "" if program else " For peft alone, which computes it exactly: --for peft."
    raise UnsupportedError(
        "train_unembed is True, and this model's output projection is its embedding: versions of "
        f"{who} refuse an adapter on it or leave it out without a word. Export the merged model (--format merged), "
        f"which gets an output projection of its own.{for_peft} Or train with train_unembed=False."
    )


def read_adapter(directory: Path, config: ModelConfig, base: TensorReader | None = None) -> AdapterState:
    """Read a PEFT adapter to start training from: step 0, without moments.

    It computes what it computes in peft. The engine's alpha, its one rank and its groups of modules are honoured by
    scaling B, and by zeros: a linear layer without matrices, and the ranks that a smaller one lacks, get zeros in A and
    B, which add nothing and have no gradient.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        config: of the base model.
        base: its files, to compare with copies of its embedding that the adapter may bring; None trusts them.

    Raises:
        NotFoundError: a file is missing.
        UnsupportedError: anything but LoRA on linear layers, by the name of the field; pickled weights.
        BadRequestError: damaged files; tensors that are missing, extra, misshapen or not finite: how many, and the
            first five.
    """
    found = read_peft_config(directory)
    tensors = read_tensors(_weights_file(directory), found, config, base)
    spec = tensors.spec()
    factors = {name: found.alpha_over(tensors.module(name), spec.rank) / LORA_ALPHA for name in tensors.linears}
    pairs = {}
    for name, (n_in, n_out) in linear_sizes(config, spec).items():
        a_RI, b_RO = np.zeros((spec.rank, n_in), np.float32), np.zeros((spec.rank, n_out), np.float32)
        if name in factors:
            a_rI, b_Or = tensors.matrix(name, "A"), tensors.matrix(name, "B")
            a_RI[: len(a_rI)], b_RO[: len(a_rI)] = a_rI, (b_Or * np.float32(factors[name])).T
        pairs[name] = a_RI, b_RO
    _say_what_differs(tensors, found, factors, list(pairs))
    return AdapterState(spec=spec, step=0, weights=from_pairs(pairs, config, spec))


def _weights_file(directory: Path) -> Path:
    if (directory / WEIGHTS).exists():
        return hf.inside(directory, WEIGHTS)
    for name in PICKLES:
        if (directory / name).exists():
            raise UnsupportedError(
                f"{directory / name}: pickled weights are not loaded, because reading them runs code from the file. "
                'Convert them; this reads tensors only: python -c "import torch, safetensors.torch as s; t = '
                f"torch.load({str(directory / name)!r}, map_location='cpu', weights_only=True); s.save_file({{k: "
                f'v.clone().contiguous() for k, v in t.items()}}, {str(directory / WEIGHTS)!r})"'
            )
    raise NotFoundError(f"{directory}: looked for {WEIGHTS} beside {CONFIG}; give the directory that holds both.")


def _say_what_differs(
    tensors: AdapterTensors, found: PeftConfig, factors: Mapping[str, float], linears: list[str]
) -> None:
    path = tensors.path
    if different := {factor for factor in factors.values() if factor != 1.0}:
        logger.warning(
            "%s: its scale is not alpha %g over the rank; B was multiplied by %s, so that the adapter computes the "
            "same. An optimizer step moves this B like any other, so its effect is one over that factor of what it was",
            path,
            LORA_ALPHA,
            _few([f"{factor:.6g}" for factor in sorted(different)]),
        )
    if ranks := {tensors.ranks[name] for name in factors} - {tensors.rank}:
        logger.warning(
            "%s: its ranks are %s; all have %d here, filled up with zeros, which add nothing and stay zero in training",
            path,
            _few([str(rank) for rank in sorted(ranks | {tensors.rank})]),
            tensors.rank,
        )
    if absent := Counter(name.rsplit(".", 1)[-1] for name in linears if name not in factors):
        logger.warning(
            "%s: it has no matrices for %s. They are zeros here, which add nothing and stay zero in training",
            path,
            ", ".join(f"{projection} ({count} layers)" for projection, count in absent.items()),
        )
    if found.dropout:
        logger.warning("%s: lora_dropout %g is not applied; there is no dropout in training here", path, found.dropout)
    if found.initial_weights == "mica":
        logger.warning("%s: MiCA trained A alone and kept B as it was; training here moves both", path)
    if found.unknown:
        logger.warning(
            "%s: peft %d.%d does not know the fields %s; they are not read",
            found.path,
            *PEFT_VERSION,
            _few([repr(key)[:80] for key in found.unknown]),
        )


def _few(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def _slicer(matrix: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda first, end: matrix[first:end]
