"""Which configs and files of mixtures of experts are read, and what is said of those that are not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.families.registry import config_from_hf
from jax_client.sharding import make_mesh
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import resolve
from support.families import cases
from support.weight_files import write_hf

CASE = "qwen3_moe_mixed"


def load(path: Path) -> Any:
    source = resolve(str(path))
    return load_params(source, read_config(source), np.float32, make_mesh({"data": 1}, jax.devices()[:1]))


def test_both_forms_of_the_files_give_the_same_arrays(tmp_path: Path) -> None:
    apart, fused = (
        load(write_hf(tmp_path / name, cases.CASES[CASE], tensors))
        for name, tensors in (("apart", cases.tensors(CASE)), ("fused", cases.fused(CASE)))
    )
    jax.tree.map(np.testing.assert_array_equal, apart, fused)
    moe, t = apart["layers"]["moe"], cases.tensors(CASE)
    assert moe["router_LDE"].dtype == np.float32
    for entry, layer in enumerate((0, 2)):
        mlp = f"model.layers.{layer}.mlp."
        np.testing.assert_array_equal(moe["router_LDE"][entry], t[mlp + "gate.weight"].T)
        for e in range(8):
            for name, leaf in (("gate", "gate_LEDF"), ("up", "up_LEDF"), ("down", "down_LEFD")):
                matrix = t[f"{mlp}experts.{e}.{name}_proj.weight"]
                np.testing.assert_array_equal(moe[f"experts_{leaf}"][entry, e], matrix.T)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), r"1 missing.*layers\.2\.mlp\.experts\.5\.up"),
        (lambda t: t.pop("model.layers.0.mlp.gate.weight"), r"1 missing.*layers\.0\.mlp\.gate\.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.8.up_proj.weight": np.zeros((32, 64), np.float32)}),
            r"1 extra.*layers\.0\.mlp\.experts\.8\.up_proj",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.3.down_proj.weight": np.zeros((64, 31), np.float32)}),
            r"1 misshapen.*experts\.3\.down_proj.*expected \(64, 32\), found \(64, 31\)",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(change: Any, says: str, tmp_path: Path) -> None:
    tensors = cases.tensors(CASE)
    change(tensors)
    with pytest.raises(BadRequestError, match=says):
        load(write_hf(tmp_path / "m", cases.CASES[CASE], tensors))


def test_the_number_of_experts_has_two_spellings() -> None:
    keys = dict(cases.CASES[CASE])
    expected = config_from_hf(keys, "config.json")
    keys["num_local_experts"] = keys.pop("num_experts")
    assert config_from_hf(keys, "config.json") == expected


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"norm_topk_prob": None}, BadRequestError, "'norm_topk_prob' is missing"),
        ({"num_experts": None}, BadRequestError, "'num_local_experts' is missing"),
        ({"num_experts_per_tok": 9}, BadRequestError, "num_experts_per_tok is 9; it must be num_experts 8 or less"),
        ({"decoder_sparse_step": 0}, BadRequestError, "decoder_sparse_step is 0"),
        ({"mlp_only_layers": [3]}, BadRequestError, r"mlp_only_layers is \[3\]; it must list layers in 0\.\.2"),
        ({"attention_bias": True}, UnsupportedError, "attention_bias is True"),
        ({"use_sliding_window": True, "sliding_window": 8}, UnsupportedError, "sliding_window"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changes: dict[str, Any], error: type, says: str) -> None:
    keys = {name: value for name, value in (cases.CASES[CASE] | changes).items() if value is not None}
    with pytest.raises(error, match=says):
        config_from_hf(keys, "config.json")
