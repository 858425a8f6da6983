"""Is an exported adapter of a Qwen3.5 with experts, or of a Qwen3-Next, the adapter, and is a merged model right?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_client.errors import UnsupportedError
from jax_client.models.families.registry import config_from_hf
from jax_client.models.lora_arrays import array_shapes
from jax_client.values import AdapterState
from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import CONFIG, WEIGHTS, Program, read_adapter, write_adapter
from support.families import cases
from support.families.exports import expected_logits, logits, state
from support.golden_cases import RANK
from support.weight_files import write_hf
from support.weights.exports import directory

MOE, NEXT = "qwen3_5_moe", "qwen3_next"
LAYER = "base_model.model.model.layers.2."


@pytest.mark.parametrize(
    ("case", "program"), [(MOE, "peft"), *((case, p) for case in (MOE, NEXT) for p in ("vllm", "sglang", None))]
)
def test_every_layout_comes_back(case: str, program: Program | None, tmp_path: Path) -> None:
    """vLLM reads the experts of a Qwen3.5 in one tensor, as peft does, and those of a Qwen3-Next apart."""
    out, config = directory(tmp_path), cases.model_config(case)
    write_adapter(out, state(case), config, "base", program)
    names, settings = load_file(out / WEIGHTS).keys(), json.loads((out / CONFIG).read_text())
    in_one = case == MOE and program != "sglang"
    assert (f"{LAYER}mlp.experts.base_layer.lora_A.weight" in names) == in_one
    assert (f"{LAYER}mlp.experts.5.up_proj.lora_A.weight" in names) == (case == NEXT and program != "sglang")
    assert (f"{LAYER}mlp.experts.w3.lora_A.weight" in names) == (program == "sglang")
    assert (f"{LAYER}linear_attn.in_proj_v.lora_A.weight" in names) == (program == "sglang")
    assert f"{LAYER}mlp.shared_expert.up_proj.lora_B.weight" in names
    ranks = {"in_proj_qkvz": 4 * RANK} if case == NEXT else {"in_proj_qkv": 3 * RANK}
    assert settings["rank_pattern"] == (
        {} if program == "sglang" else ranks | ({r".*\.gate_up_proj": 2 * RANK} if in_one else {})
    )
    for name, array in read_adapter(out, config).weights.items():
        np.testing.assert_array_equal(array, state(case).weights[name])


@pytest.mark.torch
@pytest.mark.parametrize("case", [MOE, NEXT])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_exports_compute_base_and_adapter(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = cases.model_config(case)
    path = write_hf(tmp_path / "m", cases.CASES[case], cases.tensors(case))
    base = cases.torch_model(path, config, "float64")
    expected = expected_logits(base, case, state(case))
    assert np.abs(expected - logits(base, case)).max() > 0.5
    merged, adapter = directory(tmp_path, "merged"), directory(tmp_path, "adapter")
    write_merged(merged, resolve(str(path)), config, state(case), dtype="float32")
    np.testing.assert_allclose(logits(cases.torch_model(merged, config, "float64"), case), expected, rtol=0, atol=1e-4)
    if case == NEXT:  # peft leaves the adapters of its dense layers, and of its shared experts, out
        return
    write_adapter(adapter, state(case), config, str(path), "peft")
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    np.testing.assert_allclose(logits(adapted, case), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dense", "says"), [([1], "the layers 1 of this model have one MLP"), ([], "an expert that all tokens share")]
)
def test_peft_is_not_given_what_it_would_leave_out(dense: list[int], says: str, tmp_path: Path) -> None:
    config = config_from_hf(cases.CASES[NEXT] | {"mlp_only_layers": dense}, NEXT)
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in array_shapes(config, cases.SPEC).items()}
    with pytest.raises(UnsupportedError, match=says):
        write_adapter(directory(tmp_path), AdapterState(spec=cases.SPEC, step=0, weights=weights), config, "b", "peft")
