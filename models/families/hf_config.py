"""How do the families read the keys that they share?

`shared_fields` gives the `ModelConfig` fields that all of them read alike; the other functions refuse a value, or read
the rotary keys in either of their two forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import RopeScaling

# Rope types that are not computed: what will come, and the way out until then.
ROPE_TYPES = {
    "yarn": "it will come with gpt-oss and DeepSeek V3. Where the release offers it as an option for long contexts, as "
    "Qwen 2.5 and 3 do, take it out of the config.json",
    "linear": "it will come with Gemma 3. Use a model without it",
    "dynamic": "it is not planned. It changes nothing up to max_position_embeddings: take it out of the config.json",
    "longrope": "it is not planned. Use a model without it",
    "su": "it is not planned. Use a model without it",
    "proportional": "it is not planned. Use a model without it",
}


def shared_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the `ModelConfig` fields that every family reads alike; refuse what the layers do not compute."""
    refuse_unless(hf, where, "hidden_act", (None, "silu"))
    refuse_unless(hf, where, "pretraining_tp", (None, 1))
    refuse_unless(hf, where, "mlp_bias", (None, False))
    rope_theta, scaling = read_rope(hf, where)
    eos = hf.get("eos_token_id")
    n_heads = int(hf["num_attention_heads"])
    return {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "d_ff": hf["intermediate_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "head_dim": hf.get("head_dim") or (hf["hidden_size"] // n_heads if n_heads > 0 else 0),
        "norm_eps": float(hf["rms_norm_eps"]),
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "max_context": hf["max_position_embeddings"],
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    }


def refuse_unless(hf: Mapping[str, Any], where: str, key: str, allowed: tuple[Any, ...]) -> None:
    """Raise UnsupportedError if `hf[key]` is none of the values that the layers compute."""
    if hf.get(key) not in allowed:
        raise UnsupportedError(
            f"{where}: {key} is {hf.get(key)!r}, which is not supported; supported are "
            f"{', '.join('absent' if a is None else repr(a) for a in allowed)}."
        )


def refuse_sliding_window(hf: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError if a layer would see only a window of its context."""
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings", 0)
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    in_use = hf.get("use_sliding_window", window is not None) and window is not None and window < context
    if layer_types != {"full_attention"} or in_use:
        raise UnsupportedError(
            f"{where}: sliding_window is {window!r} with layer_types {sorted(layer_types)}; sliding-window attention "
            "is not supported. Use a model with full attention."
        )


def rope_advice(kind: object) -> str:
    """Return what will become of a rope type that is not computed, and the way out until then."""
    known = ROPE_TYPES.get(kind) if isinstance(kind, str) else None
    return f"About {kind!r}: {known}." if known else "Use a model with one of them."


def read_rope(hf: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from the flat keys or from `rope_parameters`.

    Raises:
        UnsupportedError: a rope type other than "default" and "llama3", or partial rotation.
    """
    refuse_unless(hf, where, "partial_rotary_factor", (None, 1, 1.0))
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedError(
            f"{where}: rope type {kind!r} is not supported; supported are 'default' and 'llama3'. {rope_advice(kind)}"
        )
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )
    if not (scaling.factor >= 1 and 0 < scaling.low_freq_factor < scaling.high_freq_factor):
        raise BadRequestError(
            f"{where}: rope scaling {rope} is not usable; it needs factor >= 1 and "
            "0 < low_freq_factor < high_freq_factor."
        )
    return theta, scaling
