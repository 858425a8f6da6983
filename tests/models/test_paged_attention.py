"""Does attention over pages give the same in each layout of the cache, and does a start find a kernel that is wrong?

The TPU's kernel does not run emulated: two plain functions with its arguments stand for it, this project's own and the
one that jax compares its kernel with.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from jax_client.engine.core import paged_check
from jax_client.models.config import ModelConfig
from jax_client.models.kernels import cache, ragged
from jax_client.models.kernels.cache import PagedAttention

R, S, PAGES = 3, 32, 20
DEVICE = jax.devices()[0]
LAYOUTS = {
    "wide": cache.wide_turns("gpu"),
    "wide, page by page": cache.wide_turns("tpu"),
    "ragged": cache.ragged_pages(ragged.plain_kernel),
    "triton": cache.triton_pages(interpret=True),
}


def gap(candidate: PagedAttention, heads: tuple[int, int, int], dtype: Any, pages: int = PAGES) -> float:
    return paged_check.largest_gap(candidate, cache.small_turns(), DEVICE, heads, pages, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("layout", "heads", "dtype"),
    [
        ("wide", (2, 2, 16), jnp.float32),
        ("wide, page by page", (2, 2, 16), jnp.float32),
        ("ragged", (4, 3, 64), jnp.float32),
        ("ragged", (2, 2, 128), jnp.bfloat16),
        ("triton", (2, 3, 16), jnp.float32),
    ],
)
def test_every_layout_gives_what_the_plain_loop_gives(
    layout: str, heads: tuple[int, int, int], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_check, "PROBE_ROWS", R)
    monkeypatch.setattr(paged_check, "PROBE_PAGES", 5)
    monkeypatch.setattr(ragged, "TABLE_BYTES", 2 * PAGES * 4)  # two rows a call
    monkeypatch.setattr(cache, "ROW_KEYS", 64)
    found = gap(LAYOUTS[layout], heads, dtype)
    assert found < (1e-5 if dtype == jnp.float32 else 0.01)


def test_the_stand_in_for_the_tpus_kernel_gives_what_jax_compares_it_with() -> None:
    rng = np.random.default_rng(0)
    K, G, H, T = 2, 2, 64, 4
    q = rng.normal(size=(R, T, K, G, H)).astype(np.float32)
    kv = jnp.asarray(rng.normal(size=(9, S, *ragged.token_shape(K, H))).astype(np.float32))
    table = np.asarray([[1, 2, 0], [3, 4, 5], [6, 0, 0]], np.int32)
    position = np.asarray([40, 91, 0], np.int32)[:, None] + np.arange(T, dtype=np.int32)

    def jax_kernel(q: jax.Array, kv: jax.Array, *numbers: Any) -> jax.Array:
        *arrays, scale = (np.asarray(a) if isinstance(a, jax.Array) else a for a in numbers)
        return jax.jit(lambda q, kv: ref_ragged_paged_attention(q, kv, *arrays, sm_scale=scale))(q, kv)

    both = [
        ragged.ragged_attention(q, kv, jnp.asarray(table), jnp.asarray(position), jnp.dtype(jnp.float32), kernel)
        for kernel in (ragged.plain_kernel, jax_kernel)
    ]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


def test_a_pool_of_numbers_holds_what_a_pool_of_bits_holds() -> None:
    k, v = (jax.random.normal(jax.random.key(i), (1, S, 2, 16), jnp.bfloat16) for i in range(2))
    page, position = jnp.asarray([1]), jnp.arange(S)[None]
    q, table = jnp.ones((1, S, 2, 1, 16)), jnp.asarray([[1, 0]])
    found = []
    for kind in (jnp.uint16, jnp.bfloat16):
        pool = {name: jnp.zeros((2, S, 2, 16), kind) for name in "kv"}
        found.append(cache.small_turns().attend(q, k, v, pool, table, page, position, jnp.dtype(jnp.bfloat16))[0])
    np.testing.assert_array_equal(*found)


def late(kernel: ragged.Kernel, *args: Any) -> jax.Array:
    """A kernel that leaves the last token out."""
    q, kv, length, *others = args
    return kernel(q, kv, jnp.maximum(length - 1, 1), *others)


def broken(kernel: ragged.Kernel, *args: Any) -> jax.Array:
    raise NotImplementedError("no such chip")


@pytest.mark.parametrize(("fault", "why"), [(late, "is off by"), (broken, "does not run here: no such chip")])
def test_a_wrong_kernel_is_found_and_named(
    fault: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged_check, "PROBE_PAGES", 2)
    monkeypatch.setattr(paged_check, "PROBE_ROWS", R)
    wrong = cache.ragged_pages(partial(fault, ragged.plain_kernel))
    arguments = cache.small_turns(), DEVICE, (2, 2, 64), 4, jnp.dtype(jnp.float32)
    assert paged_check.objection(cache.ragged_pages(ragged.plain_kernel), *arguments) == ""
    assert why in paged_check.objection(wrong, *arguments)
    # As on a TPU, whose kernel this would be.
    monkeypatch.setattr(paged_check, "preferred_attention", lambda *_: paged_check.Choice(attention=wrong))
    model = ModelConfig(
        family="llama", vocab_size=8, d_model=256, d_ff=8, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64,
        norm_eps=1e-5, rope_theta=1e4, tied_embeddings=True, max_context=4 * S,
    )  # fmt: skip
    mesh: Any = SimpleNamespace(shape={"tensor": 1}, devices=np.array([DEVICE], object))
    chosen = paged_check.choose_paged_attention(mesh, model, jnp.dtype(jnp.float32))
    assert chosen.name == "paged in wide turns" and chosen.name in caplog.text and why in caplog.text
