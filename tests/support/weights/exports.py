"""How do the tests of exports train an adapter, and what do transformers and the engine compute with it?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.engine import Engine
from jax_client.runs.lifecycle.export_check import probe_tokens
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.write.adapter_names import PROJECTIONS
from support.golden_cases import ADAM, CASES, sequences
from support.golden_engine import CROSS_ENTROPY, data

LINEARS = list(dict.fromkeys(projection for _, projection in PROJECTIONS.values() if projection != "lm_head"))


def trained(engine: Engine, case: str, spec: LoraSpec) -> tuple[AdapterState, np.ndarray]:
    """Train three steps; return the adapter and its logprobs."""
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    train(engine, case, adapter)
    logprobs = engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs
    state = engine.snapshot(lane, adapter).result().fetch()
    engine.release(adapter)
    return state, np.concatenate(logprobs)


def train(engine: Engine, case: str, adapter: Any) -> None:
    lane = engine.open_lane()
    for _ in range(3):
        engine.train_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result()
        engine.optim_step(lane, adapter, AdamSettings(**ADAM | {"learning_rate": 1e-2})).result()


def directory(parent: Path, name: str = "export") -> Path:
    (parent / name).mkdir()
    return parent / name


def random_state(engine: Engine, spec: LoraSpec) -> AdapterState:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    state = engine.snapshot(lane, adapter).result().fetch()
    engine.release(adapter)
    rng = np.random.default_rng(5)
    return replace(
        state, weights={n: rng.normal(size=a.shape).astype(np.float32) * 0.1 for n, a in state.weights.items()}
    )


def engine_logits(engine: Engine, state: AdapterState | None) -> np.ndarray:
    return engine.logits(engine.open_lane(), probe_tokens(engine.source, engine.model), state).result()


def torch_model(path: Path) -> Any:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None].long()).logits[0].float().numpy()


def torch_logprobs(model: Any, case: str) -> Any:
    import torch

    rows = []
    for s in sequences(CASES[case]):
        tokens, targets = (torch.from_numpy(s[name]).long() for name in ("tokens", "targets"))
        logprobs = torch.log_softmax(model(tokens[None]).logits[0], -1)
        rows.append(logprobs.gather(-1, targets[:, None])[:, 0])
    return torch.cat(rows)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def save_peft(base: Path, adapter: Path, save_embedding_layers: Any = "auto", **settings: Any) -> Any:
    """Save an adapter of peft with random matrices, about as large as trained ones; return the model with it."""
    model = torch_model(base)
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**{"r": 8, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(adapter, save_embedding_layers=save_embedding_layers)
    return model.eval()
