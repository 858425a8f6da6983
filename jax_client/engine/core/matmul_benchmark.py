"""How fast does this device multiply matrices? Measured, for the choice of dtype and as the yardstick of every step."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.sharding import Device

# Units for bfloat16 are at least twice as fast; without them it is a little slower, and under load may seem faster. A
# program that takes another type at its next start would get other numbers.
MARGIN = 1.5
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def faster_matmul_dtype(device: Device) -> jnp.dtype:
    """Return bfloat16 where this device has units for it, so that its matmul with float32 results is faster."""
    return BF16 if matmul_rate(device, BF16) > MARGIN * matmul_rate(device, F32) else F32


@functools.cache
def matmul_rate(device: Any, dtype: jnp.dtype) -> float:
    """Return the FLOP/s of a square matmul with float32 results on one device: the best of five.

    Of random numbers: with equal ones an H100 takes less power, and is 13 % faster than it is with any real ones.
    """
    size = 1024 if device.platform == "cpu" else 8192
    numbers = np.random.default_rng(0).random((size, size), np.float32) - 0.5
    x = jax.device_put(numbers.astype(dtype), device)
    precision = jax.lax.Precision.HIGHEST if dtype == F32 else None
    dot = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision))
    dot(x, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        dot(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
