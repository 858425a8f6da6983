"""What does a host that follows do? It carries out the leading host's verbs, in their order, and decides nothing."""

from __future__ import annotations

import os
import threading

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.config import default_compilation_cache_dir
from jax_client.engine.core import memory
from jax_client.engine.core.programs import AnyProgram, CompileRecord
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.engine.devices.device_errors import is_out_of_memory
from jax_client.engine.devices.local import gathered, local_device, local_zeros
from jax_client.engine.devices.specs import from_parts, mesh_of, place_of, shape_of
from jax_client.engine.devices.verbs import (
    Call,
    Close,
    Compile,
    Done,
    Free,
    Gather,
    Hello,
    LaunchLog,
    Load,
    Programs,
    Put,
    Spec,
    Verb,
    Zeros,
)
from jax_client.engine.hosts.joining import versions
from jax_client.engine.hosts.programs import device_programs
from jax_client.errors import JaxClientError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import here


class Follower:
    """The part of a host that follows. Verbs come from one thread; compiles and loads may come from others."""

    def __init__(self) -> None:
        self._arrays: dict[int, jax.Array] = {}
        self._models: dict[int, tuple[ModelConfig, jnp.dtype, Mesh]] = {}
        self._programs: dict[int, dict[str, AnyProgram]] = {}
        self._made = threading.Condition()
        self._fraction = 1.0
        self._launches = LaunchLog()
        self._log: list[CompileRecord] = []

    def hello(self) -> Hello:
        """Return what this host is."""
        devices = jax.local_devices()
        return Hello(
            versions(), jax.process_index(), len(devices), devices[0].device_kind, os.getpid(), self.free_bytes()
        )

    def free_bytes(self) -> int:
        """Return the bytes that each device may still allocate."""
        return memory.available_bytes(jax.local_devices()[0], self._fraction)

    def load(self, load: Load) -> str:
        """Read this host's parts of a model's weights; return "" or why that cannot be."""
        try:
            if load.cache != "":
                enable_compilation_cache(default_compilation_cache_dir() if load.cache is None else load.cache)
            source = here(load.source)
            if fingerprint(source) != load.fingerprint:
                return (
                    f"the weights at {source.path} are not those of the leading host. Copy its files there, or name "
                    "the model by its hub name."
                )
            config, dtype, mesh = read_config(source), jnp.dtype(load.dtype), mesh_of(load.mesh)
            self._fraction = load.fraction
            weights = memory.tree_bytes(param_specs(config, dtype), mesh)
            if weights > self.free_bytes():
                return f"the base model needs {weights} bytes per device, and {self.free_bytes()} are free"
            bits = local_device(mesh).platform == "cpu"
            params = load_params(source, config, dtype, mesh, bits=bits)
        except (JaxClientError, OSError) as error:
            return str(error)
        self._take(params, load.first)
        if load.engine is not None:
            self._models[load.engine] = config, dtype, mesh
        return ""

    def compile(self, compile_: Compile) -> str:
        """Compile a program; return "" or why that cannot be."""
        try:
            arguments = jax.tree.map(shape_of, compile_.arguments, is_leaf=lambda leaf: isinstance(leaf, Spec))
            program = self._program(compile_.engine, compile_.program)
            program.compile("first use", *arguments, **compile_.static)
        except Exception as error:  # whatever the compiler raises, the leading host has to know
            return f"{type(error).__name__}: {error}"
        return ""

    def carry_out(self, verbs: tuple[Verb, ...]) -> Done:
        """Carry out verbs in their order."""
        failed: dict[int, str] = {}
        for verb in verbs:
            try:
                if isinstance(verb, Call | Gather):
                    self._launches.add(verb)
                self._carry_out(verb)
            except Exception as error:
                if not (isinstance(verb, Call | Gather) and is_out_of_memory(error)):
                    raise
                failed[verb.number] = str(error)
        return Done(self.free_bytes(), self._launches.digest, failed)

    def _carry_out(self, verb: Verb) -> None:
        match verb:
            case Call():
                program = self._program(verb.engine, verb.program)
                arguments = jax.tree.map(self._arrays.__getitem__, verb.arguments)
                self._take(program(*arguments, **verb.static), verb.first)
            case Put():
                self._arrays[verb.array] = from_parts(verb.spec, dict(verb.parts))
            case Zeros():
                spec = verb.spec
                self._arrays[verb.array] = local_zeros(spec.shape, spec.dtype, place_of(spec))
            case Free():
                for number in verb.arrays:
                    self._arrays.pop(number, None)  # absent where a launch ran out of memory
            case Gather():
                self._take(gathered([self._arrays[number] for number in verb.arrays]), verb.first)
            case Programs():
                programs = device_programs(*self._models[verb.engine], verb.attention, verb.paged, self._log)
                with self._made:
                    self._programs[verb.engine] = programs
                    self._made.notify_all()
            case Close():
                self._programs.pop(verb.engine, None)
                self._models.pop(verb.engine, None)

    def _take(self, tree: object, first: int) -> None:
        for number, array in enumerate(jax.tree.leaves(tree), first):
            self._arrays[number] = array

    def _program(self, engine: int, name: str) -> AnyProgram:
        with self._made:  # a compile may come before the verb that makes the programs has been carried out
            self._made.wait_for(lambda: engine in self._programs, timeout=60)
            return self._programs[engine][name]
