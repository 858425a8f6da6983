"""How much memory is there, how much will a model, an adapter or a step take, and what does "auto" choose from that?

Estimates come from shapes alone, before anything is allocated. On a CPU they matter most: there the kernel kills a
process that takes too much, instead of raising an error.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.errors import DoesNotFitError
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import ParamSpec
from jax_client.models.kernels.blockwise import SHORT_ROW
from jax_client.models.parts.block import SAVED_FOR_BACKWARD, Remat
from jax_client.sharding import Device, sharding_for

logger = logging.getLogger(__name__)

# Share of the memory that is free after the weights which saved activations of one micro-batch may take.
ACTIVATION_SHARE = 0.25
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: Device, fraction: float = 1.0) -> int:
    """Return the bytes that can still be allocated on a device; on a CPU, the host's.

    Args:
        device: one device of the mesh; they are alike.
        fraction: of the device's whole memory that this process may fill.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, int(stats["bytes_limit"] * fraction) - stats.get("bytes_in_use", 0))
    if device.platform != "cpu":
        _warn_once(
            f"{device} does not say how much memory it has, as with XLA_PYTHON_CLIENT_ALLOCATOR=platform or cuda_async:"
            " that of the host is taken for it, and what does not fit is not refused. Unset that variable."
        )
    total, free = host_memory()
    return max(0, free - int(total * (1 - fraction)))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def host_memory() -> tuple[int, int]:
    """Return the host's memory, and what is free of it, in bytes; a container's limit counts."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except OSError:  # not Linux
        total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def _cgroup_limits() -> list[tuple[int, int]]:
    """Return (limit, in use) of the control groups around this process, of version 2 or 1, as far as they say."""
    found = []
    for own, limit, used in (
        (_own_cgroup(""), "memory.max", "memory.current"),
        (Path("memory") / _own_cgroup("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in (own, *own.parents):
            try:
                found.append((int((_CGROUP / group / limit).read_text()), int((_CGROUP / group / used).read_text())))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return found


def _own_cgroup(controller: str) -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return Path()
    entries = [line.split(":", 2) for line in lines]
    return next((Path(path.lstrip("/")) for _, names, path in entries if controller in names.split(",")), Path())


def tree_bytes(specs: Any, mesh: Mesh) -> int:
    """Return the bytes per device of a tree of `ParamSpec`s on the mesh."""
    leaves: list[ParamSpec] = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    shards = [(spec, sharding_for(spec.axes, spec.shape, mesh).shard_shape(spec.shape)) for spec in leaves]
    return sum(math.prod(shape) * spec.dtype.itemsize for spec, shape in shards)


def activation_bytes_per_token(c: ModelConfig, dtype: jnp.dtype, remat: Remat) -> int:
    """Return what a training pass keeps per token between forward and backward, all layers together.

    The adapters' u is left out: rank values per module and token, a few percent at rank 32.
    """
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    widths = {"x": c.d_model, "q": heads, "k": kv, "v": kv, "o": heads, "x2": c.d_model, "gate": c.d_ff, "up": c.d_ff}
    return c.n_layers * sum(widths.get(name, 0) for name in SAVED_FOR_BACKWARD[remat]) * dtype.itemsize


def step_bytes(
    c: ModelConfig, dtype: jnp.dtype, remat: Remat, tokens: int, adapter_bytes: int, targets: int, blocks: Blocks
) -> dict[str, int]:
    """Return what forward_backward allocates per device for one micro-batch, by kind.

    Args:
        tokens: of the micro-batch, per way of the mesh that rows are split.
        adapter_bytes: of the adapter's weights per device.
        targets: of a position. Where there are several, their rows of the output projection are gathered, once in the
            matmul type and once in float32.
        blocks: of scores, how large they may be.
    """
    layer = c.d_ff * 6 + c.d_model * 6 + c.n_heads * c.head_dim * 6  # float32, while one layer runs backwards
    chunk, entries = blocks.tokens(tokens), blocks.entries
    gathered = tokens * targets * c.d_model * (4 + dtype.itemsize) if targets > 1 else 0
    return {
        "activations": tokens * activation_bytes_per_token(c, dtype, remat),
        "layer": tokens * layer * 4,
        "head": 4 * (2 * chunk * min(entries, c.vocab_size) + 4 * tokens * c.d_model) + gathered,
        "gradients": 2 * adapter_bytes,
    }


def choose_concurrency(mesh: Mesh) -> int:
    """Return how many micro-batches run side by side: two on a CPU of several cores, else one.

    Between large matmuls, most of what XLA runs on a CPU keeps one core busy.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 2)


def choose_micro_batch_tokens(device: Device, ways: int) -> int:
    """Return the token ceiling of a micro-batch: enough to fill the matmuls, small enough for the caches of a CPU."""
    return ways * (SHORT_ROW if device.platform == "cpu" else 8192)


def choose_remat(c: ModelConfig, dtype: jnp.dtype, tokens: int, free: int) -> Remat:
    """Return the setting that recomputes least and whose activations fit into their share of the free memory.

    Args:
        tokens: of a micro-batch, per way of the mesh that rows are split.
        free: bytes of a device, after the weights.
    """
    for remat in ("none", "selective"):
        if activation_bytes_per_token(c, dtype, remat) * tokens <= ACTIVATION_SHARE * free:
            return remat
    return "full"


def refuse_unless_fits(
    subject: str,
    parts: Mapping[str, int],
    available: Callable[[], int],
    hints: str,
    make_room: Callable[[], bool] = lambda: False,
) -> None:
    """Raise DoesNotFitError if the parts do not fit; nothing has been allocated yet.

    Args:
        subject: of the message.
        parts: bytes per device, by kind.
        available: bytes that are free on a device, at the time of the call.
        hints: what the user can change.
        make_room: frees what can be done without, and says whether there was anything.
    """
    needed = sum(parts.values())
    if needed <= available() or (make_room() and needed <= available()):
        return
    listed = ", ".join(f"{name} {_human(size)}" for name, size in parts.items())
    raise DoesNotFitError(
        f"{subject} needs {_human(needed)} per device ({listed}), but {_human(available())} are free. Nothing was "
        f"allocated or changed. {hints}",
        category="user",
    )


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
