"""Which adapters of other programs are read, and is every other one refused by name?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.weights.write.peft import read_adapter, write_adapter
from support.golden_engine import SPEC
from support.weights.exports import LINEARS, random_state

Change = Callable[[Path, dict[str, Any], dict[str, np.ndarray]], None]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def setting(**fields: Any) -> Change:
    return lambda path, config, tensors: config.update(fields)


def tensors_of(pattern: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    """Change, or for None remove, every tensor whose name has the pattern in it."""

    def apply(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if pattern in n]:
            new = change(tensors.pop(name))
            if new is not None:
                tensors[name] = new

    return apply


def extra(name: str, shape: tuple[int, ...]) -> Change:
    return lambda path, config, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def only(*projections: str) -> Change:
    def apply(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config["target_modules"] = list(projections)
        for name in [n for n in tensors if not any(p in n for p in projections)]:
            del tensors[name]

    return apply


REFUSED: list[tuple[Change, type[Exception], str]] = [
    (setting(peft_type="IA3"), UnsupportedError, "peft_type is 'IA3'"),
    (setting(task_type="SEQ_CLS"), UnsupportedError, "task_type is 'SEQ_CLS'"),
    (setting(use_dora=True), UnsupportedError, "use_dora is True"),
    (setting(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save is"),
    (setting(layer_replication=[[0, 1]]), UnsupportedError, "layer_replication is"),
    (setting(lora_bias=True), UnsupportedError, "lora_bias is True"),
    (setting(trainable_token_indices=[1]), UnsupportedError, "trainable_token_indices is"),
    (setting(init_lora_weights="pissa"), UnsupportedError, "init_lora_weights is 'pissa'"),
    (setting(use_dora=True, lora_bias=True), UnsupportedError, r"use_dora is True \(and lora_bias\)|\(and use_dora\)"),
    (setting(r=0), BadRequestError, r"r is 0; expected an integer in 1\.\.512"),
    (setting(r="4"), BadRequestError, "r is '4'"),
    (setting(lora_alpha=float("nan")), BadRequestError, "lora_alpha is nan"),
    (setting(lora_alpha=0), BadRequestError, "lora_alpha is 0"),
    (setting(alpha_pattern={"q_proj": -1}), BadRequestError, r"alpha_pattern\['q_proj'\] is -1"),
    (setting(target_modules=[1]), BadRequestError, r"target_modules is \[1\]"),
    (setting(target_modules=LINEARS), BadRequestError, "target_modules.*2 extra, .*lm_head"),
    (setting(rank_pattern={"q_proj": 2}), BadRequestError, r"rank_pattern\): 0 missing, 4 misshapen"),
    (setting(rank_pattern={"q_proj": 513}), BadRequestError, r"rank_pattern\['q_proj'\] is 513; .* 1\.\.512"),
    (setting(rank_pattern=["q_proj"]), BadRequestError, "rank_pattern is"),
    (setting(layers_to_transform=[0]), BadRequestError, "14 extra"),
    (setting(layers_to_transform="0"), BadRequestError, "layers_to_transform is '0'"),
    (setting(peft_type="PREFIX_TUNING"), UnsupportedError, "'PREFIX_TUNING', .* Train a LoRA adapter"),
    (setting(r=8), BadRequestError, r"0 missing, 32|\d+ misshapen"),
    (only("nothing"), BadRequestError, "none of its 0 tensors"),
    (tensors_of("layers.1", lambda t: None), BadRequestError, "14 missing, 0 misshapen, 0 extra"),
    (tensors_of("lora_A", lambda t: t.T.copy()), BadRequestError, "0 missing, 15 misshapen"),
    (tensors_of(Q, lambda t: t * np.nan), BadRequestError, f"1 not finite. First: {Q}"),
    (tensors_of(Q, lambda t: t.astype(np.int32)), UnsupportedError, "has dtype I32"),
    (tensors_of(Q, lambda t: t.astype(np.float64)), UnsupportedError, "has dtype F64"),
    (
        extra("base_model.model.model.embed_tokens.lora_embedding_A", (4, 64)),
        UnsupportedError,
        "an adapter on the embedding",
    ),
    (extra(Q.replace("lora_A", "lora_A.default"), (4, 32)), BadRequestError, "1 extra"),
    (extra("base_model.model.lm_head.base_layer.weight", (65, 32)), UnsupportedError, r"has the shape \(65, 32\)"),
]


@pytest.fixture(scope="module")
def adapter_files(engine_of: Callable[[str], Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine, path = engine_of("llama_untied"), tmp_path_factory.mktemp("adapter")
    write_adapter(path, random_state(engine, SPEC), engine.model, "tiny")
    return path


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_other_adapters_are_refused_by_name(
    change: Change,
    error: type[Exception],
    message: str,
    adapter_files: Path,
    engine_of: Callable[[str], Engine],
    tmp_path: Path,
) -> None:
    config = json.loads((adapter_files / "adapter_config.json").read_text())
    tensors = load_file(adapter_files / "adapter_model.safetensors")
    change(tmp_path, config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error, match=message) as caught:
        read_adapter(tmp_path, engine_of("llama_untied").model)
    assert type(caught.value) is error


def test_files_that_are_missing_damaged_or_pickled(
    adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    model = engine_of("llama_untied").model
    with pytest.raises(NotFoundError, match=r"looked for adapter_config\.json"):
        read_adapter(tmp_path, model)
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(BadRequestError, match="not valid JSON"):
        read_adapter(tmp_path, model)
    shutil.copy(adapter_files / config.name, config)
    with pytest.raises(NotFoundError, match=r"looked for adapter_model\.safetensors"):
        read_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="pickled weights are not loaded"):
        read_adapter(tmp_path, model)
    raw = (adapter_files / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw[:-1])
    with pytest.raises(BadRequestError, match="The file is damaged"):
        read_adapter(tmp_path, model)


def test_another_alpha_is_scaled_into_b_and_said(
    adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = engine_of("llama_untied").model, json.loads((adapter_files / "adapter_config.json").read_text())
    shutil.copy(adapter_files / "adapter_model.safetensors", tmp_path)
    changes = {"lora_alpha": 16, "alpha_pattern": {"k_proj": 32}, "lora_dropout": 0.05}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    expected = read_adapter(adapter_files, model).weights
    assert caplog.messages == []
    for name, array in read_adapter(tmp_path, model).weights.items():
        np.testing.assert_array_equal(array, expected[name] * (0.5 if name.endswith("B") and name != "k.B" else 1))
    assert ["multiplied by 0.5," in caplog.messages[0], "lora_dropout 0.05" in caplog.messages[1]] == [True, True]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_adapters_are_read(
    dtype: Any, adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    model = engine_of("llama_untied").model
    shutil.copy(adapter_files / "adapter_config.json", tmp_path)
    halves = {n: t.astype(dtype) for n, t in load_file(adapter_files / "adapter_model.safetensors").items()}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    found, expected = read_adapter(tmp_path, model).weights, read_adapter(adapter_files, model).weights
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array.astype(dtype).astype(np.float32))
