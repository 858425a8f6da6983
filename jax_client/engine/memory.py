"""How much memory is there, how much do activations take, and which settings does "auto" choose from that?"""

from __future__ import annotations

import time
from typing import Literal

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.sharding import Device

# Share of the memory that is free after the weights which saved activations of one micro-batch may take.
ACTIVATION_SHARE = 0.4


def available_bytes(device: Device) -> int:
    """Return the bytes that can still be allocated on a device; on a CPU, the host's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def activation_bytes_per_token(c: ModelConfig, dtype: jnp.dtype, remat: Literal["full", "none"]) -> int:
    """Return what a training pass saves per token between forward and backward, all layers together."""
    values = c.d_model
    if remat == "none":
        values += c.n_kv_heads * (c.group + 2) * c.head_dim + c.n_heads * c.head_dim + c.d_model + 2 * c.d_ff
    return c.n_layers * values * dtype.itemsize


def choose_micro_batch_tokens(device: Device) -> int:
    """Return the token ceiling of a micro-batch: enough to fill the matmuls, small enough for the caches of a CPU."""
    return 2048 if device.platform == "cpu" else 16384


def choose_remat(c: ModelConfig, dtype: jnp.dtype, tokens_per_device: int, free: int) -> Literal["full", "none"]:
    """Return "none" where one micro-batch's activations fit into their share of the free memory."""
    fits = activation_bytes_per_token(c, dtype, "none") * tokens_per_device <= ACTIVATION_SHARE * free
    return "none" if fits else "full"


def faster_matmul_dtype(device: Device) -> jnp.dtype:
    """Return bfloat16 where its matmul with float32 results beats float32's on this device, else float32. Measured."""

    def seconds(dtype: jnp.dtype) -> float:
        x = jax.device_put(jnp.ones((1024, 1024), dtype), device)
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        dot = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision))
        dot(x, x).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            dot(x, x).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    return bf16 if seconds(bf16) < seconds(f32) else f32
