"""Is the text model of a model with a vision tower read, trained and exported as one that has text alone is?"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_client.config import EngineConfig
from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import Rope
from jax_client.models.families.registry import config_from_hf
from jax_client.weights.read.hf import open_weights
from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from support.families import cases, towers
from support.weight_files import write_hf
from support.weights.exports import directory
from support.weights.loading import assert_same, load

QWEN, GEMMA = "qwen3_vl_moe", "gemma3_vision"
CLOSE = {"rtol": 0, "atol": 1e-4}


def engine_of(path: Path) -> Engine:
    return Engine(resolve(str(path)), EngineConfig(dtype="float32", compilation_cache_dir="", precompile=False))


@pytest.mark.torch
@pytest.mark.parametrize("case", towers.CASES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_text_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    # transformers' chunks of a gated delta rule are 1e-4 to 4e-4 from its own token by token.
    close = CLOSE | ({"atol": 1e-3} if "qwen3_5" in case else {})
    path, state = towers.write_whole(tmp_path / "m", case), towers.state(case)
    engine = engine_of(path)
    lane, base = engine.open_lane(), towers.torch_model(path, case)
    before = engine.logits(lane, towers.tokens(), None).result()
    after = engine.logits(lane, towers.tokens(), state).result()
    np.testing.assert_allclose(before, towers.torch_logits(base), **close)
    assert np.abs(after - before).max() > 0.3
    merged, adapter = directory(tmp_path, "merged"), directory(tmp_path, "adapter")
    write_merged(merged, engine.source, engine.model, state, dtype="float32", shard_bytes=100_000)
    np.testing.assert_allclose(towers.torch_logits(towers.torch_model(merged, case)), after, **close)
    write_adapter(adapter, state, engine.model, str(path), "peft")
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    np.testing.assert_allclose(towers.torch_logits(adapted), after, **close)
    engine.close()


@pytest.mark.parametrize(("case", "form"), [(QWEN, 0), (GEMMA, 0), (GEMMA, 1)])
def test_a_merged_model_has_the_names_of_the_files_and_the_other_towers(case: str, form: int, tmp_path: Path) -> None:
    path, out = towers.write(tmp_path / "m", case, form), directory(tmp_path)
    c, spec = towers.model_config(case), replace(towers.SPEC, train_unembed=False)
    weights = {n: a for n, a in towers.state(case).weights.items() if not n.startswith("unembed")}
    state = replace(towers.state(case), spec=spec, weights=weights)
    write_merged(out, resolve(str(path)), c, state, dtype="bfloat16", shard_bytes=100_000)
    written: dict[str, np.ndarray] = {}
    for file in out.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == (towers.stored(case, form) | towers.others(case)).keys()
    for name, x in towers.others(case).items():
        assert written[name].dtype == x.dtype
        np.testing.assert_array_equal(written[name], x)
    layers, _ = towers.tower(case).stored[form]
    q = f"{layers}layers.1.self_attn.q_proj.weight"
    a, b = (weights[f"q.{ab}"][1].reshape(4, -1) for ab in "AB")
    np.testing.assert_allclose(written[q].astype(np.float32), towers.stored(case, form)[q] + 8 * b.T @ a, rtol=0.01)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_untied_head_has_its_name_in_older_files(tmp_path: Path) -> None:
    path, out = towers.write(tmp_path / "m", GEMMA, 1), directory(tmp_path)
    write_merged(out, resolve(str(path)), towers.model_config(GEMMA), towers.state(GEMMA), dtype="float32")
    assert "language_model.lm_head.weight" in load_file(out / "model.safetensors")
    assert config_from_hf(json.loads((out / "config.json").read_text()), "config.json").tied_embeddings is False
    assert set(load(out)) == {"embed_VD", "final_norm_D", "unembed_VD", "layers"}


def test_both_forms_of_names_give_the_same_arrays(tmp_path: Path) -> None:
    newer, older = (load(towers.write(tmp_path / str(form), GEMMA, form)) for form in (0, 1))
    assert_same(newer, older)
    text = cases.CASES["gemma3"] | towers.CASES[GEMMA]["text_config"]
    text = {name: value for name, value in text.items() if name not in ("layer_types", "rope_parameters")}
    assert_same(newer, load(write_hf(tmp_path / "text", text, towers.text(GEMMA))))


def test_experts_have_the_input_first_and_gate_beside_up(tmp_path: Path) -> None:
    moe = load(towers.write(tmp_path / "m", QWEN))["layers"]["moe"]
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts."
        gate_up = towers.text(QWEN)[experts + "gate_up_proj"]
        assert gate_up.shape == (8, 64, 2 * 24)
        np.testing.assert_array_equal(moe["experts_gate_LEDF"][layer], gate_up[:, :, :24])
        np.testing.assert_array_equal(moe["experts_up_LEDF"][layer], gate_up[:, :, 24:])
        np.testing.assert_array_equal(moe["experts_down_LEFD"][layer], towers.text(QWEN)[experts + "down_proj"])


@pytest.mark.parametrize("case", towers.CASES)
def test_an_adapter_has_the_modules_of_the_tower_and_comes_back(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, c = directory(tmp_path), towers.model_config(case)
    write_adapter(out, towers.state(case), c, "base", "peft")
    names = load_file(out / WEIGHTS)
    heads = {name for name in names if ".lm_head." in name}
    assert len(heads) == 2
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names.keys() - heads)
    # The vision tower has modules of the same names, which are not adapted.
    targets = json.loads((out / CONFIG).read_text())["target_modules"]
    assert all(name.startswith("model.language_model.layers.") or name == "lm_head" for name in targets)
    with caplog.at_level(logging.WARNING):
        back = read_adapter(out, c, open_weights(towers.write(tmp_path / "m", case)))
    assert "zeros" not in caplog.text
    for name, array in towers.state(case).weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def test_what_the_configs_say() -> None:
    qwen, gemma = towers.model_config(QWEN), towers.model_config(GEMMA)
    assert (qwen.rope, qwen.tied_embeddings, qwen.eos_token_ids) == (Rope(theta=5e6), False, (2,))
    assert qwen.experts is not None and qwen.experts.normalized
    assert (gemma.tied_embeddings, gemma.eos_token_ids) == (True, (1, 106))
    assert gemma.windows is not None and gemma.windows.layers == (0, 1, 2, 3, 4, 6)
    release = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 34}}
    assert config_from_hf(release, "config.json").n_heads == 8
    untied = towers.CASES[GEMMA] | {"tie_word_embeddings": False}
    assert config_from_hf(untied, "config.json").tied_embeddings is False
    within = towers.CASES[QWEN]["text_config"] | {"tie_word_embeddings": True}
    outside = {name: value for name, value in towers.CASES[QWEN].items() if name != "tie_word_embeddings"}
    assert config_from_hf(outside | {"text_config": within}, "config.json").tied_embeddings is True


@pytest.mark.parametrize(
    ("case", "changes", "error", "says"),
    [
        (QWEN, {"norm_topk_prob": False}, UnsupportedError, "norm_topk_prob is False"),
        (QWEN, {"num_experts_per_tok": None}, BadRequestError, "'num_experts_per_tok' is missing"),
        (GEMMA, {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping is 30.0"),
        (GEMMA, None, BadRequestError, r"text_config is None; it must be an object"),
        (QWEN, {"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "'awq', which is not loaded"),
    ],
)
def test_configs_that_are_not_computed_are_refused(case: str, changes: Any, error: type, says: str) -> None:
    text = None
    if changes is not None:
        whole = towers.CASES[case]["text_config"] | changes
        text = {name: value for name, value in whole.items() if value is not None}
    with pytest.raises(error, match=says):
        config_from_hf(towers.CASES[case] | {"text_config": text}, "config.json")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.audio.a.weight", r"tensor model\.audio\.a\.weight was not expected: .*model\.language_model\."),
        ("model.layers.0.mlp.gate.weight", r"model\.layers\.0\.mlp\.gate\.weight was not expected"),
        ("model.language_model.layers.9.mlp.gate.weight", r"1 extra.*layers\.9\.mlp\.gate\.weight: not expected"),
    ],
)
def test_tensors_of_no_tower_are_named(name: str, says: str, tmp_path: Path) -> None:
    extra = {name: np.zeros((8, 64), np.float32)}
    with pytest.raises(BadRequestError, match=says):
        load(write_hf(tmp_path / "m", towers.CASES[QWEN], towers.stored(QWEN) | extra))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = towers.stored(QWEN) | towers.others(QWEN)
    del tensors["model.language_model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(BadRequestError, match=r"1 missing, 0 misshapen, 0 extra.*layers\.1\.mlp\.experts\.down_proj"):
        load(write_hf(tmp_path / "m", towers.CASES[QWEN], tensors))
