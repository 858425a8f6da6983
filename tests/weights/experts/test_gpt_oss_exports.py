"""Is an exported adapter of a gpt-oss the adapter, where its experts have the input first and gate and up by turns?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.errors import BadRequestError, RequestFailedError, UnsupportedError
from jax_client.models.lora_arrays import array_shapes
from jax_client.runs.lifecycle.export_check import check_export, probe_tokens
from jax_client.weights.read.load import read_config
from jax_client.weights.read.quantized.reader import QuantizedReader
from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import CONFIG, WEIGHTS, Program, read_adapter, write_adapter
from support.families import cases, mxfp4
from support.families.engine import open_engine
from support.families.exports import expected_logits, logits, state
from support.golden_cases import RANK
from support.weight_files import write_hf
from support.weights.exports import directory

CASE, SCALE = "gpt_oss", 32 / RANK


def export(tmp_path: Path, program: Program | None, base: str = "base") -> Path:
    out = directory(tmp_path, "adapter")
    write_adapter(out, state(CASE), cases.model_config(CASE), base, program)
    return out


@pytest.mark.torch
def test_a_merged_model_computes_base_and_adapter(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    c = cases.model_config(CASE)
    path = write_hf(tmp_path / "m", cases.CASES[CASE], cases.tensors(CASE))
    base, out = cases.torch_model(path, c), directory(tmp_path)
    expected = expected_logits(base, CASE, state(CASE))
    write_merged(out, resolve(str(path)), c, state(CASE), dtype="float32", shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert np.abs(expected - logits(base, CASE)).max() > 0.5
    np.testing.assert_allclose(logits(cases.torch_model(out, c), CASE), expected, rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("program", ["peft", None])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_computes_the_adapter(program: Program | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In float64, since peft applies adapters of attention and the reference adds them to weights."""
    peft = pytest.importorskip("peft")
    path = write_hf(tmp_path / "m", cases.CASES[CASE], cases.tensors(CASE))
    base = cases.torch_model(path, cases.model_config(CASE), "float64")
    expected = expected_logits(base, CASE, state(CASE))
    out = export(tmp_path, program, str(path))
    assert (f"--max-lora-rank must be {2 * RANK} at least" in caplog.text) == (program is None)
    adapted = peft.PeftModel.from_pretrained(base, str(out)).eval()
    np.testing.assert_allclose(logits(adapted, CASE), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits(adapted.merge_and_unload(), CASE), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("program", ["vllm", "peft"])
def test_each_expert_gets_its_own(program: Program, tmp_path: Path) -> None:
    """By the orders that vLLM and peft have: even outputs of the first parameter are gate's, odd ones up's."""
    out, weights = export(tmp_path, program), state(CASE).weights
    tensors, E = load_file(out / WEIGHTS), 8
    for layer in range(4):
        key = f"base_model.model.model.layers.{layer}.mlp.experts."
        found = {}
        for name, middle in (("gate_up", "base_layer."), ("down", "")):
            a, b = tensors[f"{key}{middle}lora_A.weight"], tensors[f"{key}{middle}lora_B.weight"]
            found[name] = np.einsum("ore,eri->eoi", b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[1]))
        of = {n: weights[f"experts_{n}"][layer] for n in ("gate.A", "gate.B", "up.A", "up.B", "down.A", "down.B")}
        for first, name in enumerate(("gate", "up")):
            expected = np.einsum("ref,rd->efd", of[f"{name}.B"], of[f"{name}.A"])
            np.testing.assert_allclose(found["gate_up"][:, first::2], expected, atol=1e-6)
        np.testing.assert_allclose(found["down"], np.einsum("rd,ref->edf", of["down.B"], of["down.A"]), atol=1e-6)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    back = read_adapter(export(tmp_path, "peft"), cases.model_config(CASE))
    assert back.spec == replace(state(CASE).spec, seed=back.spec.seed)
    for name, array in state(CASE).weights.items():
        np.testing.assert_array_equal(back.weights[name], array)


def test_the_check_of_exports_passes(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "m", CASE)
    for program in ("peft", "vllm"):
        out = directory(tmp_path, program)
        write_adapter(out, state(CASE), engine.model, "base", program)
        assert check_export(engine, state(CASE), out).difference == 0.0
    out = directory(tmp_path, "merged")
    write_merged(out, engine.source, engine.model, state(CASE), dtype="float32")
    assert 0 < check_export(engine, state(CASE), out).difference < 1e-3
    engine.close()


def test_in_bfloat16_other_choices_of_routers_are_no_error_and_a_lost_adapter_is(tmp_path: Path) -> None:
    """Some tokens meet other experts, as the merged weights were rounded; their logits are far apart."""
    engine = open_engine(tmp_path / "m", CASE, dtype="bfloat16")
    adapter, lane = state(CASE), engine.open_lane()
    right, lost = directory(tmp_path, "right"), directory(tmp_path, "lost")
    write_merged(right, engine.source, engine.model, adapter, dtype="bfloat16")
    found, tokens = check_export(engine, adapter, right), probe_tokens(engine.source, engine.model)
    live, back = (
        engine.logits(lane, tokens, of, at).result() for of, at in ((adapter, None), (None, resolve(str(right))))
    )
    assert found.tokens == len(tokens) // 2
    assert found.difference <= found.tolerance < np.abs(live - back).max()
    write_merged(lost, engine.source, engine.model, None, dtype="bfloat16")
    with pytest.raises(RequestFailedError, match="computes something else than the adapter: on 48 probe tokens"):
        check_export(engine, adapter, lost)
    engine.close()


def test_a_scale_of_its_own_comes_back_in_b(tmp_path: Path) -> None:
    out = export(tmp_path, "peft")
    keys = json.loads((out / CONFIG).read_text())
    keys["alpha_pattern"] = dict.fromkeys(keys["alpha_pattern"], 16)
    (out / CONFIG).write_text(json.dumps(keys))
    back, weights = read_adapter(out, cases.model_config(CASE)).weights, state(CASE).weights
    for name, array in weights.items():
        factor = 0.25 if name in ("experts_gate.B", "experts_up.B") else 1
        np.testing.assert_array_equal(back[name], array * np.float32(factor))


KEY = "base_model.model.model.layers.2.mlp.experts."


def mixed(tensors: dict[str, np.ndarray]) -> None:
    b = tensors[KEY + "base_layer.lora_B.weight"].copy()
    b[1, 3] = 1  # an output of up, a rank of gate
    tensors[KEY + "base_layer.lora_B.weight"] = b


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (mixed, UnsupportedError, r"layers\.2\.mlp\.experts\.base_layer\.lora_B.*share ranks.*Merge it into its base"),
        (lambda t: t.pop(KEY + "lora_B.weight"), BadRequestError, r"missing.*experts\.0\.down_proj\.lora_B"),
        (lambda t: t.pop(KEY + "base_layer.lora_A.weight"), BadRequestError, r"missing.*\.gate_proj\.lora_A"),
        (
            lambda t: t.update({KEY + "lora_A.weight": np.zeros((9, 48), np.float32)}),
            BadRequestError,
            r"experts\.lora_A\.weight is \(9, 48\); expected a matrix with rows for 8 experts",
        ),
        (
            lambda t: t.update({KEY + "lora_A.weight": np.zeros((8 * RANK, 47), np.float32)}),
            BadRequestError,
            r"8 misshapen.*down_proj\.lora_A\.weight: expected \(\d+, 48\), found \(\d+, 47\)",
        ),
    ],
)
def test_what_is_no_adapter_here_is_named(change: Any, error: type, says: str, tmp_path: Path) -> None:
    out = export(tmp_path, "peft")
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(error, match=says):
        read_adapter(out, cases.model_config(CASE))


def test_sglang_is_not_given_what_it_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"gate and up by turns.*SGLang.*--format merged"):
        export(tmp_path, "sglang")


def test_a_release_is_merged_expert_by_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mxfp4.write(tmp_path / "m")
    source, keys = resolve(str(path)), mxfp4.config()
    c, plain = read_config(source), mxfp4.numbers(mxfp4.stored(keys))
    rng = np.random.default_rng(1)
    weights = {n: rng.normal(size=s).astype(np.float32) * 0.1 for n, s in array_shapes(c, cases.SPEC).items()}
    monkeypatch.setattr(QuantizedReader, "read", _refuse_experts(QuantizedReader.read))
    out = directory(tmp_path)
    write_merged(out, source, c, replace(state(CASE), weights=weights), dtype="float32")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written = load_file(out / "model.safetensors")
    assert written.keys() == plain.keys()
    for layer in range(2):
        of = {n: weights[f"experts_{n}"][layer] for n in ("gate.A", "gate.B", "up.A", "up.B", "down.A", "down.B")}
        key = f"model.layers.{layer}.mlp.experts."
        for first, name in enumerate(("gate", "up")):
            expected = plain[key + "gate_up_proj"][:, :, first::2] + SCALE * np.einsum(
                "ref,rd->edf", of[f"{name}.B"], of[f"{name}.A"]
            )
            np.testing.assert_allclose(written[key + "gate_up_proj"][:, :, first::2], expected, atol=1e-5)
        expected = plain[key + "down_proj"] + SCALE * np.einsum("ref,rd->efd", of["down.A"], of["down.B"])
        np.testing.assert_allclose(written[key + "down_proj"], expected, atol=1e-5)
    np.testing.assert_array_equal(written["model.layers.1.self_attn.sinks"], plain["model.layers.1.self_attn.sinks"])


def _refuse_experts(read: Any) -> Any:
    def checked(self: QuantizedReader, name: str) -> np.ndarray:
        assert len(self.tensors[name].shape) < 3, f"{name} was decoded as a whole"
        return read(self, name)

    return checked
