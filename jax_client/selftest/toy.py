"""Which model does the self-test compute with? A toy whose weights, adapter and data are drawn from fixed seeds.

The weights are numbers that bfloat16 holds, so one set of files serves both types, and what differs from the reference
is the arithmetic. Its heads are 128 wide, as the accelerators' kernels want them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.models.families.registry import config_from_hf
from jax_client.models.lora_arrays import array_shapes
from jax_client.values import AdapterState, JsonObject, LoraSpec, TrainExample
from jax_client.weights.write.shards import Tensor, write_file

BF16 = np.dtype(ml_dtypes.bfloat16)
SPEC = LoraSpec(rank=4, seed=0)
# Of training sequences: a single token, ends of blocks and of pages, and enough of them that eight devices have rows.
LENGTHS = (70, 1, 100, 33, 128, 5, 64, 90, 31, 120, 17, 96, 77, 2, 110, 60)
PROMPTS = (3, 9, 17, 31, 33, 40, 64, 70)
NEW_TOKENS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    """The sizes of a random model of the Qwen3 family."""

    vocab: int = 512
    width: int = 128
    ffw: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 128
    context: int = 512

    def config(self) -> JsonObject:
        """Return its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffw,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "eos_token_id": 2,
        }

    def model(self) -> ModelConfig:
        """Return what an engine makes of that config."""
        return config_from_hf(self.config(), "toy")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors by the names that files have."""
        D, F, N, K, H = self.width, self.ffw, self.heads, self.kv_heads, self.head_width
        layer = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (N * H, D),
            "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D),
            "self_attn.q_norm": (H,),
            "self_attn.k_norm": (H,),
            "self_attn.o_proj": (D, N * H),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, D)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": (D,), "lm_head.weight": (self.vocab, D)}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return its weights, float32 arrays of numbers that bfloat16 holds, at a scale of a few nats."""
        rng, found = np.random.default_rng(0), {}
        for name, shape in self.shapes().items():
            drawn = rng.standard_normal(shape, np.float32)
            drawn = 1 + 0.1 * drawn if len(shape) == 1 else drawn * np.float32(1.2 * shape[-1] ** -0.5)
            found[name] = drawn.astype(BF16).astype(np.float32)
        return found

    def write(self, directory: Path) -> Path:
        """Write the model as a new directory in Hugging Face layout; return the directory."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config()))
        tensors = self.tensors().items()
        each = [Tensor(name=n, shape=a.shape, rows=lambda i, j, a=a: a[i:j].astype(BF16)) for n, a in tensors]
        write_file(directory / "model.safetensors", each, BF16)
        return directory


def adapter(model: ModelConfig) -> AdapterState:
    """Return an adapter of all modules, none of whose arrays is zero."""
    rng, weights = np.random.default_rng(1), {}
    for name, shape in array_shapes(model, SPEC).items():
        scale = 0.1 if name.endswith("A") else 0.02
        weights[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return AdapterState(spec=SPEC, step=0, weights=weights)


def examples(vocab: int, lengths: tuple[int, ...] | None = None) -> list[TrainExample]:
    """Return training sequences of these lengths, `LENGTHS` if none are given, targets weighted between 0 and 2."""
    rng, found = np.random.default_rng(2), []
    for length in LENGTHS if lengths is None else lengths:
        ids = rng.integers(0, vocab, length + 1).astype(np.int32)
        weights = rng.uniform(0, 2, length).astype(np.float32)
        found.append(TrainExample(tokens_T=ids[:-1], targets=ids[1:], inputs={"weights": weights}))
    return found


def prompts(vocab: int, lengths: tuple[int, ...] | None = None, seed: int = 3) -> list[np.ndarray]:
    """Return prompts of these lengths, `PROMPTS` if none are given, int32 (T,)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).astype(np.int32) for length in (PROMPTS if lengths is None else lengths)]


def pair_of(weights: Mapping[str, np.ndarray], module: str, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a module's A (R, inputs) and B (R, outputs) of one layer, or of the output projection for None."""
    a, b = weights[f"{module}.A"], weights[f"{module}.B"]
    a, b = (a, b) if layer is None else (a[layer], b[layer])
    return a.reshape(len(a), -1), b.reshape(len(b), -1)
