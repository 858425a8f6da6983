"""Which plain values do several floors pass on? Frozen records of numpy arrays and scalars, without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """One adapter: which linear layers it covers, and how it starts.

    Attributes:
        rank: 1 to 512. The adapter adds (alpha / rank) (x A) B to each covered layer, alpha = `models.lora.LORA_ALPHA`.
        seed: of the initial A (uniform in ±1/√fan_in); B starts at zero.
        train_attn: cover q, k, v, o.
        train_mlp: cover gate, up, down.
        train_unembed: cover the output projection (only that, when it is tied to the embedding).
    """

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExample:
    """One datum, validated: target i is scored with the logits at token i; there is no shift.

    Attributes:
        tokens_T: int32 (T,).
        targets: int32 (T,) or (T, K).
        inputs: float32 arrays in the shape of `targets`, by the loss's input names.
    """

    tokens_T: np.ndarray
    targets: np.ndarray
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterState:
    """An adapter on the host, as it is saved: flat names to float32 arrays, module by module.

    Attributes:
        spec: the adapter's configuration.
        step: optimizer steps taken.
        weights: such as "q.A" (L, R, D), "q.B" (L, R, K, G, H); see `engine/core/adapters.py`.
        mu, nu: Adam's moments under the same names; None in sampler weights.
    """

    spec: LoraSpec
    step: int
    weights: Mapping[str, np.ndarray]
    mu: Mapping[str, np.ndarray] | None = None
    nu: Mapping[str, np.ndarray] | None = None
