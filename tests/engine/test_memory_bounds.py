"""Does memory stay within what was promised: while loading, without a [T, V] array, and near the estimate?

Loading is measured in a child process. Programs are compiled from shapes alone and asked for their own account of what
they allocate; nothing runs.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.core.attention_check import choose_attention
from jax_client.engine.core.memory import PassMemory
from jax_client.engine.train.packing import Plan
from jax_client.engine.train.trainer import Trainer
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.parts.kind import Remat
from jax_client.models.specs import ParamSpec
from jax_client.sharding import make_mesh, sharding_for
from jax_client.threads import Workers
from jax_client.values import LoraSpec
from support.children import STRICT
from support.weight_files import HF_CONFIG, hf_tensors, write_hf
from support.weights.quantized import E4M3, FP8, write_release

# 232 MB in float32; the largest tensor is a fortieth of it, as in the models that fill a machine's memory.
LARGE = HF_CONFIG | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
# VmHWM and not getrusage's ru_maxrss: the latter begins with what the parent had, and pytest's process is large.
LOAD = """
import json, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jax_client.sharding import make_mesh
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import resolve

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

jax.block_until_ready(jax.jit(jnp.dot)(jnp.ones((8, 8)), jnp.ones((8, 8))))
source = resolve(sys.argv[1])
config, mesh = read_config(source), make_mesh("auto", jax.devices())
before = status("VmRSS")
params = load_params(source, config, jnp.dtype(sys.argv[2]), mesh, bits=True)
print(json.dumps([before, status("VmHWM"), sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `LARGE` with random weights, in shards."""
    return write_hf(tmp_path_factory.mktemp("large"), LARGE, hf_tensors(LARGE), n_shards=5)


@pytest.fixture(scope="module")
def large_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of 218 MB in float32, in FP8 with random codes and blocks of 128 x 128.

    Each thread that reads has the codes of a tensor and its rounded numbers, so the layers are small and many.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LARGE | sizes | {"num_hidden_layers": 56}
    rng, stored = np.random.default_rng(0), hf_tensors(config)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        codes = rng.integers(0, 0x7F, stored[name].shape, dtype=np.uint8).view(E4M3)
        scales = rng.random([-(-side // 128) for side in codes.shape], np.float32)
        stored |= {name: codes, name + "_scale_inv": scales}
    config["quantization_config"] = FP8
    return write_release(tmp_path_factory.mktemp("large_release"), config, stored, n_shards=5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("files", ["large_model", "large_release"])
def test_loading_holds_the_weights_once(files: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """The files are float32 or FP8: a tensor is converted on the way, and not in a second copy of a stack or the model.

    The peak counts the mapped pages of the tensors being read, too, which the kernel could drop.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [*STRICT, "-c", LOAD, str(request.getfixturevalue(files)), dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before, peak, weights = json.loads(done.stdout.splitlines()[-1])
    assert weights > 100e6
    assert peak - before <= 1.2 * weights, f"{(peak - before) / weights:.2f} times the weights"


@dataclass(frozen=True)
class Account:
    """What a compiled program says that it allocates, in bytes."""

    temporaries: int
    outputs: int


def compile_step(
    c: ModelConfig, spec: LoraSpec, tokens: int, dtype: Any, remat: Remat, targets: int = 1
) -> tuple[Account, Account]:
    """Compile a micro-batch's forward and backward programs from shapes, for one device."""
    mesh, dtype = make_mesh("auto", jax.devices()[:1]), jnp.dtype(dtype)

    def stored(p: ParamSpec) -> jax.ShapeDtypeStruct:
        kind = np.uint16 if p.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else p.dtype  # `layers.to_bits`
        return jax.ShapeDtypeStruct(p.shape, kind, sharding=sharding_for(p.axes, p.shape, mesh))

    params = jax.tree.map(stored, param_specs(c, dtype), is_leaf=lambda p: isinstance(p, ParamSpec))
    attention = choose_attention(mesh, c, dtype)
    settings: dict[str, Any] = {"max_tokens": tokens, "remat": remat, "memory_fraction": 0.9, "cache_bytes": 0}
    compilers = Workers("test-compile", 1)
    trainer = Trainer(params, c, dtype, mesh, attention, [], **settings, make_room=bool, compilers=compilers)
    plan = Plan(rows=1, length=tokens, slots=())
    for compile_ in trainer.ahead.passes(spec, plan, targets, "warmup"):
        compile_()
    accounts = []
    for program in (trainer.programs.forward, trainer.programs.backward):
        (compiled,) = program._compiled.values()
        size = compiled.future.result().memory_analysis()
        accounts.append(Account(temporaries=size.temp_size_in_bytes, outputs=size.output_size_in_bytes))
    return accounts[0], accounts[1]


def sizes(**fields: int) -> ModelConfig:
    shared = {"family": "llama", "norm_eps": 1e-5, "rope_theta": 1e4, "tied_embeddings": False, "max_context": 4096}
    return ModelConfig(**shared, **fields)  # type: ignore[arg-type]


TOKENS = 2048


@pytest.mark.parametrize("train_unembed", [False, True])
def test_no_array_holds_every_token_s_scores(train_unembed: bool) -> None:
    c = sizes(vocab_size=50_000, d_model=64, d_ff=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16)
    spec = LoraSpec(rank=4, seed=0, train_unembed=train_unembed)
    for account in compile_step(c, spec, TOKENS, "float32", "none"):
        assert account.temporaries + account.outputs < TOKENS * c.vocab_size * 4 / 4


@pytest.mark.parametrize(
    ("remat", "targets"),
    [("none", 1), ("full", 64), *(pytest.param(remat, 1, marks=pytest.mark.full) for remat in ("selective", "full"))],
)
def test_the_estimate_is_near_the_compiler_s_account(remat: Remat, targets: int) -> None:
    c = sizes(vocab_size=8000, d_model=256, d_ff=1024, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64)
    spec, dtype = LoraSpec(rank=16, seed=0), jnp.dtype("bfloat16")
    forward, backward = compile_step(c, spec, TOKENS, dtype, remat, targets)
    mesh = make_mesh("auto", jax.devices()[:1])
    blocks = Blocks.of(jax.default_backend())
    passes = PassMemory(config=c, dtype=dtype, mesh=mesh, attention="blockwise", blocks=blocks)
    parts = passes.step(remat, TOKENS, spec, targets)

    # Of the head's part, what is kept beside its blocks of scores: four arrays as wide as the residual stream.
    kept = parts["activations"] + 4 * 4 * TOKENS * c.d_model
    assert 0.75 <= forward.outputs / kept <= 1.25, f"{forward} against {kept}"
    saved = forward.outputs - 2 * 4 * TOKENS * targets  # without the logprobs and their cotangents
    most = max(forward.temporaries + forward.outputs, backward.temporaries + backward.outputs + saved)
    assert 0.7 <= sum(parts.values()) / most <= 2, f"{parts} against {most}: {forward}, {backward}, saved {saved}"
