"""Does `jax_client estimate` answer for people and for programs, and say what --compile lacks?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from support.golden_cases import CASES


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A model directory without weights."""
    (tmp_path / "config.json").write_text(json.dumps(CASES["qwen3_tied"]))
    return tmp_path


SIZES = ("--length", 64, "--sample", "8x64")


def test_estimate_answers_without_weights(cli: Any, config_only: Path) -> None:
    done = cli("estimate", config_only, "--on", "v5e-1", *SIZES, "--json")
    (said,) = json.loads(done.out)
    assert done.code == 0 and said["fits"] and said["memory_bytes"]["weights"] > 0 and said["compiled"] == []
    done = cli("estimate", config_only, "--on", "v5e-1", *SIZES)
    assert done.code == 0 and "splash" in done.out and "yes, beside the cache" in done.out
    assert cli("estimate", config_only, "--on", "v9-1").code == 2


def test_a_model_that_does_not_fit_fails_with_what_would_help(cli: Any, config_only: Path) -> None:
    large = CASES["qwen3_tied"] | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    (config_only / "config.json").write_text(json.dumps(large))
    done = cli("estimate", config_only, "--on", "v5e-1", *SIZES)
    assert done.code == 1 and "the weights alone are" in done.out and "times as many devices" in done.out


def test_a_quantised_release_is_estimated_as_its_plain_numbers(cli: Any, config_only: Path) -> None:
    plain = cli("estimate", config_only, "--on", "v5e-1", *SIZES, "--json")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (config_only / "config.json").write_text(json.dumps(CASES["qwen3_tied"] | {"quantization_config": fp8}))
    assert cli("estimate", config_only, "--on", "v5e-1", *SIZES, "--json").out == plain.out
    gptq = {"quant_method": "gptq", "bits": 4}
    (config_only / "config.json").write_text(json.dumps(CASES["qwen3_tied"] | {"quantization_config": gptq}))
    done = cli("estimate", config_only, "--on", "v5e-1", *SIZES)
    assert done.code == 1 and "'gptq'" in done.err and "unquantised release" in done.err


def test_compile_says_what_it_needs(cli: Any, config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = cli("estimate", config_only, "--on", "v5e-1", *SIZES, "--compile")
    assert done.code == 1 and "pip install 'jax_client[aot]'" in done.err
    done = cli("estimate", config_only, "--on", "v5e-3", *SIZES, "--compile")
    assert done.code == 1 and "v5e-4" in done.err


def test_model_list_says_what_fits(cli: Any) -> None:
    done = cli("model", "list", "--on", "v5e-1", "--json")
    assert done.code == 0
    assert all(entry["fits"] for entry in json.loads(done.out) if entry["model"].endswith("SmolLM2-135M-Instruct"))
