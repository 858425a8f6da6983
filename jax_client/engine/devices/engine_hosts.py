"""How does one engine have the other hosts of its mesh do what it does?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.config import EngineConfig
from jax_client.engine.devices.leader import Leader
from jax_client.engine.devices.specs import sizes_of
from jax_client.engine.devices.verbs import Load
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, param_specs
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.source import ModelSource

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHosts:
    """The other hosts of an engine's mesh; implements `programs.OtherHosts`.

    Attributes:
        leader: which tells them.
        mesh, dtype: of the engine.
        settings: of the engine.
        number: of the engine.
    """

    leader: Leader
    mesh: Mesh
    dtype: jnp.dtype
    settings: EngineConfig
    number: int

    @classmethod
    def of(cls, leader: Leader | None, mesh: Mesh, dtype: jnp.dtype, settings: EngineConfig) -> EngineHosts | None:
        """Return those of a new engine; None where its mesh has this host alone."""
        if leader is None:
            return None
        return cls(leader=leader, mesh=mesh, dtype=dtype, settings=settings, number=leader.open_engine())

    def load(
        self, source: ModelSource, model: ModelConfig, read: Callable[[], Params], *, beside: bool = False
    ) -> Params:
        """Return the weights, of which each host has read its own parts.

        Args:
            source: of the weights.
            model: their configuration.
            read: `f() -> params` reads those of this host.
            beside: whether they are another model's than the engine's.

        Raises:
            BadRequestError: a host cannot read them, has others, or no memory for them.
        """
        name, cache = fingerprint(source), self.settings.compilation_cache_dir

        def load(first: int) -> Load:
            return Load(
                engine=None if beside else self.number,
                source=source,
                fingerprint=name,
                dtype=self.dtype.name,
                mesh=sizes_of(self.mesh),
                fraction=self.settings.memory_fraction,
                cache=None if cache is None else os.fspath(cache),
                first=first,
            )

        return self.leader.load(load, len(jax.tree.leaves(param_specs(model, self.dtype))), read)

    def make_programs(self, attention: str, paged: str) -> None:
        """Have the other hosts make the engine's programs, with attentions of these names."""
        self.leader.make_programs(self.number, attention, paged)

    def call(self, program: str, run: Callable[..., R], args: tuple[object, ...], static: Mapping[str, object]) -> R:
        """Run a compiled program on all hosts; return what it returns here."""
        return self.leader.call(self.number, program, run, args, static)

    def compile(self, program: str, args: tuple[object, ...], static: Mapping[str, object]) -> Callable[[], None]:
        """Begin to compile a program on the others; return a function that waits for that, and raises if it fails."""
        return self.leader.compile(self.number, program, args, static)

    def close(self) -> None:
        """Have the other hosts forget the engine."""
        self.leader.close_engine(self.number)
