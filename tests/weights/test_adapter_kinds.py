"""Do adapters of each kind that PEFT makes compute here what they compute there, or are they refused by name?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.weights.read.load import open_tensors
from jax_client.weights.read.source import resolve
from jax_client.weights.write.peft import read_adapter
from support.weights.exports import LINEARS, engine_logits, log_softmax, save_peft, torch_logits
from support.weights.exports import probe_tokens as probe

pytestmark = [
    pytest.mark.torch,
    # transformers', about what peft asks of it; peft's, about what a tied output projection means for merging.
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated",
        "ignore:Model has `tie_word_embeddings=True`",
        "ignore:Setting `save_embedding_layers`",
        "ignore:fan_in_fan_out is set to True",
        "ignore:`lora_bias=True` was passed",
        r"ignore:.* LoRA tensor\(s\) have invalid shape",
    ),
]
CLOSE = 1e-5
QV = ["q_proj", "v_proj"]
# The kinds of docs/export.md: (name, case, LoraConfig). The scale of the adapters is that of ones in use.
READ: list[tuple[str, str, dict[str, Any]]] = [
    ("q and v", "llama_tied", {"target_modules": QV}),
    ("peft's choice of modules", "llama_tied", {"target_modules": None}),
    ("one projection", "qwen2_tied", {"target_modules": ["down_proj"]}),
    ("attention", "llama_tied", {"target_modules": LINEARS[:4]}),
    ("all seven", "llama_untied", {"target_modules": LINEARS, "lora_alpha": 32}),
    ("all-linear", "llama_untied", {"target_modules": "all-linear"}),
    ("a pattern", "qwen3_untied", {"target_modules": r".*\.(self_attn|mlp)\.(q|down)_proj"}),
    ("whole names", "llama_tied", {"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]}),
    ("exclude_modules", "llama_untied", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    ("layers_to_transform", "llama_tied", {"target_modules": QV, "layers_to_transform": [1]}),
    ("layers_pattern", "llama_tied", {"target_modules": QV, "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("lm_head", "llama_untied", {"target_modules": [*QV, "lm_head"]}),
    ("a tied lm_head", "llama_tied", {"target_modules": [*LINEARS, "lm_head"]}),
    ("lora_alpha", "llama_untied", {"target_modules": LINEARS, "lora_alpha": 7}),
    ("use_rslora", "llama_tied", {"target_modules": QV, "use_rslora": True}),
    ("rank_pattern", "llama_tied", {"target_modules": LINEARS, "rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 12}}),
    ("alpha_pattern", "qwen3_untied", {"target_modules": LINEARS, "alpha_pattern": {"^model.layers.0.mlp.up_proj": 9}}),
    (
        "both patterns, as regular expressions, with use_rslora",
        "llama_untied",
        {
            "target_modules": LINEARS,
            "rank_pattern": {r"model\.layers\.[01]\.self_attn\.(k|v)_proj": 3},
            "alpha_pattern": {r".*\.mlp\..*": 5},
            "use_rslora": True,
        },
    ),
    ("lora_dropout", "llama_tied", {"target_modules": QV, "lora_dropout": 0.1}),
    ("bias where there is none", "llama_untied", {"target_modules": LINEARS, "bias": "all"}),
    ("fan_in_fan_out", "llama_tied", {"target_modules": QV, "fan_in_fan_out": True}),
    ("another initialisation", "llama_tied", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    ("MiCA", "llama_tied", {"target_modules": QV, "init_lora_weights": "mica"}),
    ("VeLoRA", "llama_tied", {"target_modules": QV, "velora_config": {}}),
]  # fmt: skip
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("DoRA", "llama_tied", {"target_modules": QV, "use_dora": True}, "use_dora is True"),
    ("biases", "qwen2_tied", {"target_modules": QV, "bias": "all"}, "biases .*bias is 'all'"),
    ("biases of the layers", "qwen2_tied", {"target_modules": QV, "bias": "lora_only"}, "bias is 'lora_only'"),
    ("lora_bias", "qwen2_tied", {"target_modules": QV, "lora_bias": True}, "lora_bias is True"),
    ("whole modules", "llama_untied", {"target_modules": QV, "modules_to_save": ["lm_head"]}, r"modules_to_save is \["),
    ("tokens", "llama_untied", {"target_modules": QV, "trainable_token_indices": [1]}, "trainable_token_indices is"),
    ("the embedding", "llama_untied", {"target_modules": [*QV, "embed_tokens"]}, "an adapter on the embedding"),
    ("replicated layers", "llama_tied", {"target_modules": QV, "layer_replication": [[0, 2], [1, 2]]}, "layer_replic"),
    ("aLoRA", "llama_tied", {"target_modules": QV, "alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1"),
    ("parameters", "llama_tied", {"target_modules": [], "target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
     "target_parameters is"),
    ("PiSSA", "llama_tied", {"target_modules": QV, "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ("OLoRA", "llama_tied", {"target_modules": QV, "init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ("QA-LoRA", "llama_tied", {"target_modules": QV, "use_qalora": True}, "use_qalora is True"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "settings"), [k[1:] for k in READ], ids=[k[0] for k in READ])
def test_an_adapter_that_peft_made_computes_the_same(
    case: str, settings: dict[str, Any], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    model = save_peft(engine.source.path, tmp_path / "adapter", **settings)
    state = read_adapter(tmp_path / "adapter", engine.model, open_tensors(engine.source))
    tokens = probe(engine.source, engine.model)
    found, expected = log_softmax(engine_logits(engine, state)), log_softmax(torch_logits(model, tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    assert np.abs(found - log_softmax(engine_logits(engine, None))).max() > 1000 * CLOSE


@pytest.mark.parametrize(("case", "settings", "message"), [k[1:] for k in REFUSED], ids=[k[0] for k in REFUSED])
def test_an_adapter_that_is_more_than_lora_is_refused_with_the_way_out(
    case: str, settings: dict[str, Any], message: str, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    save_peft(engine.source.path, tmp_path / "adapter", **settings)
    with pytest.raises(UnsupportedError, match=f"{message}.*(merge_and_unload|train a LoRA adapter without it)"):
        read_adapter(tmp_path / "adapter", engine.model, open_tensors(engine.source))


def test_the_command_that_a_refusal_names_gives_a_model_that_computes_the_same(
    engine_of: Callable[[str], Engine], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine, adapter = engine_of("qwen2_tied"), tmp_path / "adapter"
    model = save_peft(engine.source.path, adapter, target_modules=QV, bias="all", use_dora=True)
    with pytest.raises(UnsupportedError, match="use_dora is True") as caught:
        read_adapter(adapter, engine.model)
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    exec(command, {})
    merged = open_engine_of(tmp_path / "adapter-merged")
    expected = torch_logits(model, probe(engine.source, engine.model))
    np.testing.assert_allclose(engine_logits(merged, None), expected, rtol=0, atol=1e-4)
    merged.close()


def open_engine_of(path: Path) -> Engine:
    from jax_client.config import EngineConfig

    settings: dict[str, Any] = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False}
    return Engine(resolve(str(path)), EngineConfig(**settings))


def test_copies_of_the_base_model_are_compared_with_it(
    engine_of: Callable[[str], Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.numpy import load_file, save_file

    engine, adapter = engine_of("llama_untied"), tmp_path / "adapter"
    save_peft(engine.source.path, adapter, target_modules=[*QV, "lm_head"], save_embedding_layers=True)
    base, file = open_tensors(engine.source), adapter / "adapter_model.safetensors"
    copies = [name for name in load_file(file) if ".lora_" not in name]
    assert copies == ["base_model.model.lm_head.base_layer.weight"]
    read_adapter(adapter, engine.model, base)
    assert "quantised" not in caplog.text
    quantised = {name: replace(info, dtype="Q8_0") for name, info in base.tensors.items()}
    monkeypatch.setattr(base, "tensors", quantised)
    read_adapter(adapter, engine.model, base)
    assert "because the base model is quantised (Q8_0)" in caplog.text
    monkeypatch.undo()
    for change, message in ((lambda t: t + 1e-3, "is not the base model's lm_head.weight"), (lambda t: t[1:], "shape")):
        tensors = load_file(file)
        tensors[copies[0]] = change(tensors[copies[0]])
        (tmp_path / "other").mkdir()
        shutil.copy(adapter / "adapter_config.json", tmp_path / "other")
        save_file(tensors, tmp_path / "other" / file.name)
        with pytest.raises(UnsupportedError, match=message):
            read_adapter(tmp_path / "other", engine.model, base)
        shutil.rmtree(tmp_path / "other")


def test_a_pickled_adapter_is_read_after_the_named_conversion(
    engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    engine, adapter = engine_of("llama_tied"), tmp_path / "adapter"
    save_peft(engine.source.path, adapter, target_modules=QV)
    expected = read_adapter(adapter, engine.model).weights
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin: pickled weights are not loaded") as caught:
        read_adapter(adapter, engine.model)
    exec(str(caught.value).split('python -c "')[1].split('"')[0], {})
    for name, array in read_adapter(adapter, engine.model).weights.items():
        np.testing.assert_array_equal(array, expected[name])


def test_fields_that_peft_does_not_know_are_said_or_refused(
    engine_of: Callable[[str], Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, adapter = engine_of("llama_tied"), tmp_path / "adapter"
    save_peft(engine.source.path, adapter, target_modules=QV, lora_alpha=32)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"unsloth_fixed": True, "trained_by": {"name": "me"}, "empty": None}))
    read_adapter(adapter, engine.model)
    assert "does not know the fields 'unsloth_fixed', 'trained_by'; they are not read" in caplog.messages[-1]
    for changes in (
        {"peft_version": "0.22.0", "new_kind": 1},
        {"peft_version": "1.0.0.dev0", "x": "y"},
        {"use_mora": 1},
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UnsupportedError, match=f"{list(changes)[-1]} is .*, a field that peft 0.21 does not know"):
            read_adapter(adapter, engine.model)
    path.write_text(json.dumps(config | {"rank_pattern": {"(a+)+q_proj": 8}}))
    with pytest.raises(UnsupportedError, match=r"rank_pattern\['\(a\+\)\+q_proj'\] is the pattern .* repeated groups"):
        read_adapter(adapter, engine.model)
    path.write_text(json.dumps(config | {"alpha_pattern": {"(q_proj": 8}}))
    with pytest.raises(BadRequestError, match="which is no regular expression"):
        read_adapter(adapter, engine.model)
