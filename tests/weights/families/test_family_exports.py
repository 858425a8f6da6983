"""Is an exported adapter of a Gemma 3, a Mistral or a Qwen3.5 the adapter, and is a merged model base and adapter?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_client.weights.read.source import resolve
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import read_adapter, write_adapter
from support.families import cases
from support.families.exports import expected_logits, logits, state
from support.weight_files import write_hf
from support.weights.exports import directory


@pytest.mark.torch
@pytest.mark.parametrize("case", ["gemma3", "mistral", "qwen3_5"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_exports_compute_base_and_adapter(case: str, tmp_path: Path) -> None:
    """In float64 where peft applies the adapter, since the reference adds it to weights."""
    peft = pytest.importorskip("peft")
    c = cases.model_config(case)
    path = write_hf(tmp_path / "m", cases.CASES[case], cases.tensors(case))
    base = cases.torch_model(path, c, "float64")
    expected = expected_logits(base, case, state(case))
    assert np.abs(expected - logits(base, case)).max() > 0.5
    merged, adapter = directory(tmp_path, "merged"), directory(tmp_path, "adapter")
    write_merged(merged, resolve(str(path)), c, state(case), dtype="float32")
    np.testing.assert_allclose(logits(cases.torch_model(merged, c, "float64"), case), expected, rtol=0, atol=1e-4)
    write_adapter(adapter, state(case), c, str(path), "peft")
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    np.testing.assert_allclose(logits(adapted, case), expected, rtol=0, atol=1e-4)
    for name, array in read_adapter(adapter, c).weights.items():
        np.testing.assert_array_equal(array, state(case).weights[name])


def test_a_merged_gemma_has_the_norms_of_the_files(tmp_path: Path) -> None:
    """They are what is added to 1, in the files and in what is written, and the head stays the embedding."""
    case, stored = "gemma3", cases.tensors("gemma3")
    path, out = write_hf(tmp_path / "m", cases.CASES[case], stored), directory(tmp_path)
    adapter = state(case, unembed=False)
    write_merged(out, resolve(str(path)), cases.model_config(case), adapter, dtype="float32")
    written = load_file(out / "model.safetensors")
    assert written.keys() == stored.keys()
    norms = [name for name in stored if "norm" in name]
    assert len(norms) == 4 * 6 + 1
    for name in [*norms, "model.embed_tokens.weight"]:
        np.testing.assert_array_equal(written[name], stored[name])
