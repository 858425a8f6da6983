"""Does a profile of the programs name their parts? Every operation carries the scopes that it was traced in."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.core import adapters
from jax_client.engine.core.requests import MAX_TARGETS, AdamSettings
from jax_client.engine.sample.batches import STATE, RowFields
from jax_client.engine.sample.device.programs import SamplePrograms
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.train import packing
from jax_client.engine.train.programs import TrainPrograms
from jax_client.losses import registry
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.parts import attention
from jax_client.models.specs import ParamSpec
from jax_client.sharding import make_mesh
from jax_client.values import LoraSpec, TrainExample

F32, SPEC = jnp.dtype("float32"), LoraSpec(rank=4, seed=0)
MESH = make_mesh("auto", jax.devices())
CONFIG = ModelConfig(
    family="qwen3", vocab_size=61, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, norm_eps=1e-5,
    rope_theta=1e4, tied_embeddings=True, max_context=64, qk_norm=True,
)  # fmt: skip
PARAMS = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
    param_specs(CONFIG, F32),
    is_leaf=lambda node: isinstance(node, ParamSpec),
)
WEIGHTS = adapters.abstract_weights(CONFIG, SPEC, MESH)
LAYER = {
    "layer/attention/norm", "layer/attention/rope", "layer/attention/softmax", "layer/attention/lora",
    "layer/mlp/norm", "layer/mlp/lora",
}  # fmt: skip


def array(shape: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def training_batch() -> dict[str, Any]:
    (plan,) = packing.plan_call([40], packing.Limits(ways=1, tokens=256))
    datum = TrainExample(tokens_T=np.zeros(40, np.int32), targets=np.zeros((40, 2), np.int32))
    batch = packing.fill(plan, [datum], dict.fromkeys(registry.INPUTS, 0.0))
    return {f.name: jax.device_put(getattr(batch, f.name)) for f in fields(batch) if f.name != "plan"}


def train_programs() -> TrainPrograms:
    return TrainPrograms(CONFIG, F32, MESH, attention.blockwise(one_cpu=True), [])


def forward() -> jax.stages.Lowered:
    return train_programs().forward.lower(PARAMS, WEIGHTS, training_batch(), array(()), remat="full")


def backward() -> jax.stages.Lowered:
    programs, batch = train_programs(), training_batch()
    _, g_BTC, _, saved = forward().out_info
    return programs.backward.lower(PARAMS, WEIGHTS, batch, saved, g_BTC, WEIGHTS)


def optimizer() -> jax.stages.Lowered:
    settings = {field.name: array((), np.float32) for field in fields(AdamSettings)}
    return train_programs().optim_step.lower(WEIGHTS, WEIGHTS, WEIGHTS, WEIGHTS, array(()), settings)


def sample_programs() -> tuple[SamplePrograms, dict[str, Any]]:
    programs = SamplePrograms(CONFIG, F32, MESH, attention.blockwise(one_cpu=True), [])
    return programs, programs.pools.new(1, 8, 0)


def unrolled(stacks: Any) -> dict[str, list[Any]]:
    """Return the layers' parameters apart, as one CPU takes them."""
    cut = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=a.sharding)  # noqa: E731
    layer = jax.tree.map(cut, stacks)
    layer["dense"]["gate_up_L2DF"] = (cut(layer["dense"]["gate_up_L2DF"]),) * 2
    return {kind: [leaves] * CONFIG.n_layers for kind, leaves in layer.items()}


def prefill(params: Any) -> jax.stages.Lowered:
    programs, pool = sample_programs()
    tiles, pages, positions = 2, 4, 2 * PAGE
    batch = {
        "tokens": array((1, tiles, PAGE)),
        "start": array((1, tiles)),
        "page": array((1, tiles)),
        "table": array((1, tiles, pages)),
        "scale": array((1, tiles, 1), np.float32),
        "targets": array((1, positions, MAX_TARGETS)),
        "number": array((1, positions, 4), np.uint32),
        "temperature": array((1, positions), np.float32),
        "top_k": array((1, positions)),
        "top_p": array((1, positions), np.float32),
        "wanted": array((1, 3)),
    }
    return programs.prefill.lower(params, (WEIGHTS,), pool, batch)


def decode(params: Any) -> jax.stages.Lowered:
    programs, pool = sample_programs()
    batch = {
        "settings": array((1, 4, RowFields(4, 1).width)),
        "state": array((1, 4, len(STATE))),
        "steps": array(()),
    }
    return programs.decode.lower(params, (WEIGHTS,), pool, batch)


def scopes(lowered: jax.stages.Lowered) -> set[str]:
    """The names of the operations, as a profile shows them, without what control flow adds.

    The body of a loop may be a function of its own, whose names begin anew; a profile puts the caller's before them.
    """
    names = re.findall(r'loc\("([^"]*/[^"]*)"', lowered.as_text(debug_info=True))
    if any("jit(layer)" in name for name in names):  # one function for all layers: XLA names it after each caller
        names += re.findall(r'op_name="([^"]*/[^"]*)"', lowered.compile().as_text())
    added = re.compile(r"(jit\(\w+\)/|while/body/|while/cond/|cond/branch_\d+_fun/|closed_call/)")
    return {added.sub("", name) for name in names}


def test_every_part_of_the_forward_program_has_its_scope() -> None:
    check("forward", forward(), {"embed", "rope", "norm", "head", "head/lora", "loss", *LAYER})


def test_every_part_of_the_backward_program_has_its_scope() -> None:
    recomputed = {part.replace("layer", "layer/recompute", 1) for part in LAYER}
    check("backward", backward(), {"norm", "rope", "head", "head/lora", "accumulate", *LAYER, *recomputed})


def test_every_part_of_the_optimizer_has_its_scope() -> None:
    check("optim_step", optimizer(), {"optimizer"})


def layers_of(params: Any) -> set[str]:
    if params is PARAMS:
        return set(LAYER)
    return {part.replace("layer", f"layer_{i}", 1) for part in LAYER for i in range(CONFIG.n_layers)}


@pytest.mark.parametrize("params", [PARAMS, PARAMS | {"layers": unrolled(PARAMS["layers"])}], ids=["stacks", "list"])
def test_every_part_of_sampling_has_its_scope(params: Any) -> None:
    layers = layers_of(params)
    check("prefill", prefill(params), {"embed", "rope", "norm", "scores", "head", "top", *layers})
    check("decode", decode(params), {"embed", "rope", "norm", "head", "draw", "top", "copy_pages", *layers})


def check(program: str, lowered: jax.stages.Lowered, expected: set[str]) -> None:
    assert f"@jit_{program}" in lowered.as_text(), "the name of the program, too"
    names = {name.removeprefix(f"{program}/") for name in scopes(lowered)}
    missing = {scope for scope in expected if not any(f"{name}/".startswith(f"{scope}/") for name in names)}
    assert not missing, sorted(names)
