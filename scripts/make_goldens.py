"""How were the stored goldens made? transformers and peft run the cases of tests/support/golden_cases.py in float32.

Run it from the repository root with the extras torch, dev and demo; it rewrites tests/goldens/**/*.npz.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from jax_client.weights.read.source import EMBEDDED_MODEL, resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from support.families import cases as family_cases
from support.golden_cases import (
    ADAM,
    CASES,
    GOLDENS,
    RANK,
    REAL_GOLDEN,
    REAL_TEXT,
    STEPS,
    base_values,
    lora_values,
    real_logprobs,
    real_model,
    sequences,
)


def reference(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return logits, logprobs and LoRA gradients before training, and the logprobs after `STEPS` AdamW steps."""
    torch.manual_seed(0)
    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class(model_class.config_class(**keys, attn_implementation="eager")).float().eval()
    weights = {name: torch.from_numpy(array) for name, array in base_values(config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the tiny model does not fit transformers: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    data = [{k: torch.from_numpy(v) for k, v in sequence.items()} for sequence in sequences(config)]
    out = {f"logits.{i}": model(s["tokens"][None].long()).logits[0].detach().numpy() for i, s in enumerate(data)}

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that a tied lm_head cannot be merged; nothing is merged here
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=targets))
    lora = dict(_lora_parameters(model))
    for name, value in lora_values(config).items():
        with torch.no_grad():
            lora[name].copy_(torch.from_numpy(value))
    parameters = list(lora.values())
    adam = torch.optim.AdamW(
        parameters,
        lr=ADAM["learning_rate"],
        betas=(ADAM["beta1"], ADAM["beta2"]),
        eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
    )
    for step in range(STEPS):
        logprobs = [_logprobs(model, s) for s in data]
        loss = -sum((s["weights"] * p).sum() for s, p in zip(data, logprobs, strict=True))
        loss.backward()
        if step == 0:
            out |= {f"logprobs.{i}": p.detach().numpy() for i, p in enumerate(logprobs)}
            out |= {f"grad.{name}": p.grad.numpy().copy() for name, p in lora.items()}
            out["loss"] = loss.detach().numpy()
        torch.nn.utils.clip_grad_norm_(parameters, ADAM["grad_clip_norm"])
        adam.step()
        adam.zero_grad()
    return out | {f"trained.{i}": _logprobs(model, s).detach().numpy() for i, s in enumerate(data)}


def _logprobs(model: Any, sequence: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(sequence["tokens"][None].long()).logits[0]
    return torch.log_softmax(logits, -1).gather(-1, sequence["targets"][:, None].long())[:, 0]


def _lora_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").removeprefix("model.").partition(".lora_")
            found.append((f"{module}.{rest[0]}", parameter))
    return found


if __name__ == "__main__":
    family_cases.STORED.mkdir(parents=True, exist_ok=True)
    for case, config in CASES.items():
        np.savez_compressed(GOLDENS / f"{case}.npz", **reference(config))
        print(f"wrote {case}.npz, {(GOLDENS / f'{case}.npz').stat().st_size} bytes")
    tokenizer = load_tokenizer(resolve(EMBEDDED_MODEL))
    tokens = np.array(tokenizer.encode(REAL_TEXT)[:201], np.int32)
    np.savez_compressed(REAL_GOLDEN, tokens=tokens, logprobs=real_logprobs(real_model(), tokens))
    print(f"wrote {REAL_GOLDEN.name}, {REAL_GOLDEN.stat().st_size} bytes")
    for case in family_cases.CASES:
        with tempfile.TemporaryDirectory() as directory:
            np.savez_compressed(family_cases.STORED / f"{case}.npz", **family_cases.reference(case, Path(directory)))
        print(f"wrote {case}.npz, {(family_cases.STORED / f'{case}.npz').stat().st_size} bytes")
