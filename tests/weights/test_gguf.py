"""Does a GGUF file read as the same model in Hugging Face layout, and is a damaged or foreign one refused by name?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, UnsupportedError
from jax_client.weights.read.gguf import GgufReader, read_gguf
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import ModelSource, resolve
from support.weight_files import hf_tensors, tokenizer_metadata, write_gguf, write_hf
from support.weights.loading import assert_same, config, load

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("llama-untied", "llama"), ("qwen2", "qwen2"),
                                              ("qwen3", "qwen3")])  # fmt: skip
def test_gguf_equals_hf(family: str, arch: str, tmp_path: Path) -> None:
    c = config(family)
    t = hf_tensors(c)
    gguf, hf = write_gguf(tmp_path / "m.gguf", c, t, arch), write_hf(tmp_path / "m", c, t)
    assert read_config(resolve(str(gguf))) == read_config(resolve(str(hf)))
    assert_same(load(gguf), load(hf))


@pytest.mark.parametrize(("quantization", "error"), [("F16", 1e-2), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_1", 0.3)])
def test_gguf_types_are_dequantised(quantization: str, error: float, tmp_path: Path) -> None:
    t = hf_tensors(config())
    params = load(write_gguf(tmp_path / "m.gguf", config(), t, quantization=quantization))
    assert 0 < np.abs(params["embed_VD"] - t["model.embed_tokens.weight"]).max() < error


def test_gguf_damage_is_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config())).read_bytes()
    cases = {
        "truncated": (whole[:-100], "bytes, but the file has"),
        "header only": (whole[:300], "the header needs at least"),
        "trailing": (whole + bytes(64), "bytes, but the file has"),
        "version": (whole[:4] + b"\x01" + whole[5:], "GGUF version 1"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(BadRequestError, match=words):
            load(path)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(NotFoundError, match=r"expected a GGUF file.*b'not '"):
        resolve(str(tmp_path / "text.gguf"))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata=tokenizer_metadata()).read_bytes()
    rng = np.random.default_rng(0)
    header = read_gguf(tmp_path / "m.gguf").data_start
    path, refused = tmp_path / "x.gguf", 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(4, header)] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_config(ModelSource(name="x", path=path, kind="gguf"))
            GgufReader(read_gguf(path))
        except JaxClientError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(("key", "value"), [("llama.rope.scaling.type", "yarn"), ("llama.expert_count", 8),
                                            ("llama.rope.dimension_count", 8)])  # fmt: skip
def test_gguf_features_that_are_not_computed(key: str, value: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata={key: value})
    with pytest.raises(UnsupportedError, match=f"{key} is {value!r}"):
        read_config(resolve(str(path)))


def test_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), arch="gemma3")
    with pytest.raises(UnsupportedError, match=r"'gemma3'.*llama, qwen2, qwen3"):
        read_config(resolve(str(path)))
