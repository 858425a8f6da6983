"""What sizes and switches describe a decoder, and what do the shape letters mean?

The one legend of array names: B rows, T query tokens, S key tokens, D model, F feed-forward, N query heads, K key/value
heads, G query heads per key/value head, J = G + 2 (the group's queries, its key, its value), H head dimension, V
vocabulary, L layers, R adapter rank, C targets per position, E experts, k experts per token, M tokens of all rows. Of
a gated delta rule: P value heads, X the width of keys, Y that of values, U channels and z taps of its convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jax_client.errors import BadRequestError

MAX_LAYERS = 2**10


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
        biased: whether the router and the experts' matrices have biases.
        dense_layers: numbers of the layers that have one MLP of the model's `d_ff` instead.
        shared_d_ff: the hidden width of one more expert, which all tokens share; None where there is none.
    """

    count: int
    per_token: int
    d_ff: int
    normalized: bool
    biased: bool = False
    dense_layers: tuple[int, ...] = ()
    shared_d_ff: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, {"count": 2**12, "d_ff": 2**19, "per_token": self.count})
        if self.shared_d_ff is not None:
            check_sizes(self, {"shared_d_ff": 2**19})


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDelta:
    """The layers that mix tokens by a gated delta rule in place of attention.

    Attributes:
        layers: numbers of these layers.
        key_heads: heads of queries and keys; P / key_heads successive value heads share one.
        value_heads: P.
        key_dim, value_dim: X and Y.
        taps: tokens that the convolution before the rule sees, the token itself included.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("key_heads", "value_heads", "key_dim", "value_dim"), 2**12)
        check_sizes(self, sizes | {"taps": 2**5})
        if self.value_heads % self.key_heads:
            raise BadRequestError(
                f"model config: value_heads {self.value_heads} is not a multiple of key_heads {self.key_heads}."
            )

    @property
    def channels(self) -> int:
        """U: of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


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
class Windows:
    """Layers whose queries see the last tokens of their context only.

    Attributes:
        size: tokens that a query sees at most, itself included.
        layers: numbers of these layers.
        rope: how they rotate, where it is not as the others do.
    """

    size: int
    layers: tuple[int, ...]
    rope: Rope | None = None

    def __post_init__(self) -> None:
        check_sizes(self, {"size": 2**24})


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """In what layers with the same parts may differ.

    Attributes:
        window: tokens that a query sees at most, itself included; None for all.
        rope: how queries and keys rotate.
    """

    window: int | None
    rope: Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class SwigluClamp:
    """How gpt-oss bounds its gated activation; see `activations.clamped_swiglu`."""

    limit: float
    alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    Attributes:
        family: the name of the `Family` that read it.
        d_ff: hidden width of the layers that have one MLP.
        rope_dim: the first values of a head that rotate; None for all.
        qkv_bias, o_bias: whether attention's matrices in, and the one out, have biases.
        output_gate: whether each value of attention's output is multiplied by the sigmoid of a gate, a product of the
            layer's input as queries are.
        sinks: whether each query head has a score that takes its share of the softmax and has no value.
        query_scale: that scores are multiplied by; None for 1 / sqrt(head_dim).
        windows: the layers with a window; None for none.
        delta: the layers with a gated delta rule; None for none.
        activation: of the MLPs and the experts: "swiglu", or "geglu".
        clamp: of a swiglu; None for a plain one.
        post_norms: whether the output of each part of a layer has a norm of its own.
        embedding_scale: that embeddings are multiplied by on their way into the first layer.
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
    o_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    sinks: bool = False
    query_scale: float | None = None
    windows: Windows | None = None
    delta: GatedDelta | None = None
    activation: Literal["swiglu", "geglu"] = "swiglu"
    clamp: SwigluClamp | None = None
    post_norms: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None
    max_context: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        limits = {
            "vocab_size": 2**21,
            "d_model": 2**17,
            "d_ff": 2**19,
            "n_layers": MAX_LAYERS,
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
        shared = () if self.experts.shared_d_ff is None else (self.experts.shared_d_ff,)
        return self.experts.d_ff, *((self.d_ff,) if self.experts.dense_layers else ()), *shared

    @property
    def head_counts(self) -> tuple[int, ...]:
        """How many heads the layers have whose queries, or value heads, belong together."""
        return (self.n_kv_heads,) if self.delta is None else (self.n_kv_heads, self.delta.key_heads)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rope(self) -> Rope:
        """How the layers rotate that have no rotation of their own."""
        return Rope(theta=self.rope_theta, scaling=self.rope_scaling, dim=self.rope_dim)

    def layer_options(self, layer: int) -> LayerOptions:
        """Return in what a layer may differ from others with the same parts."""
        if self.windows is None or layer not in self.windows.layers:
            return LayerOptions(window=None, rope=self.rope)
        return LayerOptions(window=self.windows.size, rope=self.windows.rope or self.rope)

    @property
    def attention_extras(self) -> frozenset[str]:
        """Which keywords some layer's attention needs, as `parts.attention.Extras` has them."""
        needed = {"window": self.windows is not None, "sinks": self.sinks, "scale": self.query_scale is not None}
        return frozenset(name for name, is_needed in needed.items() if is_needed)


def config_from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the config that `dataclasses.asdict` gave these fields of, also if they were JSON in between."""
    found: dict[str, Any] = dict(fields) | {"eos_token_ids": tuple(fields["eos_token_ids"])}
    found["rope_scaling"] = _scaling(found["rope_scaling"])
    if (windows := found["windows"]) is not None:
        found["windows"] = Windows(**windows | {"layers": tuple(windows["layers"]), "rope": _rope(windows["rope"])})
    if (clamp := found["clamp"]) is not None:
        found["clamp"] = SwigluClamp(**clamp)
    if (delta := found["delta"]) is not None:
        found["delta"] = GatedDelta(**delta | {"layers": tuple(delta["layers"])})
    if (experts := found["experts"]) is not None:
        found["experts"] = Experts(**experts | {"dense_layers": tuple(experts["dense_layers"])})
    return ModelConfig(**found)


def _rope(fields: Mapping[str, Any] | None) -> Rope | None:
    return None if fields is None else Rope(**{**fields, "scaling": _scaling(fields["scaling"])})


def _scaling(fields: Mapping[str, Any] | None) -> RopeScaling | None:
    if fields is None:
        return None
    kinds = {frozenset(kind.__dataclass_fields__): kind for kind in get_args(RopeScaling)}  # each has fields of its own
    return kinds[frozenset(fields)](**fields)
