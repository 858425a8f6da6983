"""How do arrays come onto the devices of a mesh, and back to the host? The same way on one host and on many.

Nothing else puts arrays on an engine's mesh: on a mesh of several hosts the others have to put their parts, too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jax_client.engine.devices.current import current
from jax_client.engine.devices.local import local_zeros, whole_here
from jax_client.sharding import place_of_rows, replicated

# A tree like that of the arrays, which types cannot say.
Fetched = Any


def put(array: np.ndarray | np.generic, place: Sharding) -> jax.Array:
    """Put a host array or scalar at a place of a mesh."""
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    return current().put(np.asarray(array), place)


def put_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Put a host array on the mesh, its first axis split as the rows of a batch are."""
    return put(array, place_of_rows(array, mesh))


def put_whole(array: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """Put a host array or scalar on the mesh, whole on every device."""
    return put(array, replicated(mesh))


def zeros(shape: tuple[int, ...], dtype: np.dtype, place: Sharding) -> jax.Array:
    """Return zeros at a place of a mesh. Nothing is compiled; a CPU's memory is taken when it is first written."""
    if place.is_fully_addressable:
        return local_zeros(shape, dtype, place)
    return current().zeros(shape, dtype, place)


def fetch(tree: object) -> Fetched:
    """Copy a tree of arrays to the host, as numpy arrays. Waits for them; not for the dispatch thread.

    What this host's devices do not have whole comes from those of the others.
    """
    leaves, treedef = jax.tree.flatten(tree)
    split = [i for i, a in enumerate(leaves) if isinstance(a, jax.Array) and not _is_whole_here(a)]
    far = []
    for i in split:
        whole = whole_here(leaves[i])
        if whole is None:
            far.append(i)
        else:
            leaves[i] = whole
    if far:
        for i, whole in zip(far, current().gather([leaves[i] for i in far]), strict=True):
            leaves[i] = whole
    return jax.tree.unflatten(treedef, jax.device_get(leaves))


def _is_whole_here(array: jax.Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated
