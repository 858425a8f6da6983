"""What does an adapter_config.json ask for? Plain LoRA; any other field that changes the adapter's result is refused.

Refused are unknown fields, too: a later version of PEFT may add one. The error names the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.values import MAX_LORA_RANK
from jax_client.weights.read import hf

CONFIG = "adapter_config.json"
# Fields that are read here, that the tensors tell better, or that say how the adapter was made and not what it is.
HARMLESS = {
    "peft_type", "task_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules",
    "init_lora_weights", "exclude_modules", "layers_pattern", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
NOTHING = (None, False, "none", {}, [])
# The other initialisations leave the base model with other weights than it came with, and the adapter relies on them.
INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
# A module's name, or the end of one, as alpha_pattern's keys have it; "^" as peft writes it.
PLAIN_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """What an adapter_config.json says about plain LoRA.

    Attributes:
        rank: r.
        alpha, alpha_pattern: lora_alpha, and that of the modules whose names end in a key.
        rank_stabilised: the scale is alpha over the root of the rank.
        dropout: of its training.
        targets: target_modules, a list of names or a pattern.
    """

    rank: int
    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dropout: float
    targets: list[str] | str | None

    def plain_alpha(self, linear: str) -> float:
        """Return the alpha that, over the rank, is the scale of a linear layer; the first key that fits holds."""
        fitting = (alpha for key, alpha in self.alpha_pattern.items() if _ends_in(linear, key))
        return next(fitting, self.alpha) * (math.sqrt(self.rank) if self.rank_stabilised else 1.0)

    def listed_projections(self) -> set[str] | None:
        """Return the last parts of the names in target_modules, such as "q_proj"; None for a pattern."""
        if not isinstance(self.targets, list):
            return None
        return {target.rsplit(".", 1)[-1] for target in self.targets}


def read_peft_config(directory: Path) -> PeftConfig:
    """Read an adapter's configuration.

    Raises:
        NotFoundError: there is none.
        UnsupportedError: a field asks for more than plain LoRA; names it.
        BadRequestError: damaged, or a value that no adapter can have.
    """
    if not (directory / CONFIG).is_file():
        raise NotFoundError(f"{directory}: looked for {CONFIG}; give the directory of a PEFT adapter.")
    raw, path = hf.read_json(directory, CONFIG), directory / CONFIG
    _refuse(raw, path)
    pattern = raw.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(PLAIN_NAME.fullmatch(key) for key in pattern):
        raise UnsupportedError(
            f"{path}: alpha_pattern is {pattern!r:.80}; read are modules by name, or by the end of their name, and no "
            "regular expressions. Write the names out."
        )
    targets = raw.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _is_names(targets)):
        raise BadRequestError(f"{path}: target_modules is {targets!r:.80}; expected a list of names, or a pattern.")
    rank = raw.get("r")
    if type(rank) is not int or not 1 <= rank <= MAX_LORA_RANK:
        raise BadRequestError(f"{path}: r is {rank!r}; expected an integer in 1..{MAX_LORA_RANK}.")
    dropout = raw.get("lora_dropout") or 0.0
    return PeftConfig(
        rank=rank,
        alpha=_positive(path, "lora_alpha", raw.get("lora_alpha", 8)),
        alpha_pattern={key: _positive(path, f"alpha_pattern[{key!r}]", value) for key, value in pattern.items()},
        rank_stabilised=bool(raw.get("use_rslora")),
        dropout=_positive(path, "lora_dropout", dropout) if dropout else 0.0,
        targets=targets,
    )


def _refuse(raw: Mapping[str, object], path: Path) -> None:
    wanted = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "init_lora_weights": INITIAL_WEIGHTS}
    refused = {key: raw.get(key) for key, allowed in wanted.items() if raw.get(key) not in allowed}
    refused |= {key: value for key, value in raw.items() if key not in HARMLESS and value not in NOTHING}
    if refused:
        key, value = next(iter(refused.items()))
        others = f" (and {', '.join(list(refused)[1:])})" if len(refused) > 1 else ""
        raise UnsupportedError(
            f"{path}: {key} is {value!r:.80}{others}, which is not supported: only plain LoRA on linear layers is "
            "read. Merge the adapter into the base model (peft's merge_and_unload) and start from that, or train one "
            "without."
        )


def _positive(path: Path, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadRequestError(f"{path}: {field} is {value!r:.80}; expected a number above 0.")
    return float(value)


def _is_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _ends_in(linear: str, key: str) -> bool:
    if key.startswith("^"):
        return linear == key[1:]
    return f".{linear}".endswith(f".{key}")
