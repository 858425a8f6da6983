"""Which configs of families with windows are read, and what is said of keys that their layers do not compute?"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import LinearScaling, Rope, SwigluClamp, Windows, config_from_fields
from jax_client.models.families.registry import config_from_hf
from support.families import cases


def read(case: str, **changes: Any) -> Any:
    keys = {name: value for name, value in (cases.CASES[case] | changes).items() if value is not ...}
    return config_from_hf(keys, "config.json")


def test_what_layers_of_each_family_see() -> None:
    local, whole = Rope(theta=1e4), Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
    gemma = read("gemma3")
    assert gemma.windows == Windows(size=8, layers=(0, 1, 3), rope=local)
    assert [gemma.layer_options(i).rope for i in range(4)] == [local, local, whole, local]
    assert [gemma.layer_options(i).window for i in range(4)] == [8, 8, None, 8]
    assert (gemma.query_scale, gemma.embedding_scale) == (24**-0.5, 8.0)
    assert read("gemma3", query_pre_attn_scalar=16).query_scale is None  # as wide as a head
    gpt = read("gpt_oss")
    assert gpt.windows == Windows(size=8, layers=(0, 2))
    assert read("gpt_oss", layer_types=["full_attention"] * 3 + ["sliding_attention"]).windows.layers == (3,)
    assert read("gpt_oss", swiglu_limit=5.0).clamp == SwigluClamp(limit=5.0, alpha=1.702)
    assert read("mistral").windows == Windows(size=8, layers=(0, 1))
    assert read("mistral", sliding_window=None).windows is None
    assert read("mistral", sliding_window=256).windows is None  # as long as the context


def test_gemma_releases_leave_keys_out() -> None:
    """The release of 1B has no layer_types, no tie_word_embeddings, and the rotations in the older form."""
    absent = dict.fromkeys(("layer_types", "rope_parameters", "tie_word_embeddings", "num_key_value_heads"), ...)
    old = read("gemma3", **absent, num_hidden_layers=7, rope_theta=1e6, rope_local_base_freq=1e4)
    assert old.windows == Windows(size=8, layers=(0, 1, 2, 3, 4, 6), rope=Rope(theta=1e4))
    assert (old.rope, old.tied_embeddings, old.n_kv_heads) == (Rope(theta=1e6), True, 4)


@pytest.mark.parametrize("case", cases.CASES)
def test_a_config_survives_json(case: str) -> None:
    config = cases.model_config(case)
    assert config_from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("case", "changes", "error", "says"),
    [
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, UnsupportedError, "'chunked_attention', which is not"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, BadRequestError, "a type for each of 4 layers"),
        ("gpt_oss", {"sliding_window": None}, BadRequestError, "sliding_window is None"),
        ("gpt_oss", {"swiglu_limit": -1}, BadRequestError, "swiglu_limit is -1; it must be a number above 0"),
        ("gpt_oss", {"num_experts_per_tok": ...}, BadRequestError, "'num_experts_per_tok' is missing"),
        ("gpt_oss", {"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
        ("gemma3", {"hidden_activation": "gelu"}, UnsupportedError, "hidden_activation is 'gelu'"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping is 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention is True"),
        ("gemma3", {"query_pre_attn_scalar": 0}, BadRequestError, "query_pre_attn_scalar is 0"),
        ("mistral", {"sliding_window": "8"}, BadRequestError, "sliding_window is '8'; it must be an integer from 1"),
        ("mistral", {"attention_bias": True}, UnsupportedError, "attention_bias is True"),
    ],
)
def test_what_is_not_computed_is_refused(case: str, changes: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        read(case, **changes)
