"""Are exports exact, and is one that is damaged, foreign or too large for the disk refused?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, RequestFailedError, UnsupportedError
from jax_client.runs.lifecycle.export_check import check_export
from jax_client.weights.read.gguf import GgufReader, read_gguf
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import resolve
from jax_client.weights.write import shards
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import write_adapter
from support.golden_cases import CASES, base_values
from support.golden_engine import SPEC
from support.weight_files import HF_CONFIG, hf_tensors, write_gguf, write_hf
from support.weights.exports import directory, random_state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_model_is_rewritten_exactly(dtype: Any, tmp_path: Path) -> None:
    config = HF_CONFIG | {"torch_dtype": "float16", "transformers_version": "4.0"}
    tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in hf_tensors(config).items()}
    source = resolve(str(write_hf(tmp_path / "m", config, tensors, n_shards=2)))
    (source.path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (source.path / "tokenizer.json").write_text("{}")
    (source.path / "modeling.py").write_text("")
    out = directory(tmp_path)
    write_merged(out, source, read_config(source), None, dtype=dtype)
    found = load_file(out / "model.safetensors")
    assert {t.dtype.name for t in found.values()} == {dtype}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.astype(np.float32))
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": dtype, "torch_dtype": dtype}
    assert read_config(resolve(str(out))) == read_config(source)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_a_gguf_is_rewritten_exactly(tmp_path: Path) -> None:
    tensors = hf_tensors(HF_CONFIG)
    source = resolve(str(write_gguf(tmp_path / "m.gguf", HF_CONFIG, tensors, quantization="Q8_0")))
    out = directory(tmp_path)
    write_merged(out, source, read_config(source), None, dtype="float32")
    reader = GgufReader(read_gguf(source.path))
    for name, tensor in load_file(out / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, reader.read(name))
    assert replace(read_config(resolve(str(out))), family="") == replace(read_config(source), family="")


def test_bfloat16_stays_within_its_tolerance(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("llama_untied")
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state)
    check = check_export(engine, state, out, "key")
    assert 1e-4 < check.difference < check.tolerance / 2
    assert engine.monitor.usage()["owner_seconds"]["key"] > 0, "who exports pays for the check"
    with pytest.raises(RequestFailedError, match="computes something else"):
        check_export(engine, None, out)


@pytest.mark.parametrize(("size", "kept"), [(0.1, True), (0.01, False)])
def test_an_adapter_that_bfloat16_rounds_away_is_said(
    size: float,
    kept: bool,
    engine_of: Callable[[str], Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of("llama_untied")
    base = {n: t.astype(ml_dtypes.bfloat16) for n, t in base_values(CASES["llama_untied"]).items()}
    source = resolve(str(write_hf(tmp_path / "m", CASES["llama_untied"], base)))
    state = random_state(engine, SPEC)
    state = replace(state, weights={n: a * size for n, a in state.weights.items()})
    for dtype in ("float32", "bfloat16"):
        assert caplog.messages == []
        write_merged(directory(tmp_path, dtype), source, engine.model, state, dtype=dtype)
    assert [message[:14] for message in caplog.messages] == ([] if kept else ["bfloat16 keeps"])


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("damage", ["value", "truncated"])
def test_a_damaged_export_is_found(form: str, damage: str, engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("qwen2_untied")
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    if form == "peft":
        write_adapter(out, state, engine.model, "tiny")
    else:
        write_merged(out, engine.source, engine.model, state)
    check_export(engine, state, out)
    (file,) = out.glob("*.safetensors")
    if damage == "value":
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1.self_attn.v_proj" in n and n.endswith("weight"))
        tensors[name] = tensors[name] * np.array(-1, tensors[name].dtype)
        save_file(tensors, file)
    else:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(RequestFailedError, match="export") as caught:
        check_export(engine, state, out)
    assert "export again" in str(caught.value)


def test_a_full_disk_is_said_before_anything_is_written(
    engine_of: Callable[[str], Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("llama_untied")
    state, out = random_state(engine, SPEC), directory(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    for write in (
        lambda: write_adapter(out, state, engine.model, "tiny"),
        lambda: write_merged(out, engine.source, engine.model, state),
    ):
        with pytest.raises(RequestFailedError, match=r"needs [\d,]+ bytes, but 1,000 are free"):
            write()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, r"vLLM and SGLang refuse .*\(--format merged\).* --for peft\."),
        ("vllm", r"vLLM refuse .*\(--format merged\).* train_unembed=False"),
        ("sglang", r"SGLang refuse .*\(--format merged\)"),
    ],
)
def test_an_adapter_on_a_tied_head_is_for_peft_alone(
    program: Any, message: str, engine_of: Callable[[str], Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of("llama_tied")
    state, out = random_state(engine, SPEC), directory(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        write_adapter(out, state, engine.model, "tiny", program)
    assert list(out.iterdir()) == []
    write_adapter(out, state, engine.model, "tiny", "peft")
    assert "merge_and_unload changes the embedding too" in caplog.text
    assert check_export(engine, state, out).difference == 0
    # Without the output projection it is like any other.
    write_adapter(
        directory(tmp_path, "other"),
        random_state(engine, replace(SPEC, train_unembed=False)),
        engine.model,
        "m",
        program,
    )


def test_an_adapter_of_another_model_is_refused(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    state = random_state(engine_of("llama_untied"), SPEC)
    other = engine_of("qwen3_untied")
    for write in (
        lambda: write_adapter(tmp_path, state, other.model, "tiny"),
        lambda: write_merged(tmp_path, other.source, other.model, state),
    ):
        with pytest.raises(BadRequestError, match=r"4 arrays differ, k.B: \(2, 4, 2, 8\) instead of \(2, 4, 2, 12\)"):
            write()
