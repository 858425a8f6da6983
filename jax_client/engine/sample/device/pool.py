"""Which arrays does a sampler's cache have? Pages of keys and values, and of recurrent layers places for states.

Arrays have a leading axis W, the ways that a mesh splits rows, and then one of the layers that use them. A page holds
`PAGE` tokens of one row. A place holds what a row's tokens leave behind in a recurrent layer, whatever their number.
Page 0 and place 0 are scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_client.engine.devices.arrays import zeros
from jax_client.engine.sample.pages import PAGE
from jax_client.models.config import ModelConfig
from jax_client.models.kernels.cache import PagedAttention
from jax_client.models.parts.gated_delta.layer import DELTA
from jax_client.models.parts.gated_delta.mixing import Memory
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import count
from jax_client.sharding import sharding_for

# In the matmul type or its bits, but for states; which arrays of pages there are, the attention says.
Pool = dict[str, jax.Array]
STATES = ("state", "inputs")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolShapes:
    """Makes the cache of one model on one mesh.

    Attributes:
        dtype: the matmul type.
        paged: the attention over the pages.
    """

    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh
    paged: PagedAttention

    @property
    def _accelerator(self) -> bool:
        return self.mesh.devices.flat[0].platform != "cpu"

    def new(self, ways: int, pages: int, states: int) -> Pool:
        """Return an empty cache of zeros, with `pages` and places for `states` for each way."""
        shapes = self.shapes(ways, pages, states)
        return {name: zeros(a.shape, a.dtype, a.sharding) for name, a in shapes.items()}

    def shapes(self, ways: int, pages: int, states: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the arrays of `new` as shapes with their places."""
        c, found = self.config, {}
        bits = self.dtype == jnp.bfloat16 and not self._accelerator
        for name, token in self.paged.token_shapes(c.n_kv_heads, c.head_dim).items():
            shape = (ways, count(c, ATTENTION), pages, PAGE, *token)
            found[name] = shape, np.dtype(np.uint16) if bits else self.dtype
        if (delta := c.delta) is not None:
            of_row = (delta.value_heads, delta.key_dim, delta.value_dim), (delta.taps - 1, delta.channels)
            # A CPU rounds no products, and the last inputs of a convolution are small.
            types = jnp.dtype(jnp.float32), self.dtype if self._accelerator else jnp.dtype(jnp.float32)
            for name, shape, kind in zip(STATES, of_row, types, strict=True):
                found[name] = (ways, count(c, DELTA), states, *shape), kind
        return {
            name: jax.ShapeDtypeStruct(shape, kind, sharding=self.sharding(name, shape))
            for name, (shape, kind) in found.items()
        }

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Return how an array of the cache is split."""
        axes: dict[str, tuple[str | None, ...]] = {
            "state": ("rows", None, None, "heads", None, None),
            # Of each device its own heads' queries, keys and values.
            "inputs": ("rows", None, None, None, "heads"),
        }
        of_pages = ("rows", None, None, None, "kv_heads", None)[: len(shape)]
        return sharding_for(axes.get(name, of_pages), shape, self.mesh, "cache")


def memory_of(pool: Mapping[str, jax.Array]) -> Memory:
    """Return the arrays of states."""
    return Memory(*(pool[name] for name in STATES))


@jax.named_scope("copy_pages")
def copy_pages(pool: Pool, copy_R2: jax.Array, *, accelerator: bool) -> Pool:
    """Return the pool with pages copied, in the decode program because it has the pool anyway."""
    any_copy = jnp.any(copy_R2 > 0)
    states = {name: a for name, a in pool.items() if name in STATES}
    pages = {name: a for name, a in pool.items() if name not in STATES}
    if not accelerator:
        each = lambda a: a.at[0, :, copy_R2[:, 1]].set(a[0, :, copy_R2[:, 0]])  # noqa: E731
        return jax.lax.cond(any_copy, lambda p: jax.tree.map(each, p), lambda p: p, pages) | states

    # Of a pool that goes through a condition XLA makes a copy on a GPU, and holds it twice.
    def copy(i: jax.Array, a: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(a, copy_R2[i, 0], 1, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(a, page, copy_R2[i, 1], axis=2)

    copies = jnp.where(any_copy, len(copy_R2), 0)
    return jax.lax.fori_loop(0, copies, lambda i, pool: jax.tree.map(partial(copy, i), pool), pages) | states
