"""What is a model family? A `Family`: the configs that it reads, by the names that files give, and what it refuses.

Every family file ends with one; `registry` collects them. The layers know no family: a family's reader turns a
config.json into sizes and switches of `ModelConfig`, and refuses by name every key that the layers do not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax_client.models.config import ModelConfig


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
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str | None
    read: Callable[[Mapping[str, Any], str], ModelConfig]
