"""Do logits, LoRA gradients and AdamW trajectories equal transformers, peft and torch?

The stored goldens serve machines without torch; with torch, they are made again and compared.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.decoder import output_head_VD
from jax_client.models.layers import contract
from jax_client.models.transformer import context, forward_pass
from support.golden_cases import CASES, GOLDENS, lora_values
from support.golden_engine import data, open_engine, to_ours, train

# Of each architecture one, tied or not; the rest differ from these in nothing but that.
USUAL = ("llama_tied", "qwen2_untied", "qwen3_tied")
EACH = [case if case in USUAL else pytest.param(case, marks=pytest.mark.full) for case in CASES]
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_goldens.py"


@pytest.mark.parametrize(
    ("case", "remat"),
    [
        ("llama_tied", "none"),
        ("qwen2_untied", "none"),
        ("qwen3_untied", "full"),
        *(pytest.param(c, "none", marks=pytest.mark.full) for c in CASES if c not in ("llama_tied", "qwen2_untied")),
    ],
)
def test_training_equals_peft(case: str, remat: str, tmp_path: Path) -> None:
    config, golden = CASES[case], np.load(GOLDENS / f"{case}.npz")
    engine = open_engine(tmp_path / case, config, remat=remat)
    first, grads, trained = train(engine, config)
    engine.close()
    assert first.metrics["loss:sum"] == pytest.approx(float(golden["loss"]), rel=1e-5)
    for i, (before, after) in enumerate(zip(first.logprobs, trained.logprobs, strict=True)):
        np.testing.assert_allclose(before, golden[f"logprobs.{i}"], atol=1e-4)
        np.testing.assert_allclose(after, golden[f"trained.{i}"], atol=1e-4)
    expected = to_ours(config, {name: golden[f"grad.{name}"] for name in lora_values(config)})
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        error = np.linalg.norm(grad - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("case", EACH)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    config, golden = CASES[case], np.load(GOLDENS / f"{case}.npz")
    engine = open_engine(tmp_path / case, config)
    engine.close()
    for i, sequence in enumerate(data(config)):
        tokens = jnp.asarray(sequence.tokens_T)[None]
        c = context(jnp.arange(tokens.shape[1])[None], engine.model, engine.dtype, engine.attention)
        h_BTD, _ = forward_pass(engine.params, {}, tokens, jnp.ones_like(tokens), c, None)
        logits = contract("TD,VD->TV", h_BTD[0], output_head_VD(engine.params), engine.dtype)
        np.testing.assert_allclose(logits, golden[f"logits.{i}"], atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_goldens_are_what_torch_says_now(case: str) -> None:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_goldens", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_goldens"] = module
    spec.loader.exec_module(module)
    stored = np.load(GOLDENS / f"{case}.npz")
    for name, array in module.reference(CASES[case]).items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-4, atol=2e-5, err_msg=name)
