"""Which architectures are there, and which keys of a config.json does each accept?

Anything a config asks for that the layers do not compute is refused by name: a silently ignored rope type or sliding
window gives a model that looks right on short prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.models.families import llama, qwen2, qwen3

SUPPORTED_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    "LlamaForCausalLM": llama.config_from_hf,
    "MistralForCausalLM": llama.config_from_hf,
    "Qwen2ForCausalLM": qwen2.config_from_hf,
    "Qwen3ForCausalLM": qwen3.config_from_hf,
}


def config_from_hf(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a Hugging Face config.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.

    Raises:
        UnsupportedError: an architecture, or a key of it, that is not computed here.
        BadRequestError: a value that no model can have.
    """
    architectures = hf.get("architectures") or []
    known = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise BadRequestError(f"{where}: 'architectures' is {architectures!r}; it must name one of {known}.")
    read = SUPPORTED_ARCHITECTURES.get(architectures[0])
    if read is None:
        raise UnsupportedError(f"{where}: architecture {architectures[0]!r} is not supported; supported are {known}.")
    try:
        return read(hf, where)
    except KeyError as missing:
        raise BadRequestError(f"{where}: the key {missing} is missing; a complete config.json is needed.") from None
    except BadRequestError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from None
