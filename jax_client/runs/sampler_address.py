"""What names a sampler to another process of this machine? A `SamplerAddress`.

Its text is what the API calls a sampler handle.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jax_client.errors import BadRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerAddress:
    """Where a sampler is served. An address holds no key: the socket's owner and mode decide who may use the sampler.

    Attributes:
        socket: path of the Unix socket of the process that has the weights.
        process: that process's id.
        session_id: the sampler's session.
        sampler_id: `SESSION:sample:N`.
        base_model: the base model's name in that process.
        model_path: the base model's files, for the tokenizer.
        model_kind: their layout, "hf" or "gguf".
        client_config: the configuration that the SDK asks a server for once.
        dynamic_config: the configuration that the SDK asks for again and again.
    """

    socket: str
    process: int
    session_id: str
    sampler_id: str
    base_model: str
    model_path: str
    model_kind: str
    client_config: Mapping[str, Any]
    dynamic_config: Mapping[str, Any]

    def encode(self) -> str:
        """Return the text, a sampler handle."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> SamplerAddress:
        """Parse a sampler handle.

        Raises:
            BadRequestError: the text is no sampler handle.
        """
        try:
            fields = json.loads(base64.urlsafe_b64decode(text))
            found = cls(**fields)
            for name, value in fields.items():
                kind = dict if name.endswith("_config") else int if name == "process" else str
                if not isinstance(value, kind):
                    raise TypeError(f"{name} is {type(value).__name__}")
        except (ValueError, TypeError) as error:
            raise BadRequestError(f"not a sampler handle ({error}); take one from get_sampler_handle().") from error
        return found
