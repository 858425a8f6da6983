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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.engine.core import adapters
from jax_client.engine.devices.current import current
from jax_client.engine.devices.local import local_device
from jax_client.errors import DoesNotFitError
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import Experts, ModelConfig
from jax_client.models.kernels.blockwise import LARGE_BLOCK
from jax_client.models.parts.block import kept_widths, saved_for_backward
from jax_client.models.parts.kind import Remat
from jax_client.models.parts.mixture import shared
from jax_client.models.parts.mixture.experts import rows_of_round
from jax_client.models.parts.mixture.moe import MOE, split_of
from jax_client.models.plan import kinds, layers
from jax_client.models.specs import ParamSpec
from jax_client.sharding import LANES, Device, sharding_for
from jax_client.values import LoraSpec

logger = logging.getLogger(__name__)

# Share of the memory that is free after the weights which saved activations of one micro-batch may take.
ACTIVATION_SHARE = 0.25
_CGROUP = Path("/sys/fs/cgroup")
# How many float32 arrays of a layer XLA's compilers keep at the same time: as wide as the hidden width, all query heads
# and the residual stream, each for all tokens. By `scripts/benchmarks/compilers.py`; see docs/benchmarks.
LIVE_ARRAYS: dict[str, dict[str, tuple[float, float, float]]] = {
    "tpu": {
        "forward": (2.1, 1.7, 5.4),
        "none": (3, 5, 6),
        "selective": (3.5, 5.5, 5.5),
        "full": (5, 6.5, 5.2),
        "attention": (0, 11.3, 0),
    },
    "gpu": {
        "forward": (2, 0, 1.5),
        "none": (1, 6.3, 1.5),
        "selective": (2.5, 4.7, 2.5),
        "full": (4, 2.5, 6),
        "attention": (0, 6.3, 0),
    },
}
# Of these arrays those as wide as all query heads, at most, while the experts of a layer run.
BESIDE_EXPERTS = {"tpu": math.inf, "gpu": 2.5}
VECTOR_MEMORY = 128 * 2**20  # of a TPU: what of them lies there takes none of the device's memory
SCORE_ARRAYS = {"tpu": 5.5, "gpu": 2}  # of blockwise attention: scores of all queries against a block of keys
GATHERED = 3  # copies of the largest weights, while the ways gather and use them
# Arrays of logits in a decode step: all, and those that a TPU does not put into its vector memory.
LOGIT_ARRAYS, FEWEST_LOGIT_ARRAYS = 7, 2.5


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


def free_bytes(mesh: Mesh, fraction: float = 1.0) -> int:
    """Return the bytes that can still be allocated on each device of a mesh: on the host that has the least.

    Args:
        mesh: of this host alone, or of several, which have told theirs.
        fraction: of a device's whole memory that a process may fill.
    """
    own = available_bytes(local_device(mesh), fraction)
    return min(own, current().free_bytes()) if mesh.is_multi_process else own


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


def live_widths(c: ModelConfig) -> tuple[int, int]:
    """Return the hidden width and that of all query heads, as wide as arrays get while a layer runs."""
    hidden, heads = (max(kind.live(c)[i] for kind in kinds(c)) for i in range(2))
    return hidden, heads


def activation_bytes_per_token(c: ModelConfig, dtype: jnp.dtype, remat: Remat, tensor: int = 1) -> int:
    """Return what a training pass keeps per token between forward and backward, all layers together.

    The adapters' u is left out: rank values per module and token, a few percent at rank 32.

    Args:
        c, dtype, remat: the model, the matmul type, what is kept.
        tensor: ways that heads and hidden widths are split.
    """
    per_layer = 0
    for layer in layers(c):
        for kind, names in zip(layer.kinds, saved_for_backward(layer.kinds, remat, c), strict=True):
            widths = kept_widths(kind, c, tensor)
            per_layer += sum(widths.get(name, 0) for name in names)
    return per_layer * dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class PassMemory:
    """What the training passes of one model on one mesh allocate on a device.

    Attributes:
        attention: its name.
        blocks: of scores, how large they may be.
    """

    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh
    attention: str
    blocks: Blocks

    @property
    def on_cpu(self) -> bool:
        """Whether the host's memory is filled, where an estimate that is too small has the process killed."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def activations(self, remat: Remat) -> int:
        """Return the bytes per token that are kept of the layers between forward and backward."""
        return activation_bytes_per_token(self.config, self.dtype, remat, self.mesh.shape["tensor"])

    def adapter(self, spec: LoraSpec) -> int:
        """Return the bytes of an adapter's weights."""
        return tree_bytes(adapters.param_specs(self.config, spec), self.mesh)

    def step(self, remat: Remat, tokens: int, spec: LoraSpec, targets: int = 1) -> dict[str, int]:
        """Return what forward_backward allocates for one micro-batch, by kind.

        Args:
            remat: what is kept.
            tokens: of the micro-batch, per way of the mesh that rows are split.
            spec: of the adapter.
            targets: of a position. Where there are several, their rows of the output projection are gathered, once in
                the matmul type and once in float32.
        """
        c, size = self.config, self.dtype.itemsize
        gathered = tokens * targets * c.d_model * (4 + size) if targets > 1 else 0
        gradients = 2 * self.adapter(spec)
        if self.on_cpu:
            layer = 6 * (sum(live_widths(c)) + c.d_model)  # float32, while one layer runs backwards
            chunk, entries = self.blocks.tokens(tokens), self.blocks.entries
            return {
                "activations": tokens * self.activations(remat),
                "layer": tokens * layer * 4,
                "head": 4 * (2 * chunk * min(entries, c.vocab_size) + 4 * tokens * c.d_model) + gathered,
                "gradients": gradients,
            }
        return {
            "activations": self.kept(remat, tokens, spec),
            "head": self.kept_beside(tokens, spec) + gathered,
            "layer": max(self.temporaries(remat, tokens, spec).values()),
            "gradients": gradients,
        }

    def kept(self, remat: Remat, tokens: int, spec: LoraSpec) -> int:
        """Return what is kept of the layers: what their backward pass reads, the adapters' u, attention's sums."""
        size, sums = self.dtype.itemsize, 4 * self.config.n_heads // self.mesh.shape["tensor"]
        beside = 0
        for layer in layers(self.config):
            saved = saved_for_backward(layer.kinds, remat, self.config)
            for kind, names in zip(layer.kinds, saved, strict=True):
                us = kind.us if getattr(spec, kind.flag) else {}
                beside += size * spec.rank * sum(us.get(name, 0) for name in names) + sums * ("attention" in names)
        return tokens * (self.activations(remat) + beside)

    def temporaries(self, remat: Remat, tokens: int, spec: LoraSpec) -> dict[str, int]:
        """Return what a forward and a backward pass have beside their arguments and results, on an accelerator.

        Float32 arrays of one layer, as many as XLA's compilers keep together (`LIVE_ARRAYS`), with copies of weights,
        and what experts have; or what the head has; or blocks of attention's scores.
        """
        c, tensor, platform = self.config, self.mesh.shape["tensor"], _accelerator(self.mesh)
        hidden, heads = live_widths(c)
        if c.experts is not None:  # they compute tile by tile: no array is as wide as a token's experts together
            hidden = max(shared.width(c), *(kind.live(c)[0] for kind in kinds(c) if kind != MOE))
        widths = hidden / tensor, heads / tensor, c.d_model

        def live(name: str, most: float = math.inf) -> float:
            """Return the bytes of such arrays, with at most `most` as wide as all query heads."""
            hiddens, heads, streams = LIVE_ARRAYS[platform][name]
            counts = hiddens, min(heads, most), streams
            return 4 * tokens * sum(n * width for n, width in zip(counts, widths, strict=True))

        # A TPU's matmuls use gathered weights part by part.
        beside = -VECTOR_MEMORY if platform == "tpu" else self._copies(hidden // tensor)
        forward, backward = self._head(tokens)
        forward, backward = max(forward, live("forward") + beside), max(backward, live(remat) + beside)
        if c.experts is not None:
            experts, most = self._experts(c.experts, tokens, spec), BESIDE_EXPERTS[platform]
            forward = max(forward, live("forward", most) + beside + experts[0])
            backward = max(backward, live(remat, most) + beside + experts[1])
        if self.attention == "blockwise":
            scores = SCORE_ARRAYS[platform] * 4 * tokens * c.n_heads / tensor * LARGE_BLOCK
            forward = max(forward, scores + 4 * 4 * tokens * c.d_model)
            backward = max(backward, live("attention"))
        return {"forward": int(forward), "backward": int(backward)}

    def _experts(self, experts: Experts, tokens: int, spec: LoraSpec) -> tuple[int, int]:
        """Return what a layer of experts has forwards and backwards.

        The rows that a device computes in a round, once their results and once what the adapter has; the tokens of all
        ways that share the experts, in the matmul type; and their sums, float32, before and after a round. A TPU's
        compiler gathers the k rows of each token before it adds them up, pads the rank to a tile's lanes, and makes the
        adapter of all layers, in the matmul type, outside the loop over layers.
        """
        D, k, size, R = self.config.d_model, experts.per_token, self.dtype.itemsize, spec.rank * spec.train_mlp
        on_tpu, ways = _accelerator(self.mesh) == "tpu", split_of(self.mesh, experts.count).count
        every = tokens * ways
        rows = rows_of_round(every * k, ways)
        summed = rows + every * k * on_tpu
        lanes = lambda width: 4 * (-(-width // LANES) * LANES if on_tpu else width)  # noqa: E731
        both = summed * D * size + every * D * (size + 4 * (1 + on_tpu)) + on_tpu * self.adapter(spec) * size // 4
        # One device that has all experts keeps gate and up by row.
        kept = 2 * rows * experts.d_ff // self.mesh.shape["tensor"] * size * (ways == 1)
        return both + summed * lanes(R) + kept, both + every * D * size + summed * lanes(2 * R)

    def _head(self, tokens: int) -> tuple[float, float]:
        """Return what the head has forwards and backwards: blocks of scores, the last one smaller, and of the table."""
        D, shard = self.config.d_model, self.config.vocab_size // self.mesh.shape["tensor"]
        entries = min(self.blocks.entries, shard)
        if _accelerator(self.mesh) == "tpu":
            scores = 4 * tokens * (entries + 2.5 * D)
            return scores, scores
        last = shard % entries
        scores = tokens * (entries * (4 + self.dtype.itemsize) + last * 4 + 2 * 4 * D)
        return scores + tokens * entries * 4 + self._copies(entries + last), scores

    def _copies(self, width: int) -> int:
        """Return the copies that a GPU makes of weights (D, width): they are cut out of larger ones, or gathered."""
        copies = GATHERED if self.mesh.shape["fsdp"] > 1 else 1
        return copies * self.config.d_model * width * self.dtype.itemsize

    def kept_beside(self, tokens: int, spec: LoraSpec) -> int:
        """Return what is kept of the rest: the last residual stream and the head's e, and with an adapter there h."""
        D, R = self.config.d_model, spec.rank
        return tokens * (8 * D + (self.dtype.itemsize * D + 4 * R if spec.train_unembed else 0))


def decode_temporaries(
    c: ModelConfig, dtype: jnp.dtype, mesh: Mesh, spec: LoraSpec, rows: int, *, whole: bool = False
) -> int:
    """Return what a block of decode steps has beside its arguments and results, on a device.

    The adapter in the matmul type, whole over the ways but for each expert's part; the MLP's weights of a layer, where
    the ways have a part of the width each and gather them, and on a GPU, which cuts them out of their stack; and a few
    arrays of logits.

    Args:
        c, dtype, mesh: the model, the matmul type, the mesh.
        spec: of the adapter.
        rows: of the block, per way.
        whole: whether each way has whole weights to decode with.
    """
    size, tensor = dtype.itemsize, mesh.shape["tensor"]
    arrays = jax.tree.leaves(adapters.param_specs(c, spec), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    ways = 1 if c.experts is None else split_of(mesh, c.experts.count).count

    def split(p: ParamSpec) -> int:
        """Return over how many devices an array is split."""
        over_tensor = {"kv_heads", "heads", "ffw", "vocab"} & set(p.axes)
        return (tensor if over_tensor else 1) * (ways if "experts" in p.axes else 1)

    adapter = sum(math.prod(p.shape) // split(p) * size for p in arrays)
    scores = 4 * rows * c.vocab_size // tensor
    near = VECTOR_MEMORY if _accelerator(mesh) == "tpu" else 0
    logits = int(max(FEWEST_LOGIT_ARRAYS * scores, LOGIT_ARRAYS * scores - near))
    copied = _accelerator(mesh) == "gpu" or (mesh.shape["fsdp"] > 1 and not whole)
    return adapter + max(3 * live_widths(c)[0] * c.d_model // tensor * size * copied, logits)


def _accelerator(mesh: Mesh) -> Literal["tpu", "gpu"]:
    return "tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"


def choose_concurrency(mesh: Mesh) -> int:
    """Return how many micro-batches run side by side: two on a CPU of several cores, else one.

    Between large matmuls, most of what XLA runs on a CPU keeps one core busy.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 2)


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
