"""Is an exported adapter of a gated delta rule the adapter, in each layout, and is what it cannot hold refused?

Qwen3-Next has the rows of q, k, v and z by turns, one key head after the other: the same weights, ordered anew by code
of the test's own, must compute what they compute in a Qwen3.5.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.config import EngineConfig
from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, RequestFailedError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.models.families import registry
from jax_client.models.families.family import Family, Files
from jax_client.models.families.qwen.qwen3_5 import hybrid_fields
from jax_client.runs.lifecycle.export_check import check_export
from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import CONFIG, WEIGHTS, Program, read_adapter, write_adapter
from support.families import cases
from support.families.exports import expected_logits, logits, state
from support.golden_cases import RANK
from support.weight_files import write_hf
from support.weights.exports import directory

CASE = "qwen3_5"
LAYER = "base_model.model.model.layers.1.linear_attn."
NEXT = {name: value for name, value in cases.CASES[CASE].items() if name != "rope_parameters"} | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "mlp_only_layers": [0, 1, 2, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}


def by_head(tensors: dict[str, np.ndarray], names: str, rows: tuple[int, ...]) -> np.ndarray:
    """Return the rows of matrices by turns: of each of two key heads, so many of each."""
    of = zip(names, rows, strict=True)
    return np.concatenate([x for pair in zip(*([tensors[n][:r], tensors[n][r:]] for n, r in of), strict=True)
                           for x in pair])  # fmt: skip


def next_tensors() -> dict[str, np.ndarray]:
    """Return the weights of the case under Qwen3-Next's names, in its order."""
    found = dict(cases.tensors(CASE))
    for layer in range(3):
        prefix = f"model.layers.{layer}.linear_attn.in_proj_"
        of = {name: found.pop(f"{prefix}{name}.weight") for name in ("qkv", "z", "b", "a")}
        of |= {"q": of["qkv"][:32], "k": of["qkv"][32:64], "v": of["qkv"][64:]}
        found[f"{prefix}qkvz.weight"] = by_head(of, "qkvz", (16, 16, 48, 48))
        found[f"{prefix}ba.weight"] = by_head(of, "ba", (2, 2))
    return found


@pytest.fixture
def next_config(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Return a model that has its matrices by head, of a family that there is for this test alone."""
    family = Family(
        name="by_head",
        architectures=("Qwen3NextForCausalLM",),
        gguf=None,
        read=lambda hf, where: ModelConfig(family="by_head", **hybrid_fields(hf, where)),
        files=Files(added_to_one=True, delta="by head"),
    )
    monkeypatch.setitem(registry.FAMILIES, family.name, family)
    monkeypatch.setitem(registry.SUPPORTED_ARCHITECTURES, "Qwen3NextForCausalLM", family)
    return registry.config_from_hf(NEXT, "config.json")


def export(path: Path, program: Program | None = None, config: ModelConfig | None = None) -> dict[str, np.ndarray]:
    write_adapter(path, state(CASE), config or cases.model_config(CASE), "base", program)
    return load_file(path / WEIGHTS)


def assert_comes_back(path: Path, config: ModelConfig) -> None:
    back = read_adapter(path, config)
    assert back.weights.keys() == state(CASE).weights.keys()
    for name, array in state(CASE).weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def added(layer: int) -> dict[str, np.ndarray]:
    """Return B A of each product of a layer, (out, in), from the adapter's own arrays."""
    w = state(CASE).weights
    return {name: w[f"delta_{name}.B"][layer].T @ w[f"delta_{name}.A"][layer] for name in "qkvz"}


@pytest.mark.parametrize("program", ["peft", "vllm", None])
def test_the_products_are_one_matrix_of_thrice_the_rank(
    program: Program | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, config = directory(tmp_path), cases.model_config(CASE)
    tensors = export(out, program)
    for layer in range(3):
        a, b = (tensors[f"{LAYER}in_proj_qkv.lora_{ab}.weight".replace(".1.", f".{layer}.")] for ab in "AB")
        assert (a.shape, b.shape) == ((3 * RANK, 64), (160, 3 * RANK))
        np.testing.assert_allclose(b @ a, np.concatenate([added(layer)[name] for name in "qkv"]), atol=1e-6)
    assert not any("in_proj_q." in name for name in tensors)
    settings = json.loads((out / CONFIG).read_text())
    assert settings["rank_pattern"] == {"in_proj_qkv": 3 * RANK}
    assert settings["alpha_pattern"] == {"in_proj_qkv": 96}
    assert "model.layers.1.linear_attn.in_proj_qkv" in settings["target_modules"]
    assert (f"--max-lora-rank must be {3 * RANK} at least" in caplog.text) == (program != "peft")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert_comes_back(out, config)
    assert not caplog.messages


def test_the_products_are_apart_for_sglang(tmp_path: Path) -> None:
    out, config = directory(tmp_path), cases.model_config(CASE)
    tensors = export(out, "sglang")
    for name, product in added(1).items():
        a, b = (tensors[f"{LAYER}in_proj_{name}.lora_{ab}.weight"] for ab in "AB")
        np.testing.assert_allclose(b @ a, product, atol=1e-6)
    assert json.loads((out / CONFIG).read_text())["rank_pattern"] == {}
    assert_comes_back(out, config)


def test_a_query_has_its_gate_behind_it_in_files(tmp_path: Path) -> None:
    tensors, w = export(directory(tmp_path)), state(CASE).weights
    b_OR = tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"]
    for head in range(4):
        for gate in (0, 1):
            rows = b_OR[(2 * head + gate) * 32 : (2 * head + gate + 1) * 32]
            np.testing.assert_array_equal(rows.T, w["q.B"][0, :, head // 2, 2 * gate + head % 2])


@pytest.mark.parametrize("program", ["peft", "sglang"])
def test_a_matrix_by_head_has_the_rows_by_turns(program: Program, next_config: ModelConfig, tmp_path: Path) -> None:
    out = directory(tmp_path)
    tensors = export(out, program, next_config)
    if program == "peft":
        a, b = (tensors[f"{LAYER}in_proj_qkvz.lora_{ab}.weight"] for ab in "AB")
        np.testing.assert_allclose(b @ a, by_head(added(1), "qkvz", (16, 16, 48, 48)), atol=1e-6)
        settings = json.loads((out / CONFIG).read_text())
        assert settings["rank_pattern"] == {"in_proj_qkvz": 4 * RANK}
        assert set(settings["target_modules"]) == {
            "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj", "gate_proj", "up_proj", "down_proj",
            "lm_head",
        }  # fmt: skip
    assert_comes_back(out, next_config)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_exports_of_a_model_by_head_compute_base_and_adapter(next_config: ModelConfig, tmp_path: Path) -> None:
    """For peft without the MLPs, since it takes adapters on all MLPs of a Qwen3-Next for those of experts."""
    peft = pytest.importorskip("peft")
    same = write_hf(tmp_path / "same", cases.CASES[CASE], cases.tensors(CASE))
    base, mlp = cases.torch_model(same, cases.model_config(CASE), "float64"), ("gate.", "up.", "down.")
    expected = expected_logits(base, CASE, state(CASE))
    path = write_hf(tmp_path / "m", NEXT, next_tensors())
    merged, adapter = directory(tmp_path, "merged"), directory(tmp_path, "adapter")
    write_merged(merged, resolve(str(path)), next_config, state(CASE), dtype="float32")
    np.testing.assert_allclose(
        logits(cases.torch_model(merged, next_config, "float64"), CASE), expected, rtol=0, atol=1e-4
    )
    weights = state(CASE).weights
    of_mixing = {name: array for name, array in weights.items() if not name.startswith(mlp)}
    part = replace(state(CASE), spec=replace(cases.SPEC, train_mlp=False), weights=of_mixing)
    expected = expected_logits(base, CASE, replace(part, weights={n: 0 * a for n, a in weights.items()} | of_mixing))
    write_adapter(adapter, part, next_config, str(path), "peft")
    adapted = peft.PeftModel.from_pretrained(cases.torch_model(path, next_config, "float64"), str(adapter)).eval()
    np.testing.assert_allclose(logits(adapted, CASE), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_exports_pass_their_check(dtype: Any, tmp_path: Path) -> None:
    """A merged model in bfloat16 keeps what steers the rule in float32, as the files have it.

    Of its tokens three quarters count: a few are apart by 12 % of the largest logit, and so are both dtypes from each
    other on these tokens.
    """
    stored = cases.tensors(CASE)
    path = write_hf(tmp_path / "m", cases.CASES[CASE], stored | {"mtp.fc.weight": np.ones((2, 3), np.float32)})
    settings: dict[str, Any] = {"dtype": dtype, "compilation_cache_dir": "", "precompile": False}
    engine = Engine(resolve(str(path)), EngineConfig(**settings))
    adapter, merged = directory(tmp_path, "adapter"), directory(tmp_path, "merged")
    export(adapter)
    write_merged(merged, engine.source, engine.model, state(CASE), dtype=dtype)
    if dtype == "float32":
        assert check_export(engine, state(CASE), adapter).difference == 0
    check = check_export(engine, state(CASE), merged)
    assert 0 < check.difference < check.tolerance
    assert check.tokens == (96 if dtype == "float32" else 72)
    kept = np.array([1, 0, 1] if dtype == "float32" else [0, 0, 0], np.float32)[:, None, None]
    wrong = state(CASE).weights | {"delta_v.B": kept * state(CASE).weights["delta_v.B"]}
    with pytest.raises(RequestFailedError, match="computes something else"):
        check_export(engine, replace(state(CASE), weights=wrong), merged)
    engine.close()
    written = load_file(merged / "model.safetensors")
    assert written.keys() == stored.keys() | {"mtp.fc.weight"}
    assert str(written["model.layers.0.linear_attn.conv1d.weight"].dtype) == dtype
    for end in ("A_log", "dt_bias", "norm.weight"):
        name = f"model.layers.0.linear_attn.{end}"
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name], stored[name])


Change = Callable[[dict[str, np.ndarray]], Any]
QKV = f"{LAYER}in_proj_qkv.lora_"


def replaced(letter: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensors: tensors.update({f"{QKV}{letter}.weight": change(tensors[f"{QKV}{letter}.weight"])})


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


REFUSED: list[tuple[Change, type[Exception], str]] = [
    (replaced("B", lambda b: b + 1e-3), UnsupportedError, r"qkv\.lora_B\.weight: in_proj_q, .* share ranks.*Merge it"),
    (replaced("A", lambda a: a[:-1]), UnsupportedError, r"qkv\.lora_A\.weight: .* share ranks, as peft trains"),
    (replaced("A", lambda a: a[:0]), UnsupportedError, r"qkv\.lora_A\.weight: .* share ranks"),
    (replaced("B", lambda b: b[:-1]), BadRequestError, r"qkv\.lora_B\.weight is \(159, 12\); expected .* 160 rows"),
    (replaced("A", lambda a: a[0]), BadRequestError, r"qkv\.lora_A\.weight is \(64,\); expected a matrix"),
    (replaced("A", lambda a: a[:, 1:]), BadRequestError, r"0 missing, 3 misshapen.*in_proj_k\.lora_A.*\(4, 63\)"),
    (replaced("A", lambda a: a * np.nan), BadRequestError, r"3 not finite.*in_proj_k\.lora_A"),
    (replaced("A", lambda a: a.astype(np.int32)), BadRequestError, r"3 missing.*1 extra.*in_proj_k\.lora_A"),
    (without(f"{QKV}A.weight"), BadRequestError, r"3 missing.*in_proj_k\.lora_A\.weight: expected \(4, 64\)"),
    (without(f"{QKV}A.weight", f"{QKV}B.weight"), BadRequestError, r"6 missing.*in_proj_k\.lora_A"),
    (
        lambda tensors: tensors.update({f"{LAYER}in_proj_q.lora_A.weight": np.zeros((4, 64), np.float32)}),
        BadRequestError,
        r"3 extra.*in_proj_qkv\.lora_A",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "says"), REFUSED, ids=[says[:24] for _, _, says in REFUSED])
def test_other_matrices_are_refused_by_name(change: Change, error: type, says: str, tmp_path: Path) -> None:
    out = directory(tmp_path)
    tensors = export(out)
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, out / WEIGHTS)
    with pytest.raises(error, match=says):
        read_adapter(out, cases.model_config(CASE))


@pytest.mark.parametrize("targets", [["in_proj_qkv", "out_proj"], r".*\.(in_proj_qkv|linear_attn\.out_proj)"])
def test_an_adapter_of_some_modules_has_zeros_for_the_others(
    targets: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its scale and ranks are peft's: those of the matrix that the products are."""
    out = directory(tmp_path)
    tensors = {n: x for n, x in export(out).items() if ".in_proj_qkv." in n or ".linear_attn.out_proj." in n}
    save_file(tensors, out / WEIGHTS)
    settings = json.loads((out / CONFIG).read_text()) | {"target_modules": targets}
    (out / CONFIG).write_text(json.dumps(settings | {"alpha_pattern": {"in_proj_qkv": 48}}))
    back = read_adapter(out, cases.model_config(CASE))
    assert back.spec == replace(cases.SPEC, train_mlp=False, train_unembed=False)
    assert "q_proj (1 layers)" in caplog.text and "in_proj_z (3 layers)" in caplog.text
    expected = state(CASE).weights
    for name in ("delta_q.A", "delta_v.A", "delta_out.A", "delta_out.B"):
        np.testing.assert_array_equal(back.weights[name], expected[name])
    np.testing.assert_array_equal(back.weights["delta_k.B"], expected["delta_k.B"] / 2)
    assert not back.weights["delta_z.A"].any() and not back.weights["q.B"].any()


@pytest.mark.parametrize(("rank", "is_read"), [(3 * 512, True), (3 * 512 + 1, False)])
def test_the_matrix_may_have_thrice_the_largest_rank(rank: int, is_read: bool, tmp_path: Path) -> None:
    out = directory(tmp_path)
    export(out)
    settings = json.loads((out / CONFIG).read_text()) | {"rank_pattern": {"in_proj_qkv": rank}}
    (out / CONFIG).write_text(json.dumps(settings))
    says = "misshapen" if is_read else r"rank_pattern\['in_proj_qkv'\] is 1537; expected an integer in 1\.\.1536"
    with pytest.raises(BadRequestError, match=says):
        read_adapter(out, cases.model_config(CASE))
