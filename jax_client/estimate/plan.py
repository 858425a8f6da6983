"""What would a model take on a machine, and what would "auto" choose there? From the sizes in its config alone.

The engine's own functions decide, on a mesh of devices that only say what they are: no rule is written twice. `speed`
has the times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.config import Remat as RematSetting
from jax_client.engine.core import memory
from jax_client.engine.core.attention_check import kernel_of, plain_attention
from jax_client.engine.core.memory import PassMemory
from jax_client.engine.sample import loop, pages
from jax_client.engine.sample.cache_size import CacheSize
from jax_client.engine.sample.device import weights
from jax_client.engine.train import packing
from jax_client.engine.train.limits import TYPICAL, Sizing
from jax_client.engine.train.packing import Limits, Plan
from jax_client.estimate.chips import Machine
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.kind import Remat
from jax_client.sharding import check_mesh_divides, describe_mesh
from jax_client.values import LoraSpec

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked about.

    Attributes:
        mesh: "auto" or sizes by axis, as `EngineConfig.mesh`.
        rows, length: sequences of a training call, and tokens of each.
        sampled_rows, sampled_tokens: rows that are sampled at the same time, and tokens of each with its prompt.
        max_tokens, remat, memory_fraction: as in `EngineConfig`.
    """

    model: ModelConfig
    machine: Machine
    mesh: Literal["auto"] | Mapping[str, int] = "auto"
    dtype: str = "bfloat16"
    spec: LoraSpec = TYPICAL
    rows: int = 32
    length: int = 4096
    sampled_rows: int = 128
    sampled_tokens: int = 2048
    max_tokens: int | None = None
    remat: RematSetting = "auto"
    memory_fraction: float = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A model on a mesh: what is in memory before any request, and what "auto" chooses.

    Attributes:
        usable: bytes of a device that may be filled.
        weights, adapter: bytes of a device; the adapter's are those of its weights alone.
        cache: of a way.
        pages: of it.
        limits: of a micro-batch.
    """

    mesh: Mesh
    attention: Attention
    passes: PassMemory
    sizing: Sizing
    limits: Limits
    usable: int
    weights: int
    adapter: int
    cache: CacheSize
    pages: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of a device that the cache takes."""
        return self.cache.bytes(self.pages)


def lay_out(q: Question) -> Layout:
    """Return how the engine would lay a model out.

    Raises:
        BadRequestError: the mesh does not have as many devices as the machine, or does not divide the model.
    """
    c, dtype, platform = q.model, jnp.dtype(q.dtype), q.machine.chip.platform
    mesh = describe_mesh(q.mesh, q.machine.devices(), c)
    check_mesh_divides(mesh, c)
    weights = memory.tree_bytes(param_specs(c, dtype), mesh)
    usable = memory.available_bytes(mesh.devices.flat[0], q.memory_fraction)
    free = max(0, usable - weights)
    sizes = loop.sizes_on(platform)
    cache = CacheSize.of(c, dtype, mesh.shape["tensor"], sizes.rows[-1], sizes.tokens_per_row, free)
    attention = kernel_of(mesh, c, dtype) or plain_attention(mesh)
    passes = PassMemory(config=c, dtype=dtype, mesh=mesh, attention=attention.name, blocks=Blocks.of(platform))
    adapter = passes.adapter(q.spec)
    held = cache.bytes(cache.pages(free))
    sizing = Sizing(memory=passes, attention=attention, free=free, cache=held, setting=q.remat)
    return Layout(
        mesh=mesh,
        attention=attention,
        passes=passes,
        sizing=sizing,
        limits=sizing.limits(q.max_tokens),
        usable=usable,
        weights=weights,
        adapter=adapter,
        cache=cache,
        pages=cache.pages(max(0, free - 3 * adapter)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A training call.

    Attributes:
        plans: its micro-batches.
        largest: of them.
        remat: of the largest.
        parts: bytes of a device that the largest takes, by kind.
        fits: whether they are free beside the weights and the adapter, once the cache is released.
        beside_cache: whether they are free beside the cache, too.
    """

    plans: tuple[Plan, ...]
    largest: Plan
    remat: Remat
    parts: dict[str, int]
    fits: bool
    beside_cache: bool


def train(q: Question, layout: Layout) -> Training:
    """Return how the engine would run a training call: what does not fit is halved, as by `Trainer`."""
    limits = layout.limits
    room = layout.usable - layout.weights - 3 * layout.adapter
    while True:
        plans = tuple(packing.plan_call([q.length] * q.rows, limits))
        largest = max(plans, key=lambda plan: plan.rows * plan.length)
        tokens = largest.rows * largest.length // limits.ways
        remat = layout.sizing.remat(tokens * (1 if limits.alone(largest) else limits.concurrent))
        parts = layout.passes.step(remat, tokens, q.spec)
        parts = {name: size * (1 if limits.alone(largest) else limits.concurrent) for name, size in parts.items()}
        fits = sum(parts.values()) <= room
        if fits or tokens <= packing.ROW_LENGTHS[0] or limits.alone(largest):
            beside = sum(parts.values()) + layout.cache_bytes <= room
            return Training(
                plans=plans, largest=largest, remat=remat, parts=parts, fits=fits, beside_cache=fits and beside
            )
        limits = replace(limits, tokens=tokens // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Rows that are sampled together.

    Attributes:
        cache_tokens: that all ways hold.
        rows: per way, that run at the same time: those asked for, as far as a block and the cache have room.
        slots: rows per way of the decode program that runs them.
        whole: bytes of a device, of weights that each way has whole to decode with; 0 if they are gathered each step.
        temporaries: bytes of a device, while it decodes.
        fits: whether the cache holds a row, and it and the temporaries are free beside the weights and the adapter.
    """

    cache_tokens: int
    rows: int
    slots: int
    whole: int
    temporaries: int
    fits: bool


def sample(q: Question, layout: Layout) -> Sampling:
    """Return how the engine would sample."""
    ladder = loop.sizes_on(q.machine.chip.platform).rows
    ways = layout.limits.ways
    held = layout.pages * pages.PAGE
    rows = min(-(-q.sampled_rows // ways), ladder[-1], held // q.sampled_tokens)
    if layout.cache.states:
        rows = min(rows, (layout.cache.states - 1) // 2)
    slots = next(size for size in ladder if size >= rows)
    dtype, mesh = layout.passes.dtype, layout.mesh
    beside = layout.weights + layout.adapter + layout.cache_bytes
    whole = weights.whole_bytes(q.model, dtype, mesh)
    if not weights.fit_whole(whole, layout.usable - beside):
        whole = 0
    temporaries = memory.decode_temporaries(q.model, dtype, mesh, q.spec, slots, whole=whole > 0)
    taken = beside + whole + temporaries
    return Sampling(
        cache_tokens=held * ways,
        rows=rows,
        slots=slots,
        whole=whole,
        temporaries=temporaries,
        fits=rows > 0 and taken <= layout.usable,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The answer to a question.

    Attributes:
        training, sampling: None where the weights do not fit.
    """

    question: Question
    layout: Layout
    training: Training | None
    sampling: Sampling | None

    @property
    def fits(self) -> bool:
        """Whether the model trains and samples."""
        return self.training is not None and self.training.fits and self.sampling is not None and self.sampling.fits


def estimate(q: Question) -> Estimate:
    """Answer a question. Raises BadRequestError as `lay_out`."""
    layout = lay_out(q)
    if layout.weights > layout.usable:
        return Estimate(question=q, layout=layout, training=None, sampling=None)
    return Estimate(question=q, layout=layout, training=train(q, layout), sampling=sample(q, layout))


def hints(q: Question) -> list[str]:
    """Return the changes, each in words, with any one of which the model would train and sample."""
    spec, machine = q.spec, q.machine
    changes: dict[str, Question] = {
        "EngineConfig(remat='full')": replace(q, remat="full"),
        "EngineConfig(memory_fraction=0.95)": replace(q, memory_fraction=0.95),
        "train_unembed=False": replace(q, spec=replace(spec, train_unembed=False)),
        "rank 8": replace(q, spec=replace(spec, rank=min(8, spec.rank))),
        f"sequences of {q.length // 2:,} tokens": replace(q, length=max(1, q.length // 2)),
    }
    if machine.chip.platform == "gpu":
        chip = replace(machine.chip, usable=int(machine.chip.usable / 0.75 * 0.92))
        changes["XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"] = replace(q, machine=replace(machine, chip=chip))
    if q.mesh == "auto":
        for factor in (2, 4, 8, 16, 32, 64):
            more = replace(machine, count=machine.count * factor)
            changes[f"{factor} times as many devices"] = replace(q, machine=more)
    found = [text for text, changed in changes.items() if changed != q and estimate(changed).fits]
    times = [text for text in found if "as many devices" in text]
    return [text for text in found if text not in times[1:]]
