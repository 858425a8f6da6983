"""What sizes and switches describe a decoder, and what do the shape letters mean?

The one legend of array names: B rows, T query tokens, S key tokens, D model, F feed-forward, N query heads, K key/value
heads, G query heads per key/value head, J = G + 2 (the group's queries, its key, its value), H head dimension, V
vocabulary, L layers, R adapter rank, C targets per position, E experts, k experts per token, M tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from jax_client.errors import BadRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3's frequency scaling: wavelengths beyond the original context are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The mixture of experts of a model's layers.

    Attributes:
        count: E, of each layer.
        per_token: k, how many a token is sent to.
        d_ff: F, the hidden width of each.
        normalized: whether a token's weights sum to 1.
        dense_layers: numbers of the layers that have one MLP of the model's `d_ff` instead.
    """

    count: int
    per_token: int
    d_ff: int
    normalized: bool
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(self, {"count": 2**12, "d_ff": 2**19, "per_token": self.count})


def check_sizes(sizes: object, limits: Mapping[str, int]) -> None:
    """Raise BadRequestError unless each field is an integer from 1 to its limit."""
    for field, limit in limits.items():
        value = getattr(sizes, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise BadRequestError(f"model config: {field} is {value!r}; it must be an integer in 1..{limit}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN: frequencies of few turns within the original context are divided by `factor`, those of many are kept.

    Attributes:
        beta_fast, beta_slow: turns in the original context from which on a frequency is kept, and up to which it is
            divided; those between are blended.
        truncate: whether the blend begins and ends at whole pairs.
        attention_factor: cos and sin are multiplied by it.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """All frequencies are divided by `factor`."""

    factor: float


RopeScaling = Llama3Scaling | YarnScaling | LinearScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """How queries and keys are rotated by their positions.

    Attributes:
        theta: base of the frequencies.
        scaling: of the frequencies, for contexts beyond those of the pretraining.
        dim: the first values of a head that rotate, an even number; None for all.
    """

    theta: float
    scaling: RopeScaling | None = None
    dim: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    Attributes:
        family: the name of the `Family` that read it.
        d_ff: hidden width of the layers that have one MLP.
        rope_dim: the first values of a head that rotate; None for all.
        max_context: most tokens of a sequence.
        eos_token_ids: ids that end a sampled row when the request names no stop.

    Raises:
        BadRequestError: a size is out of range; names the field and the value.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = None
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    max_context: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        limits = {
            "vocab_size": 2**21,
            "d_model": 2**17,
            "d_ff": 2**19,
            "n_layers": 2**10,
            "n_heads": 2**12,
            "n_kv_heads": 2**12,
            "head_dim": 2**12,
            "max_context": 2**24,
        }
        check_sizes(self, limits)
        if self.n_heads % self.n_kv_heads:
            raise BadRequestError(
                f"model config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}."
            )
        if self.head_dim % 2:
            raise BadRequestError(f"model config: head_dim {self.head_dim} is odd; rotary positions need pairs.")
        if self.rope_dim is not None and (self.rope_dim % 2 or not 2 <= self.rope_dim <= self.head_dim):
            raise BadRequestError(
                f"model config: rope_dim is {self.rope_dim!r}; it must be an even number in 2..head_dim "
                f"{self.head_dim}, since rotary positions need pairs."
            )
        if not (self.norm_eps > 0 and self.rope_theta > 0):
            raise BadRequestError(
                f"model config: norm_eps {self.norm_eps!r} and rope_theta {self.rope_theta!r} must be positive."
            )

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """The hidden widths of the layers' MLPs and experts."""
        if self.experts is None:
            return (self.d_ff,)
        return (self.experts.d_ff, self.d_ff) if self.experts.dense_layers else (self.experts.d_ff,)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rope(self) -> Rope:
        """How the layers rotate that have no rotation of their own."""
        return Rope(theta=self.rope_theta, scaling=self.rope_scaling, dim=self.rope_dim)


def config_from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the config that `dataclasses.asdict` gave these fields of, also if they were JSON in between."""
    found: dict[str, Any] = dict(fields) | {"eos_token_ids": tuple(fields["eos_token_ids"])}
    if (scaling := found["rope_scaling"]) is not None:  # each kind has fields of its own
        kinds = {frozenset(kind.__dataclass_fields__): kind for kind in get_args(RopeScaling)}
        found["rope_scaling"] = kinds[frozenset(scaling)](**scaling)
    if (experts := found["experts"]) is not None:
        found["experts"] = Experts(**experts | {"dense_layers": tuple(experts["dense_layers"])})
    return ModelConfig(**found)
