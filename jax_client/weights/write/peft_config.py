"""What does an adapter_config.json ask for? LoRA on linear layers; a field that changes more than that is refused.

Fields that PEFT 0.21 does not know are reported, and are refused where a later version wrote them or a fork's variant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.values import MAX_LORA_RANK
from jax_client.weights.read import hf
from jax_client.weights.write.peft_patterns import HEAD, NamePatterns, Targets

CONFIG = "adapter_config.json"
# The newest version whose fields are all listed below.
PEFT_VERSION = (0, 21)
# Fields that are read here, that the tensors tell better, or that say how the adapter was made and not what it is.
# fan_in_fan_out is about layers that no supported model has; peft sets it back for linear ones. VeLoRA changes the
# gradients alone.
READ = {
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "runtime_config",
}  # fmt: skip
# Fields of PEFT 0.21 that make the adapter something that A and B alone are not, and whether peft can merge it into a
# model that it can save.
REFUSED = {
    "use_dora": True,
    "modules_to_save": True,
    "trainable_token_indices": True,
    "target_parameters": True,
    "use_bdlora": True,
    "kasa_config": True,
    "ensure_weight_tying": True,
    "megatron_config": True,
    "monteclora_config": True,
    "layer_replication": False,
    "lora_bias": False,
    "use_qalora": False,
    "alora_invocation_tokens": False,
    "arrow_config": False,
}
NOTHING = (None, False, "none", {}, [], "")
# The other initialisations leave the base model with other weights than it came with, and the adapter relies on them.
INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Of those, peft computes these anew from the base model when it loads the adapter; the others need their data.
REPEATABLE = ("pissa", "olora")
# How many matrices with ranks of their own a linear layer or parameter of peft's holds, by the end of its name.
MATRICES = {"gate_up_proj": 2, "in_proj_qkv": 3, "in_proj_qkvz": 4}
NO_MERGE = "peft cannot merge it into a model either: train a LoRA adapter without it."
# Kinds of adapters that peft cannot merge into weights.
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """What an adapter_config.json says about LoRA.

    Attributes:
        path: the file.
        rank, alpha: r and lora_alpha, of the modules that no pattern matches.
        ranks, alphas: rank_pattern and alpha_pattern.
        rank_stabilised: the scale is alpha over the root of the rank.
        dropout: of its training.
        targets: which linear layers it covers; None where only the tensors tell.
        of_experts: it covers the parameters that hold the experts of a layer ("target_parameters").
        bias: which biases it trained: "none", "all" or "lora_only".
        initial_weights: init_lora_weights.
        unknown: fields that are in no version of peft up to 0.21.
    """

    path: Path
    rank: int
    alpha: float
    ranks: NamePatterns
    alphas: NamePatterns
    rank_stabilised: bool
    dropout: float
    targets: Targets | None
    of_experts: bool
    bias: str
    initial_weights: object
    unknown: tuple[str, ...]

    def rank_of(self, linear: str) -> int:
        """Return the rank of a linear layer's matrices."""
        return int(self.ranks.value(linear, self.rank))

    def alpha_over(self, linear: str, rank: int) -> float:
        """Return the alpha that, over `rank`, is the scale of a linear layer."""
        own = self.rank_of(linear)
        return self.alphas.value(linear, self.alpha) * rank / (math.sqrt(own) if self.rank_stabilised else own)


def matrices_in(name: str) -> int:
    """Return how many matrices with ranks of their own peft's linear layer or parameter of a name holds."""
    return next((count for end, count in MATRICES.items() if name.endswith(end)), 1)


def read_peft_config(directory: Path) -> PeftConfig:
    """Read an adapter's configuration.

    Raises:
        NotFoundError: there is none; names folders below that have one.
        UnsupportedError: a field asks for more than LoRA on linear layers; names it, and the way out.
        BadRequestError: damaged, or a value that no adapter can have.
    """
    if not (directory / CONFIG).is_file():
        below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
        folders = f" Adapters are in its folders {', '.join(below[:5])}." if below else ""
        raise NotFoundError(f"{directory}: looked for {CONFIG}; give the directory of a PEFT adapter.{folders}")
    raw, path = hf.read_json(directory, CONFIG), directory / CONFIG
    unknown = _refuse(raw, path)
    dropout = raw.get("lora_dropout") or 0.0
    return PeftConfig(
        path=path,
        rank=_rank(path, "r", raw.get("r", 8)),
        alpha=_positive(path, "lora_alpha", raw.get("lora_alpha", 8)),
        ranks=_patterns(raw, path, "rank_pattern", _rank),
        alphas=_patterns(raw, path, "alpha_pattern", _positive),
        rank_stabilised=bool(raw.get("use_rslora")),
        dropout=_positive(path, "lora_dropout", dropout) if dropout else 0.0,
        targets=_targets(raw, path),
        of_experts=bool(raw.get("target_parameters")),
        bias=str(raw.get("bias") or "none"),
        initial_weights=raw.get("init_lora_weights"),
        unknown=unknown,
    )


def way_out(directory: Path, raw: Mapping[str, object] | None = None) -> str:
    """Return the way out for an adapter that peft can merge: the command, and what to give as base model."""
    targets = (raw or {}).get("target_modules")
    merged = f"{directory}-merged"
    caution = ""
    if isinstance(targets, list) and HEAD in targets:
        caution = (
            " If the model's output projection is its embedding, peft changes both: give it one of its own before."
        )
    return (
        'Merge it into its base model, where peft is installed and the base model is at hand: python -c "from peft '
        f"import AutoPeftModelForCausalLM as M; M.from_pretrained({str(directory)!r}).merge_and_unload()"
        f".save_pretrained({merged!r})\". Copy the base model's tokenizer into {merged}, and give that as "
        f"base_model.{caution}"
    )


def _refuse(raw: Mapping[str, object], path: Path) -> tuple[str, ...]:
    """Refuse what A and B alone do not compute; return the fields that are not known and need not be."""
    kind, task = raw.get("peft_type"), raw.get("task_type")
    if kind != "LORA":
        advice = "Train a LoRA adapter." if kind in PROMPTS else way_out(path.parent, raw)
        raise UnsupportedError(f"{path}: peft_type is {kind!r:.80}, and only 'LORA' is read. {advice}")
    if task not in ("CAUSAL_LM", None):
        raise UnsupportedError(
            f"{path}: task_type is {task!r:.80}, and only adapters of causal language models ('CAUSAL_LM') are read. "
            "Give one of those."
        )
    if raw.get("init_lora_weights") not in INITIAL_WEIGHTS:
        other = f" Or: {way_out(path.parent, raw)}" if str(raw["init_lora_weights"]).startswith(REPEATABLE) else ""
        raise UnsupportedError(
            f"{path}: init_lora_weights is {raw['init_lora_weights']!r:.80}, which is not supported: it changed the "
            "base model, too. Save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion="
            f"FOLDER OF THE INITIAL ADAPTER), which makes plain LoRA of it.{other}"
        )
    present = [key for key, value in raw.items() if value not in NOTHING]
    if _are_experts(raw.get("target_parameters")):
        present.remove("target_parameters")
    if refused := [key for key in present if key in REFUSED]:
        key = refused[0]
        others = f" (and {', '.join(refused[1:])})" if len(refused) > 1 else ""
        advice = way_out(path.parent, raw) if all(REFUSED[k] for k in refused) else NO_MERGE
        raise UnsupportedError(
            f"{path}: {key} is {raw[key]!r:.80}{others}, which is not supported: only LoRA on linear layers is read. "
            f"{advice}"
        )
    unknown = [key for key in present if key not in READ]
    _refuse_unknown(raw, path, unknown)
    return tuple(unknown)


def _refuse_unknown(raw: Mapping[str, object], path: Path, unknown: list[str]) -> None:
    """Refuse unknown fields that may change what the adapter computes.

    peft names its variants "use_...", and so do its forks; a version after 0.21 may have fields of any name.
    """
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("peft_version") or ""))
    is_later = version is not None and tuple(map(int, version.groups())) > PEFT_VERSION
    for key in unknown:
        if is_later or key.startswith("use_"):
            known = ".".join(map(str, PEFT_VERSION))
            by = f"peft {raw['peft_version']!s:.40} wrote it" if is_later else "it may name a variant of LoRA"
            raise UnsupportedError(
                f"{path}: {key} is {raw[key]!r:.80}, a field that peft {known} does not know, and {by}. If it changes "
                f"nothing about what the adapter computes, remove it from the file. Otherwise: "
                f"{way_out(path.parent, raw)}"
            )


def _targets(raw: Mapping[str, object], path: Path) -> Targets | None:
    lists: dict[str, list[str] | str] = {}
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = raw.get(field)
        if not (value is None or isinstance(value, str) or _is_names(value)):
            raise BadRequestError(f"{path}: {field} is {value!r:.80}; expected a list of names, or a pattern.")
        lists[field] = value if value is not None else []
    layers = raw.get("layers_to_transform")
    numbers = [layers] if type(layers) is int else layers
    if not (numbers is None or (isinstance(numbers, list) and all(type(number) is int for number in numbers))):
        raise BadRequestError(f"{path}: layers_to_transform is {layers!r:.80}; expected a list of layers' numbers.")
    if raw.get("target_modules") is None:
        return None  # peft takes the usual ones of the model's kind
    patterns = lists["layers_pattern"]
    names = [patterns] if isinstance(patterns, str) and patterns else list(patterns)
    try:
        return Targets(str(path), lists["target_modules"], lists["exclude_modules"], numbers or None, names)
    except UnsupportedError:
        return None  # a pattern that may take too long; the tensors tell, too


def _patterns(
    raw: Mapping[str, object], path: Path, field: str, check: Callable[[Path, str, object], float]
) -> NamePatterns:
    pattern = raw.get(field) or {}
    if not isinstance(pattern, dict):
        raise BadRequestError(f"{path}: {field} is {pattern!r:.80}; expected an object of names and numbers.")
    values = {key: check(path, f"{field}[{key!r}]", value) for key, value in pattern.items()}
    return NamePatterns(f"{path}: {field}", values)


def _rank(path: Path, field: str, value: object) -> int:
    most = MAX_LORA_RANK * matrices_in(field.removesuffix("']"))
    if type(value) is not int or not 1 <= value <= most:
        raise BadRequestError(f"{path}: {field} is {value!r:.80}; expected an integer in 1..{most}.")
    return value


def _positive(path: Path, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadRequestError(f"{path}: {field} is {value!r:.80}; expected a number above 0.")
    return float(value)


def _are_experts(parameters: object) -> bool:
    """Return whether target_parameters are those that hold the experts of every layer, both of them."""
    ends = [name.rsplit(".experts.")[-1] for name in parameters] if _is_names(parameters) else []
    return sorted(ends) == ["down_proj", "gate_up_proj"]


def _is_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
