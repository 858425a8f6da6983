"""Is every directory that is damaged, incomplete or unsafe refused by name?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import resolve
from support.weight_files import HF_CONFIG, hf_tensors, write_hf
from support.weights.loading import assert_same, config, load

pytestmark = pytest.mark.usefixtures("empty_hub_cache")

INDEX = "model.safetensors.index.json"


def test_directory_without_a_model(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFoundError, match=r"looked for config\.json.*empty"):
        resolve(str(empty))
    (empty / "notes.txt").write_text("x")
    with pytest.raises(NotFoundError, match=r"looked for config\.json.*notes\.txt"):
        resolve(str(empty))
    (empty / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(NotFoundError, match=r"looked for model\.safetensors.*notes\.txt"):
        resolve(str(empty))
    (empty / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=r"pickle weights are not loaded.*save_pretrained"):
        resolve(str(empty))


def test_custom_code_is_refused(tmp_path: Path) -> None:
    c = config(auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    path = write_hf(tmp_path / "m", c, hf_tensors(c))
    (path / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match=r"custom code is never executed.*LlamaForCausalLM"):
        resolve(str(path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_config(text: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadRequestError, match=r"config\.json: "):
        resolve(str(path))


def test_eos_ids_of_generation_config_are_joined(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_config(resolve(str(path))).eos_token_ids == (2, 5)


def test_damaged_shard(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for data, words in (
        (whole[:-1], f"describes {len(whole)} bytes, but the file has {len(whole) - 1}"),
        (whole + b"x", f"describes {len(whole)} bytes, but the file has {len(whole) + 1}"),
        (whole[:50], "header would need"),
        (b"", "header would need"),
        (b"\xff" * 8 + whole[8:], "header would need"),
        (whole[:8] + b"x" + whole[9:], "not JSON"),
    ):
        file.write_bytes(data)
        with pytest.raises(BadRequestError, match=rf"model\.safetensors: .*{words}.*delete it and download it again"):
            load(path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    t = hf_tensors(config())
    t["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    path = write_hf(tmp_path / "m", config(), t)
    with pytest.raises(
        BadRequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        load(path)


@pytest.mark.parametrize(
    "entry", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "gone.safetensors"]
)
def test_index_entries_outside_the_directory(entry: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()), n_shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = entry
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=entry):
        resolve(str(path))


@pytest.mark.parametrize("entry", [5, None, ["model-00001-of-00002.safetensors"], {"a": 1}])
def test_index_entries_that_are_no_names(entry: Any, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()), n_shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = entry
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"index\.json: it names the shard .*; a shard is a \.safetensors file"):
        resolve(str(path))


def test_a_directory_in_a_shards_place(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()
    with pytest.raises(BadRequestError, match=r"'model\.safetensors', which is no file"):
        resolve(str(path))


@pytest.mark.parametrize("header", [b'{"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}', b"[" * 100_000])
def test_headers_of_odd_shapes(header: bytes, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadRequestError, match=r"model\.safetensors: (tensor a has an unknown dtype|the header is not)"):
        load(path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()), n_shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"tensor model\.extra should be in"):
        load(path)


def test_link_out_of_the_directory(tmp_path: Path) -> None:
    real = write_hf(tmp_path / "real", config(), hf_tensors(config()))
    path = tmp_path / "linked"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    (path / "model.safetensors").symlink_to(real / "model.safetensors")
    with pytest.raises(BadRequestError, match=r"'model\.safetensors' is a link to .*outside"):
        resolve(str(path))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    t = hf_tensors(config())
    t["model.layers.0.mlp.up_proj.weight"] = np.zeros((95, 32), np.float32)
    t["model.layers.0.surprise.weight"] = np.zeros(3, np.float32)
    del t["model.norm.weight"]
    path = write_hf(tmp_path / "m", config(), t)
    with pytest.raises(BadRequestError) as caught:
        load(path)
    for words in (
        "1 missing, 1 misshapen, 1 extra",
        "model.norm.weight: expected (32,)",
        "expected (96, 32), found (95, 32)",
        "surprise.weight: not expected, found (3,)",
    ):
        assert words in str(caught.value)


def test_first_five_of_many(tmp_path: Path) -> None:
    t = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    with pytest.raises(BadRequestError, match="19 missing") as caught:
        load(write_hf(tmp_path / "m", config(), t))
    assert str(caught.value).count("not there") == 5


def test_ignored_extras(tmp_path: Path) -> None:
    t = hf_tensors(config())
    plain = load(write_hf(tmp_path / "a", config(), t))
    t["lm_head.weight"] = t["model.embed_tokens.weight"].copy()
    t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert_same(load(write_hf(tmp_path / "b", config(), t)), plain)


@pytest.mark.parametrize(("dtype", "name"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8")])
def test_unsupported_dtypes(dtype: Any, name: str, tmp_path: Path) -> None:
    t: dict[str, Any] = hf_tensors(config())
    t["model.layers.0.mlp.up_proj.weight"] = t["model.layers.0.mlp.up_proj.weight"].astype(dtype)
    with pytest.raises(UnsupportedError, match=rf"dtype {name}.*F32, F16, BF16"):
        load(write_hf(tmp_path / "m", config(), t))
