"""How long would a training call, a decode step, a download and a load take on a machine? Ranges, from its peaks.

A program reaches a share of a chip's peak: the shares here are a judgement until they are measured. What devices send
each other is hidden behind the arithmetic at the short end of a range, and adds to it at the long end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_client.engine.core import accounting
from jax_client.engine.sample import loop
from jax_client.engine.sample.pages import PAGE
from jax_client.estimate.plan import Estimate, Range
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.parts.mixture.moe import MOE, split_of
from jax_client.models.plan import count

# By platform: shares of the peak that the matmuls of training reach, and of the memory's bandwidth while decoding.
MATMULS: dict[str, Range] = {"tpu": (0.60, 0.35), "gpu": (0.50, 0.25)}
READS: dict[str, Range] = {"tpu": (0.80, 0.30), "gpu": (0.75, 0.20)}
# Bytes/s of a download, and of a host that reads files onto its devices.
DOWNLOAD: Range = (500e6, 50e6)
LOAD: Range = (3e9, 0.5e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Ranges, the fastest first; None where the chip's peaks are not known.

    Attributes:
        flops: useful ones of a training call; hardware_flops: with what is recomputed and padded.
        call_seconds: of forward_backward.
        tokens_per_second: real ones of training, of all devices.
        decode_seconds: of a step of all rows.
        sampled_per_second: tokens, of all rows.
        download_seconds, load_seconds: of the weights.
        programs: that a training call, a step, and sampling from the adapter compile.
    """

    flops: float
    hardware_flops: float
    call_seconds: Range | None
    tokens_per_second: Range | None
    decode_seconds: Range | None
    sampled_per_second: Range | None
    download_seconds: Range
    load_seconds: Range
    programs: int


def speed(e: Estimate) -> Speed:
    """Return how fast the answered question would run."""
    q, chip, mesh = e.question, e.question.machine.chip, e.layout.mesh
    dtype = jnp.dtype(q.dtype)
    everything, of_experts = _weight_bytes(e)
    gathered = (everything - of_experts) / mesh.shape["tensor"]
    flops = hardware = 0.0
    call = tokens_per_s = decode = sampled = None
    if e.training is not None:
        flops, hardware = accounting.flops(q.model, q.spec, [q.length] * q.rows, e.training.remat)
        real = q.rows * q.length
        hardware *= sum(plan.rows * plan.length for plan in e.training.plans) / real
        if chip.flops is not None and dtype == jnp.bfloat16:
            computing = hardware / (chip.flops * mesh.size)
            sending = _sent_bytes(e, gathered) / (chip.link or math.inf)
            fast, slow = (computing / share for share in MATMULS[chip.platform])
            call = max(fast, sending), slow + 2 * sending
            tokens_per_s = real / call[0], real / call[1]
    if e.sampling is not None and e.sampling.rows and chip.bandwidth is not None:
        ways = mesh.shape["fsdp"]
        # A state is read and written in each step.
        cache = e.sampling.rows * (_seen_tokens(e) / PAGE * e.layout.cache.page_bytes + 2 * e.layout.cache.state_bytes)
        met = _met_experts(q.model, e.sampling.rows * e.layout.limits.ways)
        reading = (gathered + of_experts / _expert_devices(e) * met + cache) / chip.bandwidth
        sending = 0.0 if e.sampling.whole else gathered * (ways - 1) / ways / (chip.link or math.inf)
        fast, slow = (reading / share for share in READS[chip.platform])
        decode = max(fast, sending), slow + 2 * sending
        rows = min(q.sampled_rows, e.sampling.rows * e.layout.limits.ways)
        sampled = rows / decode[0], rows / decode[1]
    return Speed(
        flops=flops,
        hardware_flops=hardware,
        call_seconds=call,
        tokens_per_second=tokens_per_s,
        decode_seconds=decode,
        sampled_per_second=sampled,
        download_seconds=(everything / DOWNLOAD[0], everything / DOWNLOAD[1]),
        load_seconds=(everything / q.machine.hosts / LOAD[0], everything / q.machine.hosts / LOAD[1]),
        programs=_programs(e),
    )


def _weight_bytes(e: Estimate) -> tuple[int, int]:
    """Return the bytes of the whole model, as one device would have it, and those of all experts' among them."""
    leaves = jax.tree.leaves(param_specs(e.question.model, jnp.dtype(e.question.dtype)))
    each = [(math.prod(p.shape) * p.dtype.itemsize, "experts" in p.axes) for p in leaves]
    return sum(size for size, _ in each), sum(size for size, is_of_experts in each if is_of_experts)


def _expert_devices(e: Estimate) -> int:
    """Return how many devices split the experts."""
    c, mesh = e.question.model, e.layout.mesh
    return 1 if c.experts is None else split_of(mesh, c.experts.count).count * mesh.shape["tensor"]


def _met_experts(c: ModelConfig, rows: int) -> float:
    """Return the share of a layer's experts that the tokens of a decode step meet, if experts are equally busy."""
    return 1.0 if c.experts is None else 1 - (1 - c.experts.per_token / c.experts.count) ** rows


def _seen_tokens(e: Estimate) -> float:
    """Return of how many tokens a decode step reads keys and values for a row: of its last ones, where a window is."""
    tokens, windows = e.question.sampled_tokens, accounting.windows_of(e.question.model)
    seen = sum(layers * min(tokens, window or tokens) for window, layers in windows.items())
    return seen / windows.total()


def _sent_bytes(e: Estimate, gathered: float) -> float:
    """Return what a device receives in a training call: layers' weights, and sums over a split of heads and widths.

    Of experts it receives no weights, but the tokens of the ways that share them, and sends what it adds to these.

    Args:
        e: the answered question.
        gathered: bytes of the other weights, of which a device needs all.
    """
    if e.training is None:
        return 0.0
    c, mesh = e.question.model, e.layout.mesh
    ways, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    weights = gathered * (ways - 1) / ways
    # Forwards o and down, backwards the inputs of q|k|v and of gate and up: float32, once each way round the ring. An
    # expert that all tokens share has a down, a gate and an up of its own.
    tokens = sum(plan.rows * plan.length for plan in e.training.plans) / e.layout.limits.ways
    shared = 2 * count(c, MOE) if c.experts is not None and c.experts.shared_d_ff is not None else 0
    sums = (4 * c.n_layers + shared) * tokens * c.d_model * 4 * 2 * (tensor - 1) / tensor
    # Forwards x, backwards x and dy, in the matmul type; each time sums come back in float32.
    others = tokens * (_expert_devices(e) // tensor - 1) * c.d_model * (3 * e.layout.passes.dtype.itemsize + 2 * 4)
    return 2 * len(e.training.plans) * weights + sums + others * count(c, MOE)


def _programs(e: Estimate) -> int:
    """Return how many programs are compiled until a call was trained on and its adapter sampled from."""
    if e.training is None:
        return 0
    rectangles = {(plan.rows, plan.length) for plan in e.training.plans}
    sizes = loop.sizes_on(e.question.machine.chip.platform)
    # A call whose gradients are added up in two chains needs `add`.
    more = 2 if e.layout.limits.concurrent > 1 else 1
    return 2 * len(rectangles) + more + len(sizes.tiles) + len(sizes.rows)
