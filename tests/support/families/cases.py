"""Which families beyond the first do the goldens describe, and what does torch say of them?

Weights and data come from seeds. transformers computes the logprobs, and autograd the gradients: through weights with
the adapter added to them, since peft trains another form of adapter on experts. An adapter's arrays are the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.models.families.registry import config_from_hf
from jax_client.models.lora_arrays import array_shapes
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.values import LoraSpec, TrainExample
from jax_client.weights.read.names import expected_tensors
from support.golden_cases import ADAM, GOLDENS, RANK, STEPS
from support.weight_files import write_hf

_BASE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe_mixed": _BASE,
    "qwen3_moe_raw": _BASE
    | {
        "num_hidden_layers": 4,
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}
_WINDOWED: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
CASES |= {
    "gpt_oss": _WINDOWED
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
    "gemma3": _WINDOWED
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "intermediate_size": 96,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
        "tie_word_embeddings": True,
    },
    "mistral": _WINDOWED
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}
_HYBRID: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": False,
}
_SHARED: dict[str, Any] = _HYBRID | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_5": _HYBRID | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"},
    "qwen3_5_moe": {name: value for name, value in _SHARED.items() if name != "intermediate_size"}
    | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"},
    "qwen3_next": _SHARED
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
}
CASES |= HYBRID
STORED = GOLDENS / "families"
SPEC = LoraSpec(rank=RANK, seed=0)
# With these no token of the data has two experts of almost equal probability.
SEEDS = {
    "qwen3_moe_mixed": 7,
    "qwen3_moe_raw": 8,
    "gpt_oss": 29,
    "gemma3": 10,
    "mistral": 11,
    "qwen3_5": 12,
    "qwen3_5_moe": 95,
    "qwen3_next": 115,
}


def model_config(case: str) -> ModelConfig:
    return config_from_hf(CASES[case], case)


def tensors(case: str) -> dict[str, np.ndarray]:
    """Return random weights under the names of a release, with the experts apart."""
    c, rng = model_config(case), np.random.default_rng(SEEDS[case])
    if not case.startswith("qwen3_moe"):
        return {name: _drawn(name, shape, case, rng) for name, shape in sorted(expected_tensors(c).items())}
    D, V, N, K, H = c.d_model, c.vocab_size, c.n_heads, c.n_kv_heads, c.head_dim
    assert c.experts is not None
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c.tied_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(c.n_layers):
        layer = f"model.layers.{i}."
        heads = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": shape for name, shape in heads.items()}
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (H,) for name in "qk"}
        shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        dense = i in c.experts.dense_layers
        F, prefixes = (c.d_ff, [""]) if dense else (c.experts.d_ff, [f"experts.{e}." for e in range(c.experts.count)])
        for prefix in prefixes:
            mlp = {"gate": (F, D), "up": (F, D), "down": (D, F)}
            shapes |= {f"{layer}mlp.{prefix}{name}_proj.weight": shape for name, shape in mlp.items()}
        if not dense:
            shapes[f"{layer}mlp.gate.weight"] = (c.experts.count, D)
    scale = lambda name, x: 1 + 0.1 * x if "norm" in name else 0.25 * x  # noqa: E731
    return {name: scale(name, rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], case: str, rng: np.random.Generator) -> np.ndarray:
    """Return weights with which every branch matters: gates of gpt-oss reach their clamp.

    Parts of Qwen3.5 and Qwen3-Next add little to the stream: the norm behind the rule makes much of what is left of
    small outputs.

    Its queries and keys are small, as without norms steep attention in four layers makes float32 differ from float64 by
    1e-4 after five steps, in torch as here.
    """
    scale, plus = 0.25, 0.0
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.05, 4, size=shape)).astype(np.float32)
    if "norm" in name or name.endswith("dt_bias"):
        added = case == "gemma3" or (case in HYBRID and "linear_attn" not in name)
        scale, plus = 0.1, 0.0 if added else 1.0
    elif name.endswith(("bias", "sinks")):
        scale = 0.1
    elif case in HYBRID:
        scale = {"embed_tokens": 1.0, "out_proj": 0.05, "o_proj": 0.05, "down_proj": 0.1}.get(name.split(".")[-2], 0.25)
    elif case == "gpt_oss" and name.endswith(("q_proj.weight", "k_proj.weight")):
        scale = 0.15
    elif name.endswith("experts.gate_up_proj"):
        scale = 0.35
    return (plus + scale * rng.normal(size=shape)).astype(np.float32)


def fused(case: str) -> dict[str, np.ndarray]:
    """Return the weights with the experts of a layer as one tensor, as some programs save them."""
    c, found = model_config(case), tensors(case)
    assert c.experts is not None
    for i in set(range(c.n_layers)) - set(c.experts.dense_layers):
        prefix = f"model.layers.{i}.mlp.experts."
        of = {
            name: np.stack([found.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(c.experts.count)])
            for name in ("gate", "up", "down")
        }
        found |= {f"{prefix}gate_up_proj": np.concatenate([of["gate"], of["up"]], axis=1)}
        found |= {f"{prefix}down_proj": of["down"]}
    return found


def adam(case: str) -> dict[str, Any]:
    """Return the settings of the optimizer's steps.

    They are small where experts follow a gated delta rule: five of 1e-4 move a logprob there by 2.6. Adam
    divides gradients by their sizes, so that where those of all tokens almost cancel, rounding decides which way a
    whole step goes; and a router between two experts that have become almost equal chooses the other.
    """
    return ADAM | ({"learning_rate": 2e-5} if case in HYBRID and model_config(case).experts else {})


def adapter(case: str) -> dict[str, np.ndarray]:
    """Return an adapter's arrays by flat name, none of them zero."""
    rng, arrays = np.random.default_rng(1), {}
    for name, shape in array_shapes(model_config(case), SPEC).items():
        arrays[name] = (rng.normal(size=shape) * (0.1 if name.endswith(".A") else 0.02)).astype(np.float32)
    return arrays


def data(case: str) -> list[TrainExample]:
    """Return three ragged sequences; one is longer than a page of the sampler, and no multiple of it."""
    rng, out = np.random.default_rng(2), []
    for n in (9, 48, 14):
        tokens = rng.integers(0, CASES[case]["vocab_size"], n + 1).astype(np.int32)
        inputs = {"weights": rng.uniform(0, 2, n).astype(np.float32)}
        out.append(TrainExample(tokens_T=tokens[:-1], targets=tokens[1:], inputs=inputs))
    return out


def torch_model(path: Path, c: ModelConfig, dtype: str = "float32", of: str = "AutoModelForCausalLM") -> Any:
    """Return transformers' model of a directory; the directory must hold every tensor and no other."""
    import torch
    import transformers

    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager", "output_loading_info": True}
    if c.experts is not None:
        options["experts_implementation"] = "eager"
    model, info = getattr(transformers, of).from_pretrained(path, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Return logprobs and gradients of the adapter before training, and logprobs after `STEPS` steps of AdamW."""
    import torch

    model = torch_model(write_hf(directory, CASES[case], tensors(case)), model_config(case))
    gaps: list[float] = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(lambda gate, args, _: gaps.append(_gap(args[0], gate, CASES[case])))
    base = dict(model.named_parameters())
    lora = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in adapter(case).items()}
    rows = [{"tokens": torch.from_numpy(d.tokens_T), "targets": torch.from_numpy(d.targets)} for d in data(case)]
    weights = [torch.from_numpy(d.inputs["weights"]) for d in data(case)]

    def logprobs(row: dict[str, Any]) -> Any:
        merged = with_adapter(model_config(case), base, lora, tied=model.config.tie_word_embeddings)
        head = merged.pop("lm_head.weight")
        h = torch.func.functional_call(model.model, _inner(merged), (row["tokens"][None].long(),), {"use_cache": False})
        logits = h.last_hidden_state[0] @ head.T
        return torch.log_softmax(logits, -1).gather(-1, row["targets"][:, None].long())[:, 0]

    settings = adam(case)
    optimizer = torch.optim.AdamW(
        list(lora.values()),
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    out: dict[str, np.ndarray] = {}
    for step in range(STEPS):
        found = [logprobs(row) for row in rows]
        loss = -sum((w * p).sum() for w, p in zip(weights, found, strict=True))
        loss.backward()
        if step == 0:
            out = {f"logprobs.{i}": p.detach().numpy() for i, p in enumerate(found)}
            out |= {f"grad.{name}": np.asarray(p.grad).copy() for name, p in lora.items()}
            out["loss"] = np.asarray(loss.detach())
        torch.nn.utils.clip_grad_norm_(list(lora.values()), settings["grad_clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
    out |= {f"trained.{i}": logprobs(row).detach().numpy() for i, row in enumerate(rows)}
    # Where two experts are that close, rounding chooses between them, and no tolerance holds.
    assert min(gaps, default=1) > 1e-5, min(gaps)
    return out


def _gap(x: Any, router: Any, config: Mapping[str, Any]) -> float:
    k, logits = config["num_experts_per_tok"], x.detach().reshape(-1, x.shape[-1]) @ router.weight.detach().T
    if (bias := getattr(router, "bias", None)) is not None:
        logits += bias.detach()
    best = logits.softmax(-1).topk(k + 1).values
    return float((best[:, k - 1] - best[:, k]).min())


def _inner(merged: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in merged.items()}


def with_adapter(c: ModelConfig, base: Mapping[str, Any], lora: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the model's parameters with the adapter added: W (out, in) + alpha / rank (A B)^T."""
    import torch

    s, merged = LORA_ALPHA / RANK, dict(base)
    head = base["model.embed_tokens.weight"] if tied else base["lm_head.weight"]
    merged["lm_head.weight"] = head + s * lora["unembed.B"].T @ lora["unembed.A"]
    dense = list(range(c.n_layers)) if c.experts is None else sorted(c.experts.dense_layers)
    recurrent = [] if c.delta is None else list(c.delta.layers)
    for i in range(c.n_layers):
        layer = f"model.layers.{i}."
        if i in recurrent:
            of = {
                name: s * lora[f"delta_{name}.B"][recurrent.index(i)].T @ lora[f"delta_{name}.A"][recurrent.index(i)]
                for name in "qkvz"
            }
            out = lora["delta_out.A"][recurrent.index(i)].reshape(RANK, -1)
            added = {"in_proj_qkv": torch.cat([of[name] for name in "qkv"]), "in_proj_z": of["z"]}
            if c.family == "qwen3_next":  # of each key head the rows of all four
                rows = [of[name].unflatten(0, (c.delta.key_heads, -1)) for name in "qkvz"]
                added = {"in_proj_qkvz": torch.cat(rows, 1).flatten(0, 1)}
            added["out_proj"] = s * lora["delta_out.B"][recurrent.index(i)].T @ out
            for name, matrix in added.items():
                merged[f"{layer}linear_attn.{name}.weight"] = base[f"{layer}linear_attn.{name}.weight"] + matrix
        for name in () if i in recurrent else "qkvo":
            a, b = (lora[f"{name}.{ab}"][i - sum(d < i for d in recurrent)] for ab in "AB")
            if name == "q" and c.output_gate:  # of each head the query's rows, then the gate's
                b = b.unflatten(2, (2, c.group)).transpose(2, 3)
            a, b = a.reshape(RANK, -1), b.reshape(RANK, -1)
            merged[f"{layer}self_attn.{name}_proj.weight"] = base[f"{layer}self_attn.{name}_proj.weight"] + s * b.T @ a
        if i in dense:
            for name in ("gate", "up", "down"):
                a, b = (lora[f"{name}.{ab}"][dense.index(i)] for ab in "AB")
                merged[f"{layer}mlp.{name}_proj.weight"] = base[f"{layer}mlp.{name}_proj.weight"] + s * b.T @ a
            continue
        at = i - sum(d < i for d in dense)
        for name in ("gate", "up", "down") if c.experts.shared_d_ff else ():
            a, b = (lora[f"shared_{name}.{ab}"][at] for ab in "AB")
            matrix = f"{layer}mlp.shared_expert.{name}_proj.weight"
            merged[matrix] = base[matrix] + s * b.T @ a
        of = {f"{name}.{ab}": lora[f"experts_{name}.{ab}"][at] for name in ("gate", "up", "down") for ab in "AB"}
        both = [torch.einsum("ref,rd->efd", of[f"{name}.B"], of[f"{name}.A"]) for name in ("gate", "up")]
        experts = f"{layer}mlp.experts."
        if c.family == "gpt_oss":  # (E, D, 2F), columns of gate and up by turns, and (E, F, D)
            gate_up_EDF2 = torch.stack([matrix.transpose(1, 2) for matrix in both], -1)
            merged[f"{experts}gate_up_proj"] = base[f"{experts}gate_up_proj"] + s * gate_up_EDF2.flatten(2)
            down = torch.einsum("ref,rd->efd", of["down.A"], of["down.B"])
            merged[f"{experts}down_proj"] = base[f"{experts}down_proj"] + s * down
            continue
        merged[f"{experts}gate_up_proj"] = base[f"{experts}gate_up_proj"] + s * torch.cat(both, 1)
        down = torch.einsum("rd,ref->edf", of["down.B"], of["down.A"])
        merged[f"{experts}down_proj"] = base[f"{experts}down_proj"] + s * down
    return merged
