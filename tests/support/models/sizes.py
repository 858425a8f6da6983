"""Which sizes have released models that several tests describe?"""

from __future__ import annotations

from typing import Any

# Of the Qwen3 family, what its models share.
QWEN3: dict[str, Any] = {
    "family": "qwen3",
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qk_norm": True,
    "max_context": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
}
