"""Do all local devices together compute what one does? The toy trains and samples on both, in each mesh that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from jax_client.selftest.goldens import STEP, gradient_gap, logprob_gap, step_gap
from jax_client.selftest.outcome import Outcome
from jax_client.selftest.row import Row, gap_row

# Between two meshes, of a logprob in nats and of an array of the gradient relative to its norm.
LOGPROB = {"float32": 2e-5, "bfloat16": 0.15}
GRADIENT = {"float32": 1e-4, "bfloat16": 0.1}

MEANING = (
    "the mesh computes other numbers than one device: a collective or a kernel's split over devices is wrong. Make one "
    "device visible (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS), and trust it as far as its own rows say so."
)


def meshes_of(devices: int) -> list[dict[str, int]]:
    """Return the meshes that are compared with one device: all on "fsdp", and two ways on "tensor" where that fits."""
    if devices == 1:
        return []
    found = [{"fsdp": devices}]
    if devices % 2 == 0:
        found.append({"fsdp": devices // 2, "tensor": 2} if devices > 2 else {"tensor": 2})
    return found


def name_of(mesh: dict[str, int]) -> str:
    """Return a mesh as the table has it."""
    return "mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def training_rows(ours: Outcome, mesh: dict[str, int], one: Outcome) -> Iterator[Row]:
    """Compare what a mesh trained with what one device did."""
    dtype, name = ours.dtype, name_of(mesh)
    mine, its = ours.training, one.training
    gap = logprob_gap(mine.logprobs, its.logprobs)
    yield gap_row(f"{name}: forward", gap, LOGPROB[dtype], MEANING, f"{dtype}, attention {ours.attention}")
    yield gap_row(f"{name}: gradients", gradient_gap(mine.grads[0], its.grads[0]), GRADIENT[dtype], MEANING)
    yield gap_row(f"{name}: optimizer step", step_gap(mine), STEP, MEANING)


def sampling_row(ours: Outcome, mesh: dict[str, int], one: Outcome) -> Row:
    """Compare what a mesh sampled with what one device did."""
    pairs = list(zip(ours.samples, one.samples, strict=True))
    # Behind a token that differs, the texts do.
    alike = [(a, b) for a, b in pairs if np.array_equal(a.tokens, b.tokens)]
    gap = logprob_gap((a.logprobs for a, _ in alike), (b.logprobs for _, b in alike)) if alike else np.inf
    note = f"{ours.dtype}, {len(alike)} of {len(pairs)} samples are equal"
    row = gap_row(f"{name_of(mesh)}: sampling", gap, LOGPROB[ours.dtype], MEANING, note)
    return replace(row, verdict="FAIL", meaning=MEANING) if ours.dtype == "float32" and len(alike) < len(pairs) else row
