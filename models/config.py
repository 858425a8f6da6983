"""What sizes and switches describe a decoder, and what do the shape letters mean?

The one legend of array names: B rows, T query tokens, S key tokens, D model, F feed-forward, N query heads, K key/value
heads, G query heads per key/value head, J = G + 2 (the group's queries, its key, its value), H head dimension, V
vocabulary, L layers, R adapter rank, C targets per position, E experts, k experts per token, M tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax_client.errors import BadRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
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
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_sizes(self, {"count": 2**12, "d_ff": 2**19, "per_token": self.count})


def check_sizes(sizes: object, limits: Mapping[str, int]) -> None:
    """Raise BadRequestError unless each field is an integer from 1 to its limit."""
    for field, limit in limits.items():
        value = getattr(sizes, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise BadRequestError(f"model config: {field} is {value!r}; it must be an integer in 1..{limit}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    Attributes:
        family: the name of the `Family` that read it.
        d_ff: hidden width of the layers that have one MLP.
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
        if not (self.norm_eps > 0 and self.rope_theta > 0):
            raise BadRequestError(
                f"model config: norm_eps {self.norm_eps!r} and rope_theta {self.rope_theta!r} must be positive."
            )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads
