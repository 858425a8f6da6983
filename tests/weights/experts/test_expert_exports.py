"""Is an exported adapter of experts the adapter, as others read it?

Each layout is read back by code of its own here, or by peft; a merged model by transformers.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.values import AdapterState
from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import WEIGHTS, read_adapter, write_adapter
from support.families import cases
from support.golden_cases import RANK
from support.weight_files import write_hf

CASES = ("qwen3_moe_mixed", "qwen3_moe_raw")
SCALE = 32 / RANK


def state(case: str, *, unembed: bool = False, only_experts: bool = False) -> AdapterState:
    spec = replace(cases.SPEC, train_unembed=unembed, train_attn=not only_experts)
    weights = {
        name: array
        for name, array in cases.adapter(case).items()
        if (unembed or not name.startswith("unembed")) and (not only_experts or name[0] not in "qkvo")
    }
    return AdapterState(spec=spec, step=0, weights=weights)


def export(
    tmp_path: Path, case: str, program: Literal["peft", "vllm", "sglang"] | None = None
) -> dict[str, np.ndarray]:
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", state(case), cases.model_config(case), "base", program)
    return load_file(tmp_path / "adapter" / WEIGHTS)


def deltas(case: str, layer: int, at: int) -> dict[str, np.ndarray]:
    """Return what the adapter adds to each expert's matrices (E, out, in) of a layer, from its own arrays."""
    w = state(case).weights
    of = {f"{name}.{ab}": w[f"experts_{name}.{ab}"][at] for name in ("gate", "up", "down") for ab in "AB"}
    found = {name: np.einsum("ref,rd->efd", of[f"{name}.B"], of[f"{name}.A"]) for name in ("gate", "up")}
    return found | {"down": np.einsum("rd,ref->edf", of["down.B"], of["down.A"])}


def sparse_layers(case: str) -> list[int]:
    c = cases.model_config(case)
    assert c.experts is not None
    return [layer for layer in range(c.n_layers) if layer not in c.experts.dense_layers]


@pytest.mark.parametrize("case", CASES)
def test_experts_apart(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = export(tmp_path, case)
    assert "--for peft" in caplog.text
    for at, layer in enumerate(sparse_layers(case)):
        for name, expected in deltas(case, layer, at).items():
            for e, delta in enumerate(expected):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{name}_proj.lora_"
                np.testing.assert_allclose(tensors[key + "B.weight"] @ tensors[key + "A.weight"], delta, atol=1e-6)
    back = read_adapter(tmp_path / "adapter", cases.model_config(case))
    assert back.spec == replace(state(case).spec, seed=back.spec.seed)
    for name, array in state(case).weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def test_the_fused_layout_has_its_orders(tmp_path: Path) -> None:
    """A goes expert by expert, B's columns rank by rank: mixed up, all shapes would still fit."""
    case, E = "qwen3_moe_raw", 8
    raw = cases.model_config(case)
    assert raw.experts is not None
    # The same weights under a model all of whose layers have experts.
    config = replace(raw, n_layers=2, experts=replace(raw.experts, dense_layers=()))
    weights = {n: a if n.startswith("experts") else a[:2] for n, a in state(case).weights.items() if n[0] != "g"}
    weights = {n: a for n, a in weights.items() if n.split(".")[0] not in ("gate", "up", "down")}
    (tmp_path / "adapter").mkdir()
    adapter = AdapterState(spec=state(case).spec, step=0, weights=weights)
    write_adapter(tmp_path / "adapter", adapter, config, "base", "peft")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {r".*\.gate_up_proj": 2 * RANK}
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.mlp.experts."
        found = {}
        for name, rank, middle in (("gate_up", 2 * RANK, "base_layer."), ("down", RANK, "")):
            a = tensors[f"{key}{middle}lora_A.weight"].reshape(E, rank, -1)
            b = tensors[f"{key}{middle}lora_B.weight"]
            found[name] = np.einsum("ore,eri->eoi", b.reshape(len(b), rank, E), a)
        expected = deltas(case, layer, layer)
        both = np.concatenate([expected["gate"], expected["up"]], axis=1)
        np.testing.assert_allclose(found["gate_up"], both, atol=1e-6)
        np.testing.assert_allclose(found["down"], expected["down"], atol=1e-6)
    back = read_adapter(tmp_path / "adapter", config)
    for name, array in weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def test_peft_is_not_given_what_it_would_leave_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the layers 0, 2 of this model have one MLP"):
        export(tmp_path, "qwen3_moe_raw", "peft")


def test_the_shared_layout_has_one_matrix_for_all(tmp_path: Path) -> None:
    case = "qwen3_moe_mixed"
    tensors = export(tmp_path, case, "sglang")
    for at, layer in enumerate(sparse_layers(case)):
        for name, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{short}.lora_"
            a, b = tensors[key + "A.weight"], tensors[key + "B.weight"]
            assert (len(a), len(b)) == ((8, 1) if name == "down" else (1, 8))
            np.testing.assert_allclose(b @ a, deltas(case, layer, at)[name], atol=1e-6)
    back = read_adapter(tmp_path / "adapter", cases.model_config(case))
    for name, array in state(case).weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def test_a_shared_matrix_of_another_number_of_experts_is_named(tmp_path: Path) -> None:
    tensors = export(tmp_path, "qwen3_moe_mixed", "sglang")
    name = "base_model.model.model.layers.2.mlp.experts.w2.lora_A.weight"
    tensors[name] = tensors[name][:3]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(BadRequestError, match=r"experts\.w2\.lora_A\.weight is \(3, .*expected 1 or 8 matrices"):
        read_adapter(tmp_path / "adapter", cases.model_config("qwen3_moe_mixed"))


def test_experts_with_matrices_of_their_own_are_refused(tmp_path: Path) -> None:
    tensors = export(tmp_path, "qwen3_moe_mixed", "vllm")
    name = "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_A.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UnsupportedError, match=r"layers\.2\.mlp\.experts\.5\.up_proj: its A is not that of") as error:
        read_adapter(tmp_path / "adapter", cases.model_config("qwen3_moe_mixed"))
    assert "Merge the adapter into its base model" in str(error.value)


@pytest.mark.parametrize("form", ["apart", "one tensor"])
@pytest.mark.parametrize("case", CASES)
def test_merged(case: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = cases.tensors(case) if form == "apart" else cases.fused(case)
    path = write_hf(tmp_path / "m", cases.CASES[case], base)
    (tmp_path / "merged").mkdir()
    with caplog.at_level(logging.WARNING):
        config, whole = cases.model_config(case), state(case, unembed=True)
        write_merged(tmp_path / "merged", resolve(str(path)), config, whole, dtype="float32")
    written: dict[str, Any] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        written |= load_file(file)
    for at, layer in enumerate(sparse_layers(case)):
        prefix, added = f"model.layers.{layer}.mlp.experts.", deltas(case, layer, at)
        for e in range(8):
            for name in ("gate", "up", "down"):
                if form == "apart":
                    key = f"{prefix}{e}.{name}_proj.weight"
                    got, before = written[key], base[key]
                elif name == "down":
                    got, before = (x[f"{prefix}down_proj"][e] for x in (written, base))
                else:
                    rows = slice(0, 32) if name == "gate" else slice(32, 64)
                    got, before = (x[f"{prefix}gate_up_proj"][e, rows] for x in (written, base))
                np.testing.assert_allclose(got, before + SCALE * added[name][e], atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_computes_the_adapter(tmp_path: Path) -> None:
    """Its experts alone, since peft leaves the adapters of dense layers beside experts out."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    case = "qwen3_moe_mixed"
    config = cases.model_config(case)
    path = write_hf(tmp_path / "m", cases.CASES[case], cases.tensors(case))
    experts = state(case, only_experts=True)
    weights = {n: a if n.startswith("experts") else 0 * a for n, a in experts.weights.items()}
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", replace(experts, weights=weights), config, str(path), "vllm")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    tokens = torch.from_numpy(cases.data(case)[1].tokens_T)[None].long()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(tokens).logits
        for at, layer in enumerate(sparse_layers(case)):
            added = deltas(case, layer, at)
            prefix = f"model.layers.{layer}.mlp.experts."
            both = np.concatenate([added["gate"], added["up"]], axis=1)
            base[f"{prefix}gate_up_proj"] += SCALE * torch.from_numpy(both)
            base[f"{prefix}down_proj"] += SCALE * torch.from_numpy(added["down"])
        expected = torch.func.functional_call(model, base, (tokens,)).logits
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()(tokens).logits
    assert float((expected - before).abs().max()) > 0.1
    np.testing.assert_allclose(adapted, expected, atol=1e-5)
