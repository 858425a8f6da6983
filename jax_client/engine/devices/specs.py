"""How do arrays and their places travel between hosts? As shapes and names of axes; a mesh is known by its sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_client.config import MESH_AXES
from jax_client.engine.devices.verbs import Bounds, Spec
from jax_client.sharding import make_mesh


def sizes_of(mesh: Mesh) -> tuple[int, ...]:
    """Return the sizes of a mesh by `MESH_AXES`."""
    return tuple(mesh.shape[axis] for axis in MESH_AXES)


@functools.cache
def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    """Return the mesh of these sizes over the devices of all hosts."""
    return make_mesh(dict(zip(MESH_AXES, sizes, strict=True)), jax.devices())


def spec_of(array: jax.Array | jax.ShapeDtypeStruct) -> Spec:
    """Return an array, or a shape with its place, as other hosts know it."""
    return described(array.shape, array.dtype, array.sharding)


def described(shape: tuple[int, ...], dtype: np.dtype, place: Sharding | None) -> Spec:
    """Return an array of these properties as other hosts know it.

    Raises:
        TypeError: it does not lie on a mesh.
    """
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        raise TypeError(f"an array of shape {shape} lies at {place}, and not on a mesh; this is a bug.")
    axes = tuple((entry,) if isinstance(entry, str) else entry for entry in place.spec)
    return Spec(tuple(shape), np.dtype(dtype), sizes_of(place.mesh), axes)


def place_of(spec: Spec) -> NamedSharding:
    """Return where an array lies."""
    return NamedSharding(mesh_of(spec.mesh), PartitionSpec(*spec.axes))


def shape_of(spec: Spec) -> jax.ShapeDtypeStruct:
    """Return an array as a shape with its place."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place_of(spec))


def bounds_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """Return the part of an array that an index takes."""
    return tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))


def parts_by_process(array: np.ndarray, place: Sharding) -> Callable[[int], dict[Bounds, np.ndarray]]:
    """Return `f(process) -> parts` of a host array that the devices of a process hold."""
    if place.is_fully_replicated:
        whole = {tuple((0, size) for size in array.shape): array}
        return lambda process: whole
    found: dict[int, dict[Bounds, np.ndarray]] = {}
    for device, index in place.devices_indices_map(array.shape).items():
        bounds = bounds_of(index, array.shape)
        found.setdefault(device.process_index, {}).setdefault(bounds, array[index])
    return lambda process: found.get(process, {})


def from_parts(spec: Spec, parts: dict[Bounds, np.ndarray]) -> jax.Array:
    """Put the parts of this process's devices on them."""
    return jax.make_array_from_callback(spec.shape, place_of(spec), lambda index: parts[bounds_of(index, spec.shape)])
