"""What do the devices of a mesh send each other while they sample? Weights, sums of a layer, and logits by row.

A sampling program runs on each device over what the device has: the rows of its way (the "data" and "fsdp" axes), and
their heads (the "tensor" axis). Nothing is left to XLA's partitioner, which would gather the whole cache of a layer
for each token, and agree on the end of each attention loop over all devices. On one device nothing is sent, and the
methods do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_client.models.layers import from_bits


@dataclass(frozen=True, slots=True)
class Shards:
    """The mesh, as a program that runs on each of its devices sees it.

    Attributes:
        mesh: axes of size 1 are as if they were not there.
    """

    mesh: Mesh

    def run(
        self, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """Return `body` as a function of whole arrays; on each device it gets, and returns, what that has of them."""
        # Not checked: results that are equal on all devices of an axis come from sums and gathers over it.
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def whole(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Return a weight with the axis that "fsdp" splits gathered from the ways."""
        for axis, names in enumerate(spec):
            if "fsdp" in (names or ()):
                return jax.lax.all_gather(array, "fsdp", axis=axis, tiled=True)
        return array

    def total(self, x: jax.Array) -> jax.Array:
        """Return the sum over the devices of a way, each of which has a part of the heads or of the hidden width."""
        return jax.lax.psum(x, "tensor") if self.mesh.shape["tensor"] > 1 else x

    def any_way(self, flag: jax.Array, together: bool) -> jax.Array:
        """Return whether a bool scalar is true on any of the ways, if they gather weights from each other."""
        return jax.lax.pmax(flag.astype(jnp.int32), ("fsdp", "expert")) > 0 if together else flag

    @jax.named_scope("embed")
    def rows_of(self, table_VD: jax.Array, spec: PartitionSpec, ids_BT: jax.Array) -> jax.Array:
        """Return the rows (B, T, D) of an embedding, float32, for the ids of this way.

        Args:
            table_VD: this device's part.
            spec: how the table is split.
            ids_BT: int32.
        """
        split_V, split_D = "tensor" in (spec[0] or ()), "fsdp" in (spec[1] or ())
        if split_D:  # each way looks up its part of the width, for all ways' ids
            ids_BT = jax.lax.all_gather(ids_BT, "fsdp", axis=0, tiled=True)
        if split_V:
            ids_BT = ids_BT - jax.lax.axis_index("tensor") * len(table_VD)
        x_BTD = from_bits(jnp.take(table_VD, ids_BT, axis=0, mode="clip")).astype(jnp.float32)
        if split_V:
            x_BTD = jnp.where(((ids_BT >= 0) & (ids_BT < len(table_VD)))[..., None], x_BTD, 0.0)
        if split_D:
            x_BTD = jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_BTD, "tensor") if split_V else x_BTD

    def by_row(
        self, function: Callable[[jax.Array, Any], Any], logits_RV: jax.Array, settings: Any, *, split: bool
    ) -> Any:
        """Return `function(logits, settings)` of rows, computed for a part of the rows on each device of their way.

        A row's logits come together on one device, so that what is drawn from them does not depend on the mesh.

        Args:
            function: of whole logits and of arrays with a leading axis of rows; its results have it too.
            logits_RV: for all rows of the way, of this device's part of the vocabulary.
            settings: a tree of arrays (R, ...), equal on the devices of the way.
            split: whether the vocabulary is split.
        """
        if not split:
            return function(logits_RV, settings)
        R, ways = len(logits_RV), self.mesh.shape["tensor"]
        part = -(-R // ways)
        padded = lambda a: jnp.pad(a, ((0, part * ways - R), *((0, 0),) * (a.ndim - 1)))  # noqa: E731
        first = jax.lax.axis_index("tensor") * part
        mine = lambda a: jax.lax.dynamic_slice_in_dim(padded(a), first, part)  # noqa: E731
        logits_rV = jax.lax.all_to_all(padded(logits_RV), "tensor", split_axis=0, concat_axis=1, tiled=True)
        found = function(logits_rV, jax.tree.map(mine, settings))
        return jax.tree.map(lambda a: jax.lax.all_gather(a, "tensor", axis=0, tiled=True)[:R], found)
