"""What is an adapter on the device, how does it start, and how does it become host arrays and back?

An adapter is a record of device arrays that tasks replace. A snapshot refers to the arrays of one moment.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_client.engine.core.accounting import Work
from jax_client.engine.devices.arrays import fetch
from jax_client.engine.devices.arrays import put as put_array
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.models.config import ModelConfig
from jax_client.models.lora_arrays import (
    LARGEST_WEIGHT,
    AdapterTree,
    LoraArray,
    flatten,
    lora_arrays,
    nest,
    out_of_range,
    refuse_other_shapes,
)
from jax_client.models.specs import ParamSpec
from jax_client.sharding import sharding_for
from jax_client.values import AdapterState, LoraSpec

Weights = AdapterTree[jax.Array]
# How often an adapter was loaded, and the optimizer steps it has; grows with every change of the weights.
Version = tuple[int, int]


@dataclass(slots=True, eq=False)
class Adapter:
    """A trainable adapter: its weights, Adam's moments, the gradient and work accumulated so far, and the step count.

    Arrays are replaced, never donated: a failed program leaves the adapter as it was, and a snapshot is a reference.

    Attributes:
        loads: how often its weights were replaced by saved ones, after which steps are counted anew.
        lock: held while the weights, moments and step change, and while another thread takes them all.
    """

    spec: LoraSpec
    weights: Weights
    mu: Weights
    nu: Weights
    step: int = 0
    loads: int = 0
    grads: Weights | None = None
    skipped_in_a_row: int = 0
    work: Work = field(default_factory=Work)  # since the last step
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def version(self) -> Version:
        """Tells these weights from all others that the adapter has had."""
        return self.loads, self.step


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True, eq=False)
class Snapshot:
    """An adapter at one moment, to sample from or to save. Arrays are immutable: nothing is copied.

    Attributes:
        spec: the adapter's configuration.
        weights: on the device.
        step: optimizer steps taken.
        version: the adapter's.
        mu, nu: Adam's moments; None unless asked for.
        accumulating: whether the adapter had gradients that no step was taken with. They are not part of a saved state.
        number: tells one snapshot from every other of the process.
    """

    spec: LoraSpec
    weights: Weights
    step: int = 0
    version: Version = (0, 0)
    mu: Weights | None = None
    nu: Weights | None = None
    accumulating: bool = False
    number: int = field(default_factory=itertools.count(1).__next__)

    def is_like(self, other: Snapshot) -> bool:
        """Whether both have arrays of the same shapes."""
        return replace(self.spec, seed=0) == replace(other.spec, seed=0)

    def fetch(self) -> AdapterState:
        """Copy it to the host. Blocks; call it off the dispatch thread.

        Raises:
            RequestFailedError: a weight or a moment is not finite, or too large.
        """
        weights, mu, nu = (_host(tree) for tree in (self.weights, self.mu, self.nu))
        state = AdapterState(spec=self.spec, step=self.step, weights=weights or {}, mu=mu, nu=nu)
        if (wrong := _wrong_numbers(state)) is not None:
            raise RequestFailedError(
                f"the adapter of step {self.step} cannot be saved: {wrong}. No step leaves such numbers, so its memory "
                "was damaged. Load the last good checkpoint, and look at the device's log."
            )
        return state


def _host(tree: Weights | None) -> dict[str, np.ndarray] | None:
    return None if tree is None else fetch(flatten(tree))


def snapshot_of(adapter: Adapter, optimizer: bool) -> Snapshot:
    """Return the adapter as it is now, with Adam's moments if asked."""
    with adapter.lock:
        return Snapshot(
            spec=adapter.spec,
            weights=adapter.weights,
            step=adapter.step,
            version=adapter.version,
            mu=adapter.mu if optimizer else None,
            nu=adapter.nu if optimizer else None,
            accumulating=adapter.grads is not None,
        )


def _is_array(node: object) -> bool:
    return isinstance(node, LoraArray)


def shardings(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> AdapterTree[NamedSharding]:
    """Return the sharding of every adapter array."""
    return jax.tree.map(lambda a: sharding_for(a.axes, a.shape, mesh), lora_arrays(c, spec), is_leaf=_is_array)


def param_specs(c: ModelConfig, spec: LoraSpec) -> AdapterTree[ParamSpec]:
    """Return the tree of `ParamSpec` of an adapter; nothing is allocated."""
    f32 = np.dtype(np.float32)
    to_spec = lambda a: ParamSpec(shape=a.shape, dtype=f32, axes=a.axes)  # noqa: E731
    return jax.tree.map(to_spec, lora_arrays(c, spec), is_leaf=_is_array)


def abstract_weights(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> AdapterTree[jax.ShapeDtypeStruct]:
    """Return the adapter's arrays as shapes with their places on the mesh, to compile programs with."""
    struct = lambda a, place: jax.ShapeDtypeStruct(a.shape, np.float32, sharding=place)  # noqa: E731
    return jax.tree.map(struct, lora_arrays(c, spec), shardings(c, spec, mesh), is_leaf=_is_array)


def initial_weights(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Return fresh weights on the mesh: A uniform in ±1/√fan_in (as peft), B zero, float32.

    Drawn on the host: the same for a seed on any mesh, and nothing to compile (a program that drew them with jax.random
    took 5 to 13 s to compile on a CPU).
    """
    rng = np.random.default_rng(spec.seed)

    def start(array: LoraArray, place: NamedSharding) -> jax.Array:
        if not array.fan_in:
            return put_array(np.zeros(array.shape, np.float32), place)
        return put_array((2 * rng.random(array.shape, np.float32) - 1) * np.float32(array.fan_in**-0.5), place)

    return jax.tree.map(start, lora_arrays(c, spec), shardings(c, spec, mesh), is_leaf=_is_array)


def _wrong_numbers(state: AdapterState) -> str | None:
    limits = {"weights": LARGEST_WEIGHT, "mu": LARGEST_WEIGHT, "nu": float(np.finfo(np.float32).max)}
    for name, flat in (("weights", state.weights), ("mu", state.mu), ("nu", state.nu)):
        if (wrong := out_of_range(flat or {}, limits[name])) is not None:
            return f"in its {name} {wrong}"
    return None


def refuse_wrong_numbers(state: AdapterState) -> None:
    """Raise BadRequestError if a weight or a moment of a saved state is not finite, or too large to train or sample.

    Reads all of it; call it off the dispatch thread.
    """
    if (wrong := _wrong_numbers(state)) is not None:
        raise BadRequestError(f"the saved adapter cannot be loaded: {wrong}. Load an earlier checkpoint of its run.")


def put(flat: Mapping[str, np.ndarray], c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Put flat host arrays onto the mesh.

    Raises:
        BadRequestError: a name or a shape is not that of this model with this configuration.
    """
    advice = "Load it into a client with the base model, rank and train_* settings that it was saved with."
    refuse_other_shapes("the saved adapter", flat, c, spec, advice)
    place = flatten(shardings(c, spec, mesh))
    return nest({name: put_array(np.asarray(flat[name], np.float32), place[name]) for name in place})
