"""How do the families read the keys that they share?

`shared_fields` gives the `ModelConfig` fields that all of them read alike. The other functions refuse a value, or read
windows, the text model's part of a config, or the rotary keys in either of their two forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import (
    MAX_LAYERS,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    Windows,
    YarnScaling,
)
from jax_client.models.families.family import HfConfig

COMPLETE = "A complete config.json is needed."
# Rope types that a file may have and that are not computed from it: why, and the way out.
ROPE_TYPES = {
    "yarn": "it is read from a config.json only. Load the same model in Hugging Face layout (safetensors)",
    "linear": "it is read from a config.json only. Load the same model in Hugging Face layout (safetensors)",
    "dynamic": "it is not planned. It changes nothing up to max_position_embeddings: take it out of the config.json",
    "longrope": "it is not planned. Use a model without it",
    "su": "it is not planned. Use a model without it",
    "proportional": "it is not planned. Use a model without it",
}

# Keys by what their values must be, in every family that has them.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
SIZES_OR_NULL = ("num_key_value_heads", "head_dim")
FLAGS_OR_NULL = ("tie_word_embeddings", "attention_bias", "norm_topk_prob", "use_sliding_window")
OBJECTS_OR_NULL = ("rope_parameters", "rope_scaling")
LAYER_TYPES = ("full_attention", "sliding_attention")


def check_types(hf: HfConfig, where: str) -> None:
    """Refuse values of a wrong type by their keys, before a family reads them; an absent key is its reader's matter.

    Args:
        hf: the parsed config.json, or the text model's part of it.
        where: the file, for messages.

    Raises:
        BadRequestError: such a value, or more layers than any model may have.
    """
    sizes = {key: hf[key] for key in SIZES if key in hf}
    sizes |= {key: hf[key] for key in SIZES_OR_NULL if hf.get(key) is not None}
    for key, value in sizes.items():
        from_one(value, key, where)
    # Readers make lists with an entry for each layer.
    if (layers := sizes.get("num_hidden_layers", 1)) > MAX_LAYERS:
        raise BadRequestError(f"{where}: num_hidden_layers is {layers}; it must be {MAX_LAYERS} or less. {COMPLETE}")
    if (window := hf.get("sliding_window")) is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise BadRequestError(
            f"{where}: sliding_window is {window!r:.80}; it must be an integer from 1 on, or null. {COMPLETE}"
        )
    for keys, kind, says in ((FLAGS_OR_NULL, bool, "true or false"), (OBJECTS_OR_NULL, Mapping, "an object")):
        for key in keys:
            if (value := hf.get(key)) is not None and not isinstance(value, kind):
                raise BadRequestError(f"{where}: {key} is {value!r:.80}; it must be {says}, or null. {COMPLETE}")
    types = hf.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        raise BadRequestError(f"{where}: layer_types is {types!r:.200}; it must be a list of names. {COMPLETE}")
    if "rms_norm_eps" in hf:
        positive(hf, where, "rms_norm_eps", None)
    eos_ids(hf, where)


def eos_ids(hf: HfConfig, where: str) -> list[int]:
    """Return the ids at which a sequence ends, each once; BadRequestError if `eos_token_id` is none of its forms."""
    eos = hf.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BadRequestError(
            f"{where}: eos_token_id is {eos!r:.80}; it must be a token id, a list of them, or null. {COMPLETE}"
        )
    return list(dict.fromkeys(ids))


def shared_fields(hf: HfConfig, where: str, rope: Rope | None = None, *, partial: bool = False) -> dict[str, Any]:
    """Return the `ModelConfig` fields that every family reads alike; refuse what the layers do not compute.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.
        rope: of a family that reads it itself.
        partial: whether a part of a head's values may rotate alone. Else that is refused, since transformers ignores
            its key in the families that have no use for it.
    """
    refuse_unless(hf, where, "hidden_act", (None, "silu"))
    refuse_unless(hf, where, "pretraining_tp", (None, 1))
    refuse_unless(hf, where, "mlp_bias", (None, False))
    rope = read_rope(hf, where) if rope is None else rope
    if rope.dim is not None and not partial:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor makes {rope.dim} of {head_width(hf)} values of a head rotate, which is "
            "not supported in this architecture. Use a model without it."
        )
    n_heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "d_ff": hf["intermediate_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "head_dim": head_width(hf),
        "norm_eps": float(hf["rms_norm_eps"]),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rope_dim": rope.dim,
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "max_context": hf["max_position_embeddings"],
        "eos_token_ids": tuple(eos_ids(hf, where)),
    }


def text_config(hf: HfConfig, where: str, *, tied: bool) -> dict[str, Any]:
    """Return the config of the text model of a model with several towers, with what is said of it beside.

    Whether the output projection is the embedding, the outer config says first, and ends of sequences may be in both.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.
        tied: where neither says so.

    Raises:
        BadRequestError: there is no such config, or a value in it has a wrong type.
    """
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise BadRequestError(
            f"{where}: text_config is {text!r:.80}; it must be an object with the text model's keys. {COMPLETE}"
        )
    check_types(text, f"{where}: text_config")
    eos = list(dict.fromkeys([*eos_ids(hf, where), *eos_ids(text, where)]))
    flags = [found for config in (hf, text) if (found := config.get("tie_word_embeddings")) is not None]
    beside = {"tie_word_embeddings": flags[0] if flags else tied}
    return {**text, **beside, **({"eos_token_id": eos} if eos else {})}


def refuse_unless(hf: HfConfig, where: str, key: str, allowed: tuple[Any, ...]) -> None:
    """Raise UnsupportedError if `hf[key]` is none of the values that the layers compute."""
    if hf.get(key) not in allowed:
        raise UnsupportedError(
            f"{where}: {key} is {hf.get(key)!r}, which is not supported; supported are "
            f"{', '.join('absent' if a is None else repr(a) for a in allowed)}."
        )


def refuse_sliding_window(hf: HfConfig, where: str) -> None:
    """Raise UnsupportedError if a layer would see only a window of its context."""
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings", 0)
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    in_use = hf.get("use_sliding_window", window is not None) and window is not None and window < context
    if layer_types != {"full_attention"} or in_use:
        raise UnsupportedError(
            f"{where}: sliding_window is {window!r} with layer_types {sorted(layer_types)}; sliding-window attention "
            "is not supported in this architecture. Use a model with full attention."
        )


def read_windows(hf: HfConfig, where: str, layers: Sequence[int], rope: Rope | None = None) -> Windows | None:
    """Return the windows of these layers; None where none of them has one, or it is as long as the context.

    Raises:
        BadRequestError: there are such layers, and `sliding_window` is no size.
    """
    window = hf.get("sliding_window")
    if not layers:
        return None
    size = from_one(window, "sliding_window", where, ", since layers have a window")
    if rope is None and size >= hf["max_position_embeddings"]:
        return None
    return Windows(size=size, layers=tuple(layers), rope=rope)


def windowed_layers(hf: HfConfig, where: str, usual: Callable[[int], bool]) -> list[int]:
    """Return which layers have a window by `layer_types`; where it is absent, those of which `usual(layer)` says so.

    Raises:
        UnsupportedError: a type of layer that is not computed.
        BadRequestError: not one type for each layer.
    """
    types = layer_types(hf, where, LAYER_TYPES, lambda i: LAYER_TYPES[usual(i)])
    return [i for i, kind in enumerate(types) if kind == "sliding_attention"]


def layer_types(hf: HfConfig, where: str, known: Sequence[str], usual: Callable[[int], str]) -> list[str]:
    """Return the type of every layer by `layer_types`; where it is absent, what `usual(layer)` says.

    Raises:
        UnsupportedError: a type that is not among the `known`.
        BadRequestError: not one type for each layer.
    """
    n, types = hf["num_hidden_layers"], hf.get("layer_types")
    if types is None:
        return [usual(i) for i in range(n)]
    if not isinstance(types, list) or len(types) != n:
        raise BadRequestError(f"{where}: layer_types is {types!r:.200}; it must list a type for each of {n} layers.")
    for kind in types:
        if kind not in known:
            raise UnsupportedError(
                f"{where}: layer_types has {kind!r}, which is not supported; supported are "
                f"{' and '.join(map(repr, known))}. Use a model without such layers."
            )
    return types


def from_one(value: object, key: str, where: str, why: str = "") -> int:
    """Return a key's value; BadRequestError unless it is an integer from 1 on, which `why` gives a reason for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequestError(f"{where}: {key} is {value!r:.80}; it must be an integer from 1 on{why}. {COMPLETE}")
    return value


def positive(hf: HfConfig, where: str, key: str, default: float | None) -> float:
    """Return the number of a key, or the default where it is absent or null; BadRequestError unless it is above 0."""
    value = default if hf.get(key) is None else hf[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise BadRequestError(f"{where}: {key} is {value!r}; it must be a number above 0.")
    return float(value)


def head_width(hf: HfConfig) -> int:
    """Return the width of a head; 0 where the config has no heads, which `ModelConfig` refuses."""
    n_heads = hf["num_attention_heads"]
    return hf.get("head_dim") or (hf["hidden_size"] // n_heads if n_heads > 0 else 0)


def rope_advice(kind: object) -> str:
    """Return why a rope type is not computed, and the way out."""
    known = ROPE_TYPES.get(kind) if isinstance(kind, str) else None
    return f"About {kind!r}: {known}." if known else "Use a model with one of them."


def read_rope(hf: HfConfig, where: str, layer_type: str | None = None, default_theta: float = 10000.0) -> Rope:
    """Return the rotation from `rope_parameters` (transformers 5), or from `rope_scaling` and keys beside it.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.
        layer_type: of the layers that are meant, for a family that rotates by layer type, such as Gemma 3 with
            "sliding_attention" and "full_attention". Its older files have one `rope_scaling`, for the layers of full
            attention, and the others' theta under `rope_local_base_freq`.
        default_theta: where the config has none.

    Raises:
        UnsupportedError: a rope type that is not computed, or rotation by layer type where no `layer_type` was given.
        BadRequestError: a missing key, or a value that cannot be.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    beside = dict(hf)
    by_type = sorted(name for name, value in rope.items() if isinstance(value, Mapping) or name in LAYER_TYPES)
    if by_type and layer_type is None:
        raise UnsupportedError(
            f"{where}: rope_parameters are given by layer type ({', '.join(by_type)}); this architecture rotates in "
            "all layers alike. Use a model that has one set of them."
        )
    if by_type:
        if not isinstance(found := rope.get(layer_type, {}), Mapping | None):
            raise BadRequestError(
                f"{where}: {layer_type} of rope_parameters is {found!r:.80}; it must be an object. {COMPLETE}"
            )
        rope = dict(found or {})
    elif layer_type == "sliding_attention":
        rope = {}
        beside["rope_theta"] = hf.get("rope_local_base_freq")
    theta = _first(rope.get("rope_theta"), beside.get("rope_theta"), default_theta)
    kind = _first(rope.get("rope_type"), rope.get("type"), "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedError(
            f"{where}: rope type {kind!r} is not supported; supported are "
            f"{', '.join(map(repr, _SCALINGS))}. {rope_advice(kind)}"
        )
    original = beside.get("original_max_position_embeddings")  # beside the others it has priority in transformers
    values = _Numbers(rope | ({} if original is None else {"original_max_position_embeddings": original}), kind, where)
    part = _first(rope.get("partial_rotary_factor"), beside.get("partial_rotary_factor"))
    dim = None if part is None else int(head_width(hf) * values.check("partial_rotary_factor", part, least=0.0))
    if dim is not None and not 2 <= dim <= head_width(hf):
        raise BadRequestError(
            f"{where}: partial_rotary_factor {part!r} makes {dim} of {head_width(hf)} values of a head rotate; it must "
            "be 2 at least, and no more than all."
        )
    return Rope(
        theta=values.check("rope_theta", theta, least=2.0 if kind == "yarn" else 0.0),
        scaling=_SCALINGS[kind](values),
        dim=None if dim == head_width(hf) else dim,
    )


def _first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)


class _Numbers:
    """The numbers of a rope scaling; a missing or wrong one is refused by its key."""

    def __init__(self, rope: HfConfig, kind: str, where: str):
        self._rope, self._kind, self._where = rope, kind, where

    def get(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """Return the number of a key, or the default where the key is absent or null."""
        value = self._rope.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise BadRequestError(
                f"{self._where}: the rope type {self._kind!r} needs the key {key!r}, which is missing; a complete "
                "config.json is needed."
            )
        return self.check(key, value, least=least)

    def check(self, key: str, value: Any, *, least: float) -> float:
        """Return the value as a float if it is a finite number, above 0 and not below `least`."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or value < least:
            above = f"{least:g} or more" if least else "a number above 0"
            raise BadRequestError(f"{self._where}: {key} of the rotary positions is {value!r}; it must be {above}.")
        return float(value)

    def has(self, key: str) -> bool:
        """Return whether a key has a value other than null and 0."""
        return bool(self._rope.get(key))

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean of a key."""
        value = self._rope.get(key, default)
        if not isinstance(value, bool):
            raise BadRequestError(
                f"{self._where}: {key} of the rotary positions is {value!r}; it must be true or false."
            )
        return value

    def refuse_unless_above(self, high: str, above: float, low: str, below: float) -> None:
        """Raise BadRequestError unless one number is above another."""
        if not above > below:
            raise BadRequestError(
                f"{self._where}: {high} {above:g} of the rope type {self._kind!r} must be above {low} {below:g}."
            )


def _default(_: _Numbers) -> None:
    return None


def _linear(values: _Numbers) -> RopeScaling:
    return LinearScaling(factor=values.get("factor", least=1.0))


def _llama3(values: _Numbers) -> RopeScaling:
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    values.refuse_unless_above("high_freq_factor", high, "low_freq_factor", low)
    return Llama3Scaling(
        factor=values.get("factor", least=1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=int(values.get("original_max_position_embeddings", least=1.0)),
    )


def _yarn(values: _Numbers) -> RopeScaling:
    factor = values.get("factor", least=1.0)
    fast, slow = values.get("beta_fast", 32.0), values.get("beta_slow", 1.0)
    values.refuse_unless_above("beta_fast", fast, "beta_slow", slow)

    def attention(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    usual = attention(1.0)
    if values.has("mscale") and values.has("mscale_all_dim"):  # one alone does not count in transformers either
        usual = attention(values.get("mscale")) / attention(values.get("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_context=int(values.get("original_max_position_embeddings", least=1.0)),
        beta_fast=fast,
        beta_slow=slow,
        truncate=values.flag("truncate", True),
        attention_factor=values.get("attention_factor", usual),
    )


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
