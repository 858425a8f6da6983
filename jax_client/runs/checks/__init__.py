"""Is this call acceptable? The checks that the clients and the server make before anything is queued.

Nothing here touches a device. Each check returns plain values of the engine's, or raises an error of
`jax_client.errors` that names the index, the field, the value and the limit; a call that was refused changed nothing.
"""

from __future__ import annotations

from jax_client.runs.checks.data import custom_data, training_data
from jax_client.runs.checks.sampling import generation
from jax_client.runs.checks.settings import (
    adam_settings,
    checkpoint_name,
    lora_spec,
    refuse_access_token,
    refuse_optimizer,
    tags,
    text_or_none,
    user_metadata,
    user_metadata_or_none,
    warmup_lengths,
)
from jax_client.runs.lifetimes import ttl

__all__ = [
    "adam_settings",
    "checkpoint_name",
    "custom_data",
    "generation",
    "lora_spec",
    "refuse_access_token",
    "refuse_optimizer",
    "tags",
    "text_or_none",
    "training_data",
    "ttl",
    "user_metadata",
    "user_metadata_or_none",
    "warmup_lengths",
]
