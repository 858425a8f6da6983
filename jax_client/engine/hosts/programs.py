"""Which programs has an engine? By name, the same on every host that is told to run them."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.engine.core.attention_check import attention_named
from jax_client.engine.core.paged_check import paged_attention_named
from jax_client.engine.core.programs import AnyProgram, CompileRecord
from jax_client.engine.sample.device.programs import SamplePrograms
from jax_client.engine.sample.device.weights import gather_program
from jax_client.engine.train.logits import logits_program
from jax_client.engine.train.programs import TrainPrograms
from jax_client.models.config import ModelConfig


def device_programs(
    model: ModelConfig, dtype: jnp.dtype, mesh: Mesh, attention: str, paged: str, log: list[CompileRecord]
) -> dict[str, AnyProgram]:
    """Return the programs of an engine as its own host has them, for one that follows.

    Args:
        model, dtype, mesh: of the engine.
        attention, paged: names of what its host has chosen.
        log: of compiles.
    """
    kernel = attention_named(attention, mesh)
    sample = SamplePrograms(model, dtype, mesh, kernel, log, paged_attention_named(paged, mesh, model, dtype))
    every: list[AnyProgram] = [
        *TrainPrograms(model, dtype, mesh, kernel, log).all,
        sample.prefill,
        sample.decode,
        gather_program(model, dtype, mesh, log),
        logits_program(dtype, kernel, mesh, log),
    ]
    return {program.name: program for program in every}
