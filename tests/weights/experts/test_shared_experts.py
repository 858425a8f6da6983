"""Which files and configs of mixtures with an expert that all tokens share are read, and what is said of the others?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import config_from_fields
from jax_client.models.families.registry import config_from_hf
from support.families import cases
from support.weight_files import write_hf
from support.weights.loading import assert_same, load

MOE, NEXT = "qwen3_5_moe", "qwen3_next"
VISION = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {name: value for name, value in cases.CASES[MOE].items() if name != "architectures"},
    "vision_config": {"depth": 1},
    "tie_word_embeddings": False,
}
UNREAD = {
    "model.visual.patch_embed.proj.weight": np.zeros((4, 3), np.float16),
    "mtp.layers.0.mlp.experts.gate_up_proj": np.zeros((8, 64, 64), np.float16),
}
SHARED = "model.layers.0.mlp.shared_expert"


def of_release() -> dict[str, np.ndarray]:
    """Return the weights as the releases have them: beside a vision tower, with a layer's experts in two tensors."""
    stored = {name.replace("model.", "model.language_model.", 1): x for name, x in cases.fused(MOE).items()}
    return stored | UNREAD


def test_all_forms_of_the_files_give_the_same_arrays(tmp_path: Path) -> None:
    apart = load(write_hf(tmp_path / "apart", cases.CASES[MOE], cases.tensors(MOE)))
    assert_same(load(write_hf(tmp_path / "fused", cases.CASES[MOE], cases.fused(MOE))), apart)
    assert_same(load(write_hf(tmp_path / "release", VISION, of_release())), apart)


@pytest.mark.parametrize(("case", "layers"), [(MOE, (0, 1, 2, 3)), (NEXT, (0, 2, 3))])
def test_the_shared_expert_is_stored_as_a_dense_mlp(case: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    moe, t = (
        load(write_hf(tmp_path / "m", cases.CASES[case], cases.tensors(case)))["layers"]["moe"],
        cases.tensors(case),
    )
    for entry, layer in enumerate(layers):
        mlp = f"model.layers.{layer}.mlp.shared_expert"
        for i, name in enumerate(("gate", "up")):
            np.testing.assert_array_equal(moe["shared_gate_up_L2DF"][entry, i], t[f"{mlp}.{name}_proj.weight"].T)
        np.testing.assert_array_equal(moe["shared_down_LFD"][entry], t[f"{mlp}.down_proj.weight"].T)
        np.testing.assert_array_equal(moe["shared_share_LD"][entry], t[f"{mlp}_gate.weight"][0])


def test_products_by_key_head_come_apart(tmp_path: Path) -> None:
    """Two key heads of width 16 with two value heads of width 24 each."""
    delta = load(write_hf(tmp_path / "m", cases.CASES[NEXT], cases.tensors(NEXT)))["layers"]["delta"]
    prefix = "model.layers.1.linear_attn."
    both, ba = (cases.tensors(NEXT)[f"{prefix}in_proj_{name}.weight"] for name in ("qkvz", "ba"))
    by_head = both.reshape(2, 16 + 16 + 48 + 48, 64)
    for name, start, width in (("q", 0, 16), ("k", 16, 16), ("v", 32, 48), ("z", 80, 48)):
        expected = by_head[:, start : start + width].reshape(-1, 64).T
        np.testing.assert_array_equal(delta[f"delta_{name}_LDO"][1], expected)
    for name, start in (("b", 0), ("a", 2)):
        expected = ba.reshape(2, 4, 64)[:, start : start + 2].reshape(-1, 64).T
        np.testing.assert_array_equal(delta[f"delta_{name}_LDP"][1], expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{SHARED}.up_proj.weight"), r"1 missing.*layers\.0\.mlp\.shared_expert\.up_proj\.weight"),
        (lambda t: t.pop(f"{SHARED}_gate.weight"), r"1 missing.*layers\.0\.mlp\.shared_expert_gate\.weight"),
        (lambda t: t.pop("model.layers.2.mlp.gate.weight"), r"1 missing.*layers\.2\.mlp\.gate\.weight"),
        (
            lambda t: t.update({f"{SHARED}_gate.weight": np.zeros((64, 1), np.float32)}),
            r"1 misshapen.*shared_expert_gate\.weight: expected \(1, 64\), found \(64, 1\)",
        ),
        (
            lambda t: t.update({f"{SHARED}.down_proj.bias": np.zeros(64, np.float32)}),
            r"1 extra.*shared_expert\.down_proj\.bias: not expected",
        ),
    ],
)
@pytest.mark.parametrize("case", [MOE, NEXT])
def test_files_that_do_not_fit_are_named(case: str, change: Any, says: str, tmp_path: Path) -> None:
    tensors = cases.tensors(case)
    change(tensors)
    with pytest.raises(BadRequestError, match=says):
        load(write_hf(tmp_path / "m", cases.CASES[case], tensors))


def test_a_tensor_of_no_tower_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"tensor model\.layers\.0\.mlp\.gate\.weight was not expected"):
        stray = {"model.layers.0.mlp.gate.weight": np.zeros((8, 64), np.float32)}
        load(write_hf(tmp_path / "m", VISION, of_release() | stray))


def test_what_the_configs_say() -> None:
    text, whole = config_from_hf(cases.CASES[MOE], "config.json"), config_from_hf(VISION, "config.json")
    assert text.experts is not None and text.experts == whole.experts
    assert (text.experts.shared_d_ff, text.experts.normalized, text.experts.dense_layers) == (48, True, ())
    assert (text.delta, text.rope, text.hidden_widths) == (whole.delta, whole.rope, (32, 48))
    other = cases.CASES[NEXT] | {"decoder_sparse_step": 2, "norm_topk_prob": False}
    found = config_from_hf(other, "config.json")
    assert found.experts is not None
    assert (found.experts.dense_layers, found.experts.normalized) == ((0, 1, 2), False)
    assert found.hidden_widths == (32, 96, 48)


@pytest.mark.parametrize("case", [MOE, NEXT])
def test_a_config_survives_json(case: str) -> None:
    c = cases.model_config(case)
    assert config_from_fields(json.loads(json.dumps(asdict(c)))) == c


@pytest.mark.parametrize("case", [MOE, NEXT])
@pytest.mark.parametrize(
    "key",
    [
        "shared_expert_intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "linear_num_value_heads",
    ],
)
@pytest.mark.parametrize("value", [None, 0, "48", 1.5, True, [48]])
def test_a_size_is_refused_by_its_key(case: str, key: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=f"^config.json: {key} is .*an integer from 1 on"):
        config_from_hf(cases.CASES[case] | {key: value}, "config.json")


@pytest.mark.parametrize(
    ("case", "key"),
    [
        (MOE, "shared_expert_intermediate_size"),
        (MOE, "moe_intermediate_size"),
        (MOE, "head_dim"),
        (NEXT, "norm_topk_prob"),
        (NEXT, "intermediate_size"),
        (NEXT, "shared_expert_intermediate_size"),
    ],
)
def test_a_missing_key_is_named(case: str, key: str) -> None:
    config = {name: value for name, value in cases.CASES[case].items() if name != key}
    with pytest.raises(BadRequestError, match=f"the key '{key}' is missing"):
        config_from_hf(config, "config.json")


@pytest.mark.parametrize(
    ("case", "changes", "error", "says"),
    [
        (MOE, {"norm_topk_prob": False}, UnsupportedError, "norm_topk_prob is False"),
        (MOE, {"mlp_only_layers": [1]}, UnsupportedError, r"mlp_only_layers is \[1\]"),
        (MOE, {"decoder_sparse_step": 2}, UnsupportedError, "decoder_sparse_step is 2"),
        (
            MOE,
            {"num_experts_per_tok": 9},
            BadRequestError,
            "num_experts_per_tok is 9; it must be num_experts 8 or less",
        ),
        (MOE, {"attn_output_gate": False}, UnsupportedError, "attn_output_gate is False"),
        (MOE, {"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
        (NEXT, {"mlp_only_layers": [4]}, BadRequestError, r"mlp_only_layers is \[4\]; it must list layers in 0\.\.3"),
        (NEXT, {"layer_types": ["linear_attention"] * 4}, UnsupportedError, "a model without attention"),
        (NEXT, {"attention_bias": True}, UnsupportedError, "attention_bias is True"),
    ],
)
def test_configs_that_are_not_computed_are_refused(case: str, changes: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        config_from_hf(cases.CASES[case] | changes, "config.json")
