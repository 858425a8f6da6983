"""Which families are there, and which one reads a given config.json?

`FAMILIES` holds them by name, and `config_from_hf` asks the one that knows the config's architecture. Each refuses by
name what the layers do not compute: a silently ignored rope type or sliding window gives a model that looks right on
short prompts.
"""

from __future__ import annotations

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models import quantization
from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig

# A family is known by its import here: `FAMILIES` collects every `Family` among this module's names.
from jax_client.models.families.gemma3 import GEMMA3 as GEMMA3
from jax_client.models.families.gemma3 import GEMMA3_VISION as GEMMA3_VISION
from jax_client.models.families.gpt_oss import GPT_OSS as GPT_OSS
from jax_client.models.families.hf_config import check_types
from jax_client.models.families.llama import LLAMA as LLAMA
from jax_client.models.families.mistral import MISTRAL as MISTRAL
from jax_client.models.families.qwen.qwen2 import QWEN2 as QWEN2
from jax_client.models.families.qwen.qwen3 import QWEN3 as QWEN3
from jax_client.models.families.qwen.qwen3_5 import QWEN3_5 as QWEN3_5
from jax_client.models.families.qwen.qwen3_5 import QWEN3_5_VISION as QWEN3_5_VISION
from jax_client.models.families.qwen.qwen3_5_moe import QWEN3_5_MOE as QWEN3_5_MOE
from jax_client.models.families.qwen.qwen3_5_moe import QWEN3_5_MOE_VISION as QWEN3_5_MOE_VISION
from jax_client.models.families.qwen.qwen3_moe import QWEN3_MOE as QWEN3_MOE
from jax_client.models.families.qwen.qwen3_next import QWEN3_NEXT as QWEN3_NEXT
from jax_client.models.families.qwen.qwen3_vl_moe import QWEN3_VL_MOE as QWEN3_VL_MOE

FAMILIES: dict[str, Family] = {value.name: value for value in tuple(globals().values()) if isinstance(value, Family)}
# By the name under "architectures" of a config.json.
SUPPORTED_ARCHITECTURES = {name: family for family in FAMILIES.values() for name in family.architectures}


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Hugging Face config.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.

    Raises:
        UnsupportedError: an architecture, or a key of it, that is not computed here; a quantised format that is
            not read.
        BadRequestError: a value that no model can have.
    """
    architectures = hf.get("architectures") or []
    known = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise BadRequestError(f"{where}: 'architectures' is {architectures!r}; it must name one of {known}.")
    named = architectures[0]
    family = SUPPORTED_ARCHITECTURES.get(named) if isinstance(named, str) else None
    if family is None:
        raise UnsupportedError(f"{where}: architecture {named!r:.80} is not supported; supported are {known}.")
    # Only to refuse a format that is not read, before any weight is looked at.
    quantization.read_quantization(hf, where)
    check_types(hf, where)
    try:
        return family.read(hf, where)
    except KeyError as missing:
        raise BadRequestError(f"{where}: the key {missing} is missing; a complete config.json is needed.") from None
    except BadRequestError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from None
