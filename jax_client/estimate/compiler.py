"""What do XLA's compilers say of a model's programs on devices that are not here? Run as a process: JSON in, JSON out.

The environment has to keep jax from looking for devices, so this is a process of its own; `compile` starts it. Each
line that it prints after `MARK` is one program's account, or its error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jax_client.engine.core import adapters
from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.attention_check import kernel_of, plain_attention
from jax_client.engine.core.programs import Program
from jax_client.engine.sample.batches import Batches
from jax_client.engine.sample.device.programs import BLOCK_STEPS, SamplePrograms
from jax_client.engine.sample.device.weights import WHOLE, whole_specs
from jax_client.engine.train.programs import TrainPrograms
from jax_client.engine.train.shapes import batch_shapes, loss_shape, step_shapes
from jax_client.estimate import hlo
from jax_client.models.config import ModelConfig, config_from_fields
from jax_client.models.decoder import Params, param_specs
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.kind import Remat
from jax_client.models.specs import ParamSpec
from jax_client.sharding import make_mesh, sharding_for
from jax_client.values import LoraSpec

MARK = "compiled: "
# Of an H100: numbers that are measured on one and those of one that is described differ in what autotuning chooses.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}


def main() -> None:
    """Compile what the question on the standard input asks for."""
    question = json.load(sys.stdin)
    config = config_from_fields(question["model"])
    mesh = make_mesh(question["mesh"], _devices(question["topology"]))
    spec, dtype, wanted = LoraSpec(**question["adapter"]), jnp.dtype(question["dtype"]), question["programs"]
    options = GPU_OPTIONS if question["topology"]["platform"] == "cuda" else {}
    rectangle = question["rows"], question["length"]
    _train(wanted, config, dtype, mesh, spec, rectangle, question["remat"], options)
    _sample(wanted, config, dtype, mesh, spec, tuple(question["sample"]), options, whole=question["whole"])


def _devices(topology: dict[str, Any]) -> list[Any]:
    fields = {name: value for name, value in topology.items() if value is not None}
    return list(topologies.get_topology_desc(**fields).devices)


def _report(program: Program[..., Any], options: dict[str, Any], *args: Any, **static: Any) -> Any:
    """Compile a program, print its account, and return it; an error is printed, and None returned."""
    start, cpu = time.perf_counter(), time.process_time()
    try:
        compiled = program.lower(*args, **static).compile(compiler_options=program.options | options)
    except jax.errors.JaxRuntimeError as error:
        print(f"{MARK}{json.dumps({'program': program.name, 'error': str(error)[:4000]})}", flush=True)
        return None
    size: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    plain = hlo.argument_bytes(text)
    account = {
        "program": program.name,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "arguments": size.argument_size_in_bytes,
        "padding": size.argument_size_in_bytes - plain,
        "temporaries": size.temp_size_in_bytes,
        "outputs": size.output_size_in_bytes,
        "aliased": size.alias_size_in_bytes,
        "peak": getattr(size, "peak_memory_in_bytes", None),
        "collectives": [asdict(row) for row in hlo.traffic(text)],
        "copies": hlo.copies(text, 16 * 2**20),
    }
    print(f"{MARK}{json.dumps(account)}", flush=True)
    return compiled


def _params(specs: Any, mesh: Mesh) -> Params:
    """Return base weights as shapes with their places."""

    def placed(p: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding_for(p.axes, p.shape, mesh))

    return jax.tree.map(placed, specs, is_leaf=lambda p: isinstance(p, ParamSpec))


def _attention(mesh: Mesh, c: ModelConfig, dtype: jnp.dtype) -> Attention:
    """Return the attention of training: cuDNN's needs the device's library, which is not here."""
    kernel = kernel_of(mesh, c, dtype) if mesh.devices.flat[0].platform == "tpu" else None
    return kernel or plain_attention(mesh)


def _train(
    wanted: Collection[str],
    c: ModelConfig,
    dtype: jnp.dtype,
    mesh: Mesh,
    spec: LoraSpec,
    rectangle: tuple[int, int],
    remat: Remat,
    options: dict[str, Any],
) -> None:
    """Compile a pass over a micro-batch of (rows, length), and an optimizer step."""
    rows, length = rectangle
    programs = TrainPrograms(c, dtype, mesh, _attention(mesh, c, dtype), [])
    params = _params(param_specs(c, dtype), mesh)
    weights: Any = adapters.abstract_weights(c, spec, mesh)
    batch = batch_shapes(rows, length, 1, mesh)
    arguments = params, weights, batch, loss_shape(mesh)
    if {"forward", "backward"} & set(wanted):
        compiled = _report(programs.forward, options, *arguments, remat=remat)
        if "backward" in wanted and compiled is not None:
            place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
            shapes = programs.forward.shapes(*arguments, remat=remat)
            _, g_BTC, _, saved = jax.tree.map(place, shapes, compiled.output_shardings)
            _report(programs.backward, options, params, weights, batch, saved, g_BTC, weights)
    if "optim_step" in wanted:
        _report(programs.optim_step, options, *step_shapes(weights, mesh))


def _sample(
    wanted: Collection[str],
    c: ModelConfig,
    dtype: jnp.dtype,
    mesh: Mesh,
    spec: LoraSpec,
    sizes: tuple[int, int, int, int],
    options: dict[str, Any],
    *,
    whole: bool,
) -> None:
    """Compile decode and prefill; `sizes` are rows of a block, tiles of a prefill, pages and states, all per way.

    `whole` has the ways hold whole weights to decode with.
    """
    programs = SamplePrograms(c, dtype, mesh, _attention(mesh, c, dtype), [])
    rows, tiles, pages, states = sizes
    batches = Batches.of(mesh, c)
    params = {WHOLE: _params(whole_specs(c, dtype), mesh)} if whole else _params(param_specs(c, dtype), mesh)
    version: Any = Snapshot(spec=spec, weights=adapters.abstract_weights(c, spec, mesh))  # type: ignore[arg-type]
    pool, loras = programs.pools.shapes(batches.ways, pages, states), (version.weights,)
    block = batches.of_rows([], rows, [version]) | {"steps": np.asarray(BLOCK_STEPS, np.int32)}
    for program, batch in ((programs.decode, block), (programs.prefill, batches.of_tiles([], tiles, version))):
        if program.name in wanted:
            arguments: Any = params, loras, pool, batches.shapes(batch)
            with jax.set_mesh(mesh):  # by which a kernel knows the chip
                _report(program, options, *arguments)


if __name__ == "__main__":
    main()
