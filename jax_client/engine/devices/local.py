"""What has this process of a mesh that may span others? Its devices, and its parts of arrays."""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from jax_client.config import MESH_AXES
from jax_client.engine.devices.specs import bounds_of
from jax_client.sharding import Device, make_mesh, replicated


def local_zeros(shape: tuple[int, ...], dtype: np.dtype, place: Sharding) -> jax.Array:
    """Return zeros on the devices of this process, at a place that may span others."""
    if next(iter(place.addressable_devices)).platform != "cpu":
        return jnp.zeros(shape, dtype, device=place)
    if place.is_fully_addressable:
        return jax.device_put(np.zeros(shape, dtype), place)
    sizes = place.shard_shape(shape)
    return jax.make_array_from_callback(shape, place, lambda _: np.zeros(sizes, dtype))


def local_device(mesh: Mesh) -> Device:
    """Return the first device of a mesh that this process can use."""
    return next(device for device in mesh.devices.flat if device.process_index == jax.process_index())


def local_mesh(mesh: Mesh) -> Mesh:
    """Return a mesh over this process's devices of a mesh, split over "tensor" as far as that goes."""
    if not mesh.is_multi_process:
        return mesh
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    tensor = math.gcd(mesh.shape["tensor"], len(own))
    sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": len(own) // tensor, "tensor": tensor}
    return make_mesh(sizes, own)


def whole_here(array: jax.Array) -> np.ndarray | None:
    """Return an array of which this process has every part; None if it has not."""
    parts = {bounds_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    if sum(part.size for part in parts.values()) != array.size:
        return None
    whole = np.empty(array.shape, array.dtype)
    for bounds, part in parts.items():
        whole[tuple(slice(*each) for each in bounds)] = np.asarray(part)
    return whole


def gathered(arrays: list[jax.Array]) -> list[jax.Array]:
    """Return arrays that every device of their meshes has whole, by programs that all hosts of these run."""
    return [jax.jit(_same, out_shardings=replicated(mesh_of_array(array)))(array) for array in arrays]


def mesh_of_array(array: jax.Array) -> Mesh:
    """Return the mesh that an array lies on."""
    return cast(NamedSharding, array.sharding).mesh  # type: ignore[return-value]  (it may be abstract only in a program)


def _same(array: jax.Array) -> jax.Array:
    return array
