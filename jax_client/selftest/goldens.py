"""Are the numbers of one device right? An engine's are compared with the float64 reference, in both types.

In float32 they have to be as exact as on any device, in bfloat16 no further off than its rounding: nearer, too, is
wrong, for then something computes in another type than it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.selftest import toy
from jax_client.selftest.outcome import ADAM, DType, Outcome, Trained
from jax_client.selftest.reference import Gradients, Reference, adamw
from jax_client.selftest.row import Row, gap_row

# Largest differences: of a logprob in nats, of an array of the gradient relative to its norm.
LOGPROB = {"float32": 1e-4, "bfloat16": 0.15}
GRADIENT = {"float32": 3e-4, "bfloat16": 0.1}
# Of the weights' change in two steps, which is computed in float32 from the engine's own gradients.
STEP = 1e-3
# Between these, a logprob is off as bfloat16's rounding has it.
ROUNDED = 1e-3, 0.15


def expected(model: ModelConfig, tensors: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], Gradients]:
    """Return the logprobs and the gradient of the toy with its adapter, given its weights; equal for both types."""
    reference = Reference(model, tensors, toy.adapter(model).weights, toy.SPEC.rank)
    return reference.gradients(toy.examples(model.vocab_size))


def training_rows(found: Outcome, wanted: tuple[list[np.ndarray], Gradients]) -> Iterator[Row]:
    """Compare forward pass, gradients and optimizer steps with what is `expected`."""
    ours, dtype, name = found.training, found.dtype, found.attention
    logprobs, grads = wanted
    yield forward_row(dtype, logprob_gap(ours.logprobs, logprobs), f"attention {name}")
    yield gap_row(
        f"{dtype} gradients",
        gradient_gap(ours.grads[0], grads),
        GRADIENT[dtype],
        f"the backward pass is wrong on this device; with attention {name}, see the rows of the kernels.",
    )
    yield gap_row(
        f"{dtype} optimizer step",
        step_gap(ours),
        STEP,
        "AdamW gives other weights than its formula: training would go astray without an error.",
    )


def forward_row(dtype: DType, gap: float, note: str = "") -> Row:
    """Return the row of a forward pass whose logprobs are off by `gap`, which also tells the type it computed in."""
    exact, rounded = LOGPROB["float32"], ROUNDED
    meaning = "the forward pass is wrong on this device: neither training nor sampling can be trusted."
    if dtype == "float32" and rounded[0] <= gap <= rounded[1]:
        meaning = (
            "wrong dtype: float32 was asked for, and the numbers are as far off as bfloat16 or TF32 products make them."
        )
    row = gap_row(f"{dtype} forward", gap, LOGPROB[dtype], meaning, note)
    if dtype == "bfloat16" and gap <= exact:
        return Row(
            check=row.check,
            verdict="FAIL",
            measured=row.measured,
            bar=f"{exact:.0e} to {LOGPROB[dtype]:.0e}".replace("e-0", "e-"),
            meaning="wrong dtype: bfloat16 was asked for, and the numbers are as exact as float32's, at its cost.",
            values=row.values,
        )
    return row


def gradient_gap(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of an array of a gradient, relative to the norm of the array of `theirs`."""
    return largest(float(np.linalg.norm(ours[name] - g) / np.linalg.norm(g)) for name, g in theirs.items())


def logprob_gap(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> float:
    """Return the largest difference of two lists of logprobs."""
    return largest(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True))


def largest(gaps: Iterable[float]) -> float:
    """Return the largest difference; infinity if one of them is no number, which `max` may pass over."""
    return max((gap if gap == gap else np.inf for gap in gaps), default=0.0)


def step_gap(ours: Trained) -> float:
    """Return how far the steps are from AdamW's formula: the largest difference of a change, relative to its norm."""
    end = adamw(ours.start, ours.grads, ADAM)
    change = {name: weight - ours.start[name] for name, weight in end.items()}
    return gradient_gap({name: ours.end[name].astype(np.float64) - ours.start[name] for name in change}, change)


def sampling_rows(found: Outcome, tensors: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Compare greedy samples with the reference: their logprobs, and that each token is the likeliest."""
    dtype = found.dtype
    gap, misses, count = sampling_gap(found, tensors, LOGPROB[dtype])
    yield gap_row(
        f"{dtype} greedy sampling",
        gap,
        LOGPROB[dtype],
        "the sampler's logprobs are wrong on this device: its cache or its paged attention; training may be right.",
        f"{count - misses} of {count} tokens are the likeliest",
    )
    if misses:
        yield Row(
            check=f"{dtype} greedy tokens",
            verdict="FAIL",
            measured=f"{misses} of {count} tokens are not the likeliest",
            bar="0",
            meaning="sampling at temperature 0 does not take the token of the largest logit.",
            values={"misses": misses, "tokens": count},
        )


def sampling_gap(found: Outcome, tensors: Mapping[str, np.ndarray], margin: float) -> tuple[float, int, int]:
    """Return the largest difference of a sampled token's logprob, how many are not the likeliest, and the tokens.

    Args:
        found: with samples.
        tensors: the toy's weights.
        margin: how much less likely than the likeliest a token may be, in nats: the arithmetic's error.
    """
    reference = Reference(found.model, tensors, found.training.start, toy.SPEC.rank)
    gaps, misses, count = [], 0, 0
    for prompt_T, row in zip(toy.prompts(found.model.vocab_size), found.samples, strict=True):
        whole_T, first, n = np.concatenate([prompt_T, row.tokens]), len(prompt_T) - 1, len(row.tokens)
        logprobs_NV = reference.logprobs(whole_T[:-1])[first:]
        its_N = logprobs_NV[np.arange(n), row.tokens]
        gaps.append(float(np.max(np.abs(its_N - row.logprobs))))
        misses += int(np.sum(np.max(logprobs_NV, axis=1) - its_N > margin))
        count += n
    return largest(gaps), misses, count
