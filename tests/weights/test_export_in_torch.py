"""Do exported adapters and models compute in transformers and PEFT what they computed here, and theirs here?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.engine.engine import Engine
from jax_client.runs.lifecycle.export_check import check_export, probe_tokens
from jax_client.values import LoraSpec
from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import read_adapter, write_adapter
from support.golden_cases import ADAM, CASES, sequences
from support.golden_engine import CROSS_ENTROPY, SPEC, data
from support.weight_files import HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf
from support.weights.exports import (
    LINEARS,
    directory,
    engine_logits,
    random_state,
    torch_logits,
    torch_logprobs,
    torch_model,
    train,
    trained,
)

# transformers', about what peft asks of it; it has nothing to do with the adapter.
PEFT_ITSELF = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
NO_HEAD = replace(SPEC, train_unembed=False)
CLOSE = {"rtol": 0, "atol": 1e-4}


@PEFT_ITSELF
@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param("llama_tied", NO_HEAD, marks=pytest.mark.full),
        ("llama_untied", SPEC),
        pytest.param("qwen2_tied", NO_HEAD, marks=pytest.mark.full),
        pytest.param("qwen3_untied", SPEC, marks=pytest.mark.full),
        # peft computes an adapter on a tied output projection as long as it is not merged.
        ("qwen2_tied", SPEC),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_computes_what_was_trained(
    case: str, spec: LoraSpec, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    state, expected = trained(engine, case, spec)
    out = directory(tmp_path)
    write_adapter(out, state, engine.model, "tiny", "peft")
    model = torch_model(engine.source.path)
    from peft import PeftModel

    found = torch_logprobs(PeftModel.from_pretrained(model, out), case).detach().numpy()
    np.testing.assert_allclose(found, expected, **CLOSE)
    check = check_export(engine, state, out)
    assert (check.tokens, check.difference) == (96, 0.0)


@PEFT_ITSELF
@pytest.mark.torch
@pytest.mark.parametrize("covered", ["train_attn", "train_mlp", "train_unembed"])
def test_peft_computes_a_part_of_the_modules(covered: str, engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("qwen3_untied")
    nothing = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    state = random_state(engine, replace(SPEC, **nothing | {covered: True}))
    out = directory(tmp_path)
    write_adapter(out, state, engine.model, "tiny")
    assert read_adapter(out, engine.model).spec == state.spec
    model = torch_model(engine.source.path)
    from peft import PeftModel

    found = torch_logits(PeftModel.from_pretrained(model, out), probe_tokens(engine.source, engine.model))
    np.testing.assert_allclose(found, engine_logits(engine, state), **CLOSE)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("llama_tied", {"lora_alpha": 32}),
        ("llama_tied", {"lora_alpha": 16}),
        ("qwen2_tied", {"lora_alpha": 16, "use_rslora": True}),
        (
            "qwen3_untied",
            {"lora_alpha": 8, "alpha_pattern": {"mlp.up_proj": 3, "^model.layers.0.mlp.down_proj": 64}},
        ),
        ("qwen3_untied", {"lora_alpha": 32, "target_modules": [*LINEARS, "lm_head"]}),
        ("llama_tied", {"lora_alpha": 32, "target_modules": [*LINEARS, "lm_head"]}),
        ("qwen2_tied", {"lora_alpha": 32, "target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"}),
        ("qwen2_tied", {"lora_alpha": 32, "target_modules": "all-linear"}),
    ],
)
@PEFT_ITSELF
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_peft_computes_the_same_here(
    case: str, extra: dict[str, Any], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    model = torch_model(engine.source.path)
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 8, "target_modules": LINEARS, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | extra
    model = get_peft_model(model, LoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    state = read_adapter(tmp_path / "adapter", engine.model)
    assert (state.spec.rank, state.step, state.mu, state.nu) == (8, 0, None, None)
    tokens = probe_tokens(engine.source, engine.model)
    np.testing.assert_allclose(engine_logits(engine, state), torch_logits(model, tokens), **CLOSE)


# The scale of each is that of alpha 32 over 8, so that an optimizer step moves it as it moves ours.
PATTERNS = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 16}}


@PEFT_ITSELF
@pytest.mark.torch
@pytest.mark.parametrize(
    "settings", [{"target_modules": LINEARS}, {"target_modules": ["q_proj", "v_proj"], **PATTERNS}]
)
def test_training_goes_on_as_in_peft(
    settings: dict[str, Any], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    case = "qwen3_untied"
    engine, lane = engine_of(case), engine_of(case).open_lane()
    model = torch_model(engine.source.path)
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 32, "init_lora_weights": False} | settings
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "adapter")
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (ADAM["beta1"], ADAM["beta2"])
    adam = torch.optim.AdamW(parameters, lr=1e-2, betas=betas, eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    weights = torch.cat([torch.from_numpy(s["weights"]) for s in sequences(CASES[case])])
    for _ in range(3):
        (-(weights * torch_logprobs(model, case)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ADAM["grad_clip_norm"])
        adam.step()
        adam.zero_grad()

    adapter = engine.open_adapter(lane, read_adapter(tmp_path / "adapter", engine.model)).result()
    before = engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs
    train(engine, case, adapter)
    after = np.concatenate(engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs)
    assert np.abs(after - np.concatenate(before)).max() > 0.1
    np.testing.assert_allclose(after, torch_logprobs(model, case).detach().numpy(), **CLOSE)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "spec"),
    [("llama_tied", NO_HEAD), ("llama_tied", SPEC), ("qwen2_untied", SPEC), ("qwen3_untied", None)],
)
def test_a_merged_model_computes_the_same(
    case: str, spec: LoraSpec | None, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    state = None if spec is None else random_state(engine, spec)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state, dtype="float32", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    written = json.loads((out / "config.json").read_text())
    untied = spec is SPEC or "untied" in case
    assert (written["tie_word_embeddings"], written["dtype"]) == (not untied, "float32")
    tokens = probe_tokens(engine.source, engine.model)
    np.testing.assert_allclose(torch_logits(torch_model(out), tokens), engine_logits(engine, state), **CLOSE)
    check = check_export(engine, state, out)
    assert check.difference < 1e-4 < check.tolerance * 10


@pytest.mark.torch
def test_a_merged_gguf_computes_the_same(tmp_path: Path) -> None:
    from jax_client.config import EngineConfig

    config = HF_CONFIG | {"vocab_size": 300}
    tensors = {n: t if "norm" in n else 0.2 * t for n, t in hf_tensors(config).items()}
    path = write_gguf(tmp_path / "m.gguf", config, tensors, metadata=tokenizer_metadata())
    settings: dict[str, Any] = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False}
    engine = Engine(resolve(str(path)), EngineConfig(**settings))
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state, dtype="float32")
    expected, tokens = engine_logits(engine, state), probe_tokens(engine.source, engine.model)
    assert check_export(engine, state, out).difference < 1e-4
    engine.close()
    np.testing.assert_allclose(torch_logits(torch_model(out), tokens), expected, **CLOSE)
    from transformers import AutoTokenizer

    text = "the thing 12\n\n in"
    assert AutoTokenizer.from_pretrained(out).encode(text) == load_tokenizer(engine.source).encode(text)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
