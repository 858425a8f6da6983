"""What is a model family? A `Family`: the configs that it reads, by the names that files give, and what it refuses.

Every family file ends with one; `registry` collects them. The layers know no family: a family's reader turns a
config.json into sizes and switches of `ModelConfig`, and refuses by name every key that the layers do not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jax_client.models.config import ModelConfig

# A parsed config.json.
HfConfig: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """The text model inside a model that has more, as one that reads images; nothing else of it is read.

    Attributes:
        modules: how the names of its modules begin in transformers, in place of "model.", or this itself.
        stored: how the names of its tensors begin in files, in place of "model." and of "lm_head."; in the first form
            that the files have.
        others: how the names of the other towers' tensors begin.
    """

    modules: str
    stored: tuple[tuple[str, str], ...]
    others: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """How the weight files of a family name and order what others have too.

    Attributes:
        norms: of a layer: before attention and, with norms of outputs, behind it; then those of the MLP.
        added_to_one: whether a norm's weight is stored as what is added to 1.
        router: of a layer with experts, without "weight".
        experts: the matrices of a layer where they are one tensor: "rows", gate above up (E, 2F, D) and down (E, D, F);
            or with the input first, (E, D, 2F) and (E, F, D), "columns" with gate beside up, or "interleaved" with a
            column of gate and one of up by turns.
        delta: the rows of the gated delta rule's products in: "by product", those of q, k and v as one matrix, or "by
            head", those of q, k, v and z of each key head in turn, and of b and a.
        tower: where the text model is one of several.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    added_to_one: bool = False
    router: str = "mlp.gate"
    experts: Literal["rows", "columns", "interleaved"] = "rows"
    delta: Literal["by product", "by head"] = "by product"
    tower: Tower | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family.

    Attributes:
        name: `ModelConfig.family`.
        architectures: the names under "architectures" of a config.json that `read` takes.
        gguf: "general.architecture" of the family's GGUF files; None where none is read. Their tensors are those of the
            first architecture.
        read: `read(hf, where) -> ModelConfig`, for a parsed config.json and the file's name in messages. Raises
            UnsupportedError for what the layers do not compute, KeyError for a missing key, BadRequestError for a value
            that no model can have.
        files: how its weight files differ from a Llama's.
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str | None
    read: Callable[[HfConfig, str], ModelConfig]
    files: Files = Files()
