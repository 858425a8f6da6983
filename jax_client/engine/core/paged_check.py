"""Which attention samples on a mesh, and can it be trusted?

TPUs and NVIDIA's GPUs have a kernel each; what it does not take is attended to in plain JAX. Each start has the kernel
fill a small cache page by page and decode from it, on the device at hand, and compares that with the plain one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core.attention_check import probe_extras
from jax_client.engine.devices.local import local_device
from jax_client.models.config import ModelConfig
from jax_client.models.kernels import ragged
from jax_client.models.kernels.cache import PagedAttention, ragged_pages, small_turns, triton_pages, wide_turns
from jax_client.models.parts.attention import Extras
from jax_client.sharding import Device

logger = logging.getLogger(__name__)

PROBE_ROWS = 16
PROBE_PAGES = 17  # of a row: one more than the kernel takes at once
PAGE = 32
# Largest gap between two bfloat16 attentions, relative to the largest value. A page of another row, a head of its
# neighbour, or a token too many gives 0.1 and more.
TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The attention of a sampler, and why it is not the platform's kernel.

    Attributes:
        attention: that is used.
        refused: in words why the kernel is not; "" where it is, or the platform has none.
        failed: whether the kernel should work here, and does not.
    """

    attention: PagedAttention
    refused: str = ""
    failed: bool = False


def preferred_attention(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Choice:
    """Return the fastest attention for a platform, unchecked."""
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        return Choice(attention=small_turns())
    plain = wide_turns(platform)
    if dtype != jnp.bfloat16:
        return Choice(attention=plain, refused=f"it takes bfloat16, not {dtype.name}")
    try:
        if platform == "tpu":
            make, why = ragged_pages, ragged.unsupported(model.n_kv_heads // mesh.shape["tensor"], model.head_dim)
        else:
            from jax_client.models.kernels import triton  # Pallas is large, and only a GPU needs this part of it

            make, why = triton_pages, triton.unsupported(model.head_dim)
        if why:
            return Choice(attention=plain, refused=why)
        kernel = make()
        if lacking := kernel.lacks & model.attention_extras:  # of all layers, which share the pool's layout
            return Choice(attention=plain, refused=f"it takes no {' and '.join(sorted(lacking))}")
        return Choice(attention=kernel)
    except ImportError as error:  # such as a part of Pallas that a newer jax no longer has
        return Choice(attention=plain, refused=str(error))


def choose(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Choice:
    """Return the preferred attention; one in plain JAX if that is a kernel that differs from it here."""
    preferred, plain = preferred_attention(mesh, model, dtype), wide_turns(mesh.devices.flat[0].platform)
    if preferred.attention.name in (plain.name, small_turns().name):
        return preferred
    heads = model.n_kv_heads // mesh.shape["tensor"], model.group, model.head_dim
    pages = -(-model.max_context // PAGE)
    extras = probe_extras(model, heads[:2], PAGE * PROBE_PAGES)
    why = objection(preferred.attention, plain, local_device(mesh), heads, pages, dtype, extras)
    return Choice(attention=plain, refused=f"it {why}", failed=True) if why else preferred


def choose_paged_attention(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> PagedAttention:
    """Return what `choose` does; log a warning where it is not the platform's kernel."""
    choice = choose(mesh, model, dtype)
    if choice.refused:
        logger.warning(
            "the platform's kernel does not sample this model: %s. Using %s.", choice.refused, choice.attention.name
        )
    return choice.attention


def paged_attention_named(name: str, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> PagedAttention:
    """Return the attention that another host has chosen, by its name."""
    preferred = preferred_attention(mesh, model, dtype).attention
    return preferred if preferred.name == name else wide_turns(mesh.devices.flat[0].platform)


def objection(
    candidate: PagedAttention,
    plain: PagedAttention,
    device: Device,
    heads: tuple[int, int, int],
    pages: int,
    dtype: jnp.dtype,
    extras: Extras | None = None,
) -> str:
    """Return in words why an attention cannot be trusted here, "" if both give the same over a cache that each filled.

    Args:
        candidate: to be trusted or not.
        plain: what is used instead.
        device: where both run.
        heads: K, G and H, of one device.
        pages: of a table.
        dtype: of keys and values.
        extras: keywords of both.
    """
    try:
        gap = largest_gap(candidate, plain, device, heads, pages, dtype, extras)
    except Exception as error:  # whatever a kernel raises on this device, there is one that works
        return f"does not run here: {error}"
    return "" if gap <= TOLERANCE else f"is off by {gap:.3g}"


def largest_gap(
    candidate: PagedAttention,
    plain: PagedAttention,
    device: Device,
    heads: tuple[int, int, int],
    pages: int,
    dtype: jnp.dtype,
    extras: Extras | None = None,
) -> float:
    """Return how far a result is off, at most, relative to the largest value; arguments as those of `objection`."""
    (K, G, H), R, n = heads, PROBE_ROWS, min(PROBE_PAGES, pages)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32), device)  # noqa: E731
    q, k, v = draw(n, R, PAGE, K, G, H), draw(n, R, PAGE, K, H), draw(n, R, PAGE, K, H)
    new = draw(R, 1, K, G, H), draw(R, 1, K, H), draw(R, 1, K, H)
    table_Rn = np.zeros((R, max(pages, n)), np.int32)
    table_Rn[:, :n] = 1 + rng.permutation(R * n).reshape(R, n)
    # The first rows end where pages and the kernel's blocks do, or a token before or after.
    ends = [1, PAGE - 1, PAGE, PAGE + 1, n * PAGE - PAGE, n * PAGE - 1]
    last_R = np.clip(np.resize([*ends, *rng.integers(0, n * PAGE, R)], R), 0, n * PAGE - 1)
    numbers = jax.device_put((table_Rn, last_R.astype(np.int32)), device)

    def run(attention: PagedAttention) -> list[np.ndarray]:
        both = jax.jit(partial(_fill_and_decode, attention, dtype, extras or {}))
        return [np.asarray(o, np.float32) for o in both(q, k, v, new, *numbers)]

    pairs = zip(run(candidate), run(plain), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def _fill_and_decode(
    attention: PagedAttention,
    dtype: jnp.dtype,
    extras: Extras,
    q_nRSKGH: jax.Array,
    k_nRSKH: jax.Array,
    v_nRSKH: jax.Array,
    new: tuple[jax.Array, jax.Array, jax.Array],
    table_Rn: jax.Array,
    last_R: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return what the queries of each page see, and what the new token of each row sees at its place."""
    n, R, S, K, _, H = q_nRSKGH.shape
    attend = partial(attention.attend, **extras)
    pool = {name: jnp.zeros((1 + R * n, S, *token), dtype) for name, token in attention.token_shapes(K, H).items()}

    def fill(pool: dict[str, jax.Array], page: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], jax.Array]:
        j, q, k, v = page
        page_R = jax.lax.dynamic_index_in_dim(table_Rn, j, axis=1, keepdims=False)
        position_RS = jnp.broadcast_to(j * S + jnp.arange(S), (R, S))
        o, pool = attend(q, k.astype(dtype), v.astype(dtype), pool, table_Rn, page_R, position_RS, dtype)
        return pool, o

    pool, filled = jax.lax.scan(fill, pool, (jnp.arange(n), q_nRSKGH, k_nRSKH, v_nRSKH))
    q, k, v = new
    page_R = jnp.take_along_axis(table_Rn, last_R[:, None] // S, axis=1)[:, 0]
    o, _ = attend(q, k.astype(dtype), v.astype(dtype), pool, table_Rn, page_R, last_R[:, None].astype(jnp.int32), dtype)
    return filled, o
