"""What names a sampler to another process of this machine, and who gives such names?"""

from __future__ import annotations

import base64
import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jax_client.errors import BadRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """Where a sampler is served. It holds no key: the socket's owner and mode decide who may use it.

    Attributes:
        socket: path of the Unix socket of the process that has the weights.
        process: that process's id.
        session_id: the sampler's session.
        sampler_id: `SESSION:sample:N`.
        base_model: the base model's name in that process.
        model_path: the base model's files, for the tokenizer.
        model_kind: their layout, "hf" or "gguf".
        client_config: what the server tells a client of the SDK once.
        dynamic_config: what it tells it again and again.
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
        """Return the handle as text."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> Handle:
        """Return the handle that was encoded.

        Raises:
            BadRequestError: it is none.
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


# Serves a sampler of this process to others. A higher floor does that: jax_client/__init__.py, above all floors, hands
# it down.
share: Callable[[Any], Handle]

# Samplers of this process, by their ids: here a handle leads back to the sampler itself. A fork can use none of them.
here: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
os.register_at_fork(after_in_child=here.clear)
