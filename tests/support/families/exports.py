"""What do transformers and peft compute with a family's files, and what should they with an adapter added?

The expected logits are those of weights to which `cases.with_adapter` added the adapter, before any file is written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jax_client.values import AdapterState
from support.families import cases


def state(case: str, *, unembed: bool = True) -> AdapterState:
    """Return the adapter of a case."""
    weights = {n: a for n, a in cases.adapter(case).items() if unembed or not n.startswith("unembed")}
    return AdapterState(spec=replace(cases.SPEC, train_unembed=unembed), step=0, weights=weights)


def logits(model: Any, case: str) -> np.ndarray:
    """Return a model's logits of the longest sequence of a case."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(cases.data(case)[1].tokens_T)[None].long()).logits[0].numpy()


def expected_logits(model: Any, case: str, adapter: AdapterState) -> np.ndarray:
    """Return the logits of transformers' base model with an adapter added to its weights."""
    import torch

    base = dict(model.named_parameters())
    lora = {name: torch.from_numpy(array).to(model.dtype) for name, array in adapter.weights.items()}
    tied = model.config.tie_word_embeddings
    if "unembed.A" not in lora:
        D, V = model.config.hidden_size, model.config.vocab_size
        lora |= {"unembed.A": torch.zeros(1, D).to(model.dtype), "unembed.B": torch.zeros(1, V).to(model.dtype)}
    with torch.no_grad():
        merged = cases.with_adapter(cases.model_config(case), base, lora, tied=tied)
        head = merged.pop("lm_head.weight")
        inner = {name.removeprefix("model."): value for name, value in merged.items()}
        tokens = torch.from_numpy(cases.data(case)[1].tokens_T)[None].long()
        h = torch.func.functional_call(model.model, inner, (tokens,), {"use_cache": False})
        return (h.last_hidden_state[0] @ head.T).numpy()
