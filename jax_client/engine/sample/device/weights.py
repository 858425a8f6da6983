"""In which form do sampling programs take the base weights? As stored, on one CPU by layer, or whole on each way.

A mesh with "fsdp" stores a part of each weight on each way, and a decode step would gather all of them. `DecodeWeights`
makes a copy of the layers and the output projection that every way has whole, once for many steps, where that fits
beside the cache. The copy goes with the cache, when the memory is needed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_client.engine.core import memory
from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import CompileRecord, Program
from jax_client.engine.core.turns import Elsewhere, Task
from jax_client.engine.devices.device_errors import is_out_of_memory
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD, param_specs
from jax_client.models.layers import InStack, from_bits
from jax_client.models.parts.kind import Kind
from jax_client.models.parts.linears import mixed_pairs
from jax_client.models.plan import Layer, PlacedLayer, Segment, count, kinds, plan
from jax_client.models.specs import ParamSpec
from jax_client.sharding import sharding_for
from jax_client.threads import Workers

# Of the memory that is free beside the cache: the rest is for what the programs compute with.
WHOLE_SHARE = 0.8
# Holds the parameters where the layers and the output projection are whole on each way.
WHOLE = "whole"
# Leaves with the matrices of gate and up, (L, 2, D, F).
HALVED = "gate_up_L2DF", "shared_gate_up_L2DF"

Carry = TypeVar("Carry")
Tree = TypeVar("Tree")
# The pairs of all layers of a kind: stacks of them by matmul, or a list of each layer's.
_Pairs = dict[str, Any]
Pairs = _Pairs | list[_Pairs]
# f(array, spec) -> array, with the parts of the other ways.
Gather = Callable[[jax.Array, PartitionSpec], jax.Array]


@dataclass(frozen=True, slots=True)
class Base:
    """The base weights as one device has them, and how each is split over the mesh."""

    config: ModelConfig
    params: Params
    specs: Any

    def part(self, kind: Kind, place: jax.Array | int, gather: Gather) -> Params:
        """Return the weights of one part of a layer.

        Gate and up are cut out one by one where a way has them whole: of a slice with both XLA makes a copy each step.

        Args:
            kind: of the part.
            place: int32, in the kind's stacks or its list.
            gather: `f(array, spec) -> array`, with the parts of the other ways.
        """
        stacks, specs = self.params["layers"][kind.name], self.specs["layers"][kind.name]
        w: Params = {}
        if self.unrolled:
            whole = lambda a: InStack(a[None], jnp.int32(0))  # noqa: E731
            return {n: whole(a) if n in kind.in_stack else from_bits(a) for n, a in stacks[place].items()}
        for name, stack in stacks.items():
            spec = PartitionSpec(*specs[name][1:])
            if name in kind.in_stack:
                w[name] = InStack(stack, jnp.asarray(place))
            elif name in HALVED and not _by_way(spec):
                w[name] = tuple(from_bits(_half(stack, place, j)) for j in range(2))
            else:
                w[name] = from_bits(gather(jax.lax.dynamic_index_in_dim(stack, place, keepdims=False), spec))
        return w

    @property
    def unrolled(self) -> bool:
        """Whether each layer's weights are arrays of their own, for a program that unrolls the layers."""
        return any(isinstance(stacks, list) for stacks in self.params["layers"].values())

    def pairs(self, loras: tuple[Weights, ...], dtype: jnp.dtype) -> dict[str, Pairs]:
        """Return the pairs of all adapters by kind of part: stacks of them, or a list as of the weights."""

        def of_kind(kind: Kind) -> Pairs:
            modules = kind.modules(self.config, 1)
            every = [{name: pair for name, pair in lora["layers"].items() if name in modules} for lora in loras]
            if self.unrolled:
                entries = range(count(self.config, kind))
                return [mixed_pairs(kind, [_cut(lora, i) for lora in every], dtype) for i in entries]
            if not any(every):
                return {}
            return jax.vmap(lambda *adapters: mixed_pairs(kind, adapters, dtype))(*every)

        return {kind.name: of_kind(kind) for kind in kinds(self.config)}

    def each_layer(self, run: Callable[..., Carry], carry: Carry, pairs: Mapping[str, Pairs], gather: Gather) -> Carry:
        """Return what `run` makes of `carry`, one layer after the other.

        Stacks of layers are scanned, so that none of them exists twice. Lists are unrolled.

        Args:
            run: `f(layer, carry, ws, pairs, i) -> carry` for the weights and the pairs of each part of a layer; i is
                the place of the layer's first part in its kind's stacks, int32.
            carry: what the layers change.
            pairs: as `pairs` returns them.
            gather: as for `part`.
        """
        numbers = itertools.count()

        def one(layer: PlacedLayer, carry: Carry, i: jax.Array | int, j: jax.Array | int) -> Carry:
            ws = [self.part(part.kind, part.place(i, j), gather) for part in layer.parts]
            own = [_entry(pairs[part.kind.name], part.place(i, j)) for part in layer.parts]
            at = jnp.asarray(layer.parts[0].place(i, j), jnp.int32)
            return run(Layer(layer.kinds, layer.options), carry, ws, own, at)

        for segment in plan(self.config):
            if self.unrolled:
                for i, layer in itertools.product(range(segment.repeats), segment.layers):
                    for time in range(layer.times):
                        with jax.named_scope(f"layer_{next(numbers)}"):
                            carry = one(layer, carry, i, time)
                continue

            def block(carry: Carry, i: jax.Array, segment: Segment = segment) -> tuple[Carry, None]:
                for layer in segment.layers:

                    def once(carry: Carry, j: jax.Array | int, layer: PlacedLayer = layer) -> tuple[Carry, None]:
                        with jax.named_scope("layer"):
                            return one(layer, carry, i, j), None

                    if layer.times == 1:
                        carry, _ = once(carry, 0)
                    else:
                        carry, _ = jax.lax.scan(once, carry, jnp.arange(layer.times, dtype=jnp.int32))
                return carry, None

            carry, _ = jax.lax.scan(block, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
        return carry

    @property
    def head_spec(self) -> PartitionSpec:
        """How the output projection is split."""
        return self.specs.get("unembed_VD", self.specs["embed_VD"])

    @property
    def split_by_way(self) -> bool:
        """Whether ways have parts of weights, so that each step of one is a step of all."""
        specs = jax.tree.leaves(self.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        return any(map(_by_way, specs))


def sampling_params(params: Params, model: ModelConfig) -> Params:
    """Return the parameters with each layer's in arrays of their own where that costs no memory: on one CPU.

    There the arrays are views of the stored ones, in bfloat16 instead of its bits where a matmul takes them. A program
    that was given the stacks, or the bits, would copy all weights once per block of steps: 9 ms of a step of 61, and 90
    ms of a block.
    """
    leaves = jax.tree.leaves(params)
    devices = leaves[0].sharding.device_set
    device = next(iter(devices))
    if device.platform != "cpu" or len(devices) > 1:
        return params
    numbers = lambda a: a.view(jnp.bfloat16) if a.dtype == np.uint16 else a  # noqa: E731
    view = lambda array: jax.device_put(array, device, may_alias=True)  # noqa: E731

    def of_kind(kind: Kind) -> list[Params]:
        # Of what a program cuts a matrix out of, it cuts bits: XLA's CPU backend has no slices of bfloat16.
        stacks = {name: np.asarray(stack) for name, stack in params["layers"][kind.name].items()}
        arrays = {name: a if name in kind.in_stack else numbers(a) for name, a in stacks.items()}
        cut = lambda name, a: tuple(map(view, a)) if name in HALVED else view(a)  # noqa: E731
        return [{name: cut(name, a[i]) for name, a in arrays.items()} for i in range(len(arrays["norm_LD"]))]

    layers = {kind.name: of_kind(kind) for kind in kinds(model)}
    # Beside the embedding, whose rows are gathered, also where the two are one.
    return params | {"layers": layers, "unembed_VD": view(numbers(np.asarray(output_head_VD(params))))}


def whole_specs(model: ModelConfig, dtype: jnp.dtype) -> Any:
    """Return the tree of `ParamSpec` of the weights that each way has whole.

    An embedding that is not the output projection too stays split, as steps do not gather it.
    """

    def spec(path: tuple[Any, ...], p: ParamSpec) -> ParamSpec:
        if path[0].key == "embed_VD" and not model.tied_embeddings:
            return p
        return replace(p, axes=tuple(None if axis == "embed" else axis for axis in p.axes))

    return jax.tree_util.tree_map_with_path(spec, param_specs(model, dtype), is_leaf=_is_spec)


def whole_bytes(model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> int:
    """Return the bytes of a device that a copy takes; 0 where it would gain nothing."""
    return memory.tree_bytes([spec for _, spec in _moved(model, dtype)], mesh) if _of_use(mesh) else 0


def fit_whole(size: int, free: int) -> bool:
    """Return whether a copy of `size` bytes is made where `free` are left beside the cache."""
    return 0 < size <= WHOLE_SHARE * free


def _of_use(mesh: Mesh) -> bool:
    # The devices that simulate a mesh on a CPU share its memory, and gain nothing.
    return mesh.shape["fsdp"] > 1 and mesh.devices.flat[0].platform != "cpu"


def _moved(model: ModelConfig, dtype: jnp.dtype) -> list[tuple[int, ParamSpec]]:
    """Return which leaves of the parameters a copy has otherwise than they are stored, and how."""
    stored, whole = (
        jax.tree.leaves(specs, is_leaf=_is_spec) for specs in (param_specs(model, dtype), whole_specs(model, dtype))
    )
    return [(i, new) for i, (old, new) in enumerate(zip(stored, whole, strict=True)) if old != new]


def partition_specs(specs: Any, mesh: Mesh) -> Any:
    """Return the tree of how each parameter is split."""
    return jax.tree.map(lambda p: sharding_for(p.axes, p.shape, mesh).spec, specs, is_leaf=_is_spec)


def _entry(pairs: Pairs, place: jax.Array | int) -> dict[str, Any]:
    return pairs[int(place)] if isinstance(pairs, list) else _cut(pairs, place)


def _cut(stacks: Tree, layer: jax.Array | int) -> Tree:
    """Return one layer of stacked arrays."""
    return jax.tree.map(lambda a: a[layer], stacks)


def _half(stack_L2DF: jax.Array, i: jax.Array | int, half: int) -> jax.Array:
    """Return layer i's gate (0) or up (1)."""
    return jax.lax.dynamic_slice(stack_L2DF, (i, half, 0, 0), (1, 1, *stack_L2DF.shape[2:]))[0, 0]


def _by_way(spec: PartitionSpec) -> bool:
    return any(axis in (names or ()) for names in spec for axis in ("fsdp", "expert"))


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ParamSpec)


def gather_program(
    model: ModelConfig, dtype: jnp.dtype, mesh: Mesh, log: list[CompileRecord]
) -> Program[[list[jax.Array]], list[jax.Array]]:
    """Return the program that makes the copy: devices send each other what they lack, nothing goes through a host."""
    places = [sharding_for(p.axes, p.shape, mesh) for _, p in _moved(model, dtype)]
    return Program(
        "gather_weights",
        lambda arrays: arrays,
        log,
        lambda arrays: places,
        lambda arrays: f"{len(arrays)} arrays",
        kind="sample",
        model=Program.model_text(model, dtype, mesh, None),
    )


class DecodeWeights:
    """Chooses the weights that sampling programs take, and makes the copy. For the dispatch thread.

    Args:
        stored: the parameters as `sampling_params` returns them.
        log: of compiles.

    Attributes:
        allowed: whether a copy is made where it fits.
        gather: makes it.
        now: what the programs take.
    """

    def __init__(self, stored: Params, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh, log: list[CompileRecord]):
        self._stored = stored
        self.now = stored
        self.allowed = _of_use(mesh)
        moved = _moved(model, dtype)
        self._moved, specs = [i for i, _ in moved], [spec for _, spec in moved]
        self.gather = gather_program(model, dtype, mesh, log)
        self._device_bytes = memory.tree_bytes(specs, mesh)
        self._devices_at_once = mesh.size if mesh.devices.flat[0].platform == "cpu" else 1  # that share a memory

    @property
    def bytes(self) -> int:
        """Bytes of the copy on a device, 0 while there is none."""
        return self._device_bytes if self.now is not self._stored else 0

    def compiled(self, free: int, compilers: Workers) -> Task[None]:
        """Yield-from: compile what `choose` may run, where `free` bytes are free before there is a cache."""
        if self._chosen(free):
            leaves = jax.tree.leaves(self._stored)
            with contextlib.suppress(Exception):  # `choose` meets the same
                yield Elsewhere(self.gather.begin(compilers, "first use", [leaves[i] for i in self._moved]))

    def _chosen(self, free: int) -> bool:
        fits = fit_whole(self._device_bytes * self._devices_at_once, free)
        return self.allowed and fits and self.now is self._stored

    def choose(self, free: int) -> None:
        """Make the copy if it fits into `free` bytes of a device, and is of use."""
        if not self._chosen(free):
            return
        leaves, tree = jax.tree.flatten(self._stored)
        try:
            moved = jax.block_until_ready(self.gather([leaves[i] for i in self._moved]))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.allowed = False
            return
        for i, array in zip(self._moved, moved, strict=True):
            leaves[i] = array
        self.now = {WHOLE: jax.tree.unflatten(tree, leaves)}

    def drop(self, *, for_good: bool = False) -> None:
        """Go back to the stored weights; programs in flight keep the copy until they end.

        Args:
            for_good: make no other copy, as a program ran out of memory beside this one.
        """
        self.allowed &= not (for_good and self.bytes)
        self.now = self._stored

    def free(self) -> None:
        """Drop all references to weights; nothing can be sampled any more."""
        self._stored = self.now = {}
        self.allowed = False
