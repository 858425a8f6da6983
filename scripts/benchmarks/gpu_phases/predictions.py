"""What should a card measure? Ranges that were written down before any run, each with its reason, for one H100 (SXM).

An H200 has the same arithmetic and 1.4 times the memory's speed. A measurement outside by more than half is a finding:
it needs an explanation, in the docs, and perhaps a repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NEAR = 1.5


@dataclass(frozen=True, slots=True)
class Prediction:
    """The range of one field of one row."""

    row: str
    field: str
    low: float
    high: float
    why: str


# The model behind them: matmuls at 700 TFLOP/s, memory at 2.55 TB/s, packed attention at 480 forwards, 380 backwards.
PREDICTIONS = [
    Prediction("facts/memory copy", "GB_s", 2900, 3100, "seen on one H100; an H200 has 4,300"),
    Prediction("facts/matmul bfloat16", "TF_s", 770, 800, "seen; of random numbers, since equal ones flatter"),
    Prediction("facts/matmul float32", "TF_s", 45, 60, "full precision: no TF32"),
    Prediction("kernels/attention 2x4096", "forward_ms", 0.5, 0.7, "model: 0.57"),
    Prediction("kernels/attention 2x4096", "backward_ms", 2.1, 2.9, "model: forward again and backward, 2.4"),
    Prediction("kernels/attention 1x8192", "forward_ms", 1.0, 1.4, "model: 1.15"),
    Prediction("kernels/attention 1x8192", "backward_ms", 4.2, 5.6, "model: 4.8"),
    Prediction("kernels/gate_up", "plain_ms", 1.2, 1.5, "model: 1.17 of arithmetic, 0.25 to write float32"),
    Prediction("kernels/gate_up", "adapter_ms", 1.3, 2.5, "with the adapter's product added in the epilogue, or after"),
    Prediction("train/load", "seconds", 4, 7, "8 GB at 8 threads"),
    Prediction("train/2x4096", "tokens_per_s", 12500, 18000, "13.8k where gate and up are recomputed, 16k where not"),
    Prediction("train/8x4096", "tokens_per_s", 13000, 18000, "as 2x4096, the idle time shared by four"),
    Prediction("train/1x8192", "tokens_per_s", 10500, 15000, "attention is a larger part"),
    Prediction("train/8x256", "tokens_per_s", 9000, 13000, "launches and weight reads show at 2,048 tokens"),
    Prediction("train/ragged16", "tokens_per_s", 9000, 13000, "padding, and 4 to 8 ms idle a step"),
    Prediction("train/trace", "idle_ms", 0, 8, "between forward_backward and optim_step"),
    Prediction("decode/16 rows at 64", "ms", 4, 9, "the weights' reads alone take 2.8"),
    Prediction("decode/16 rows at 512", "ms", 4.5, 14, "a loop of 64 keys a turn takes 14, a kernel 4.5"),
    Prediction("decode/16 rows at 1984", "ms", 5.5, 40, "a loop of 64 keys a turn takes 40, a kernel 5.5"),
    Prediction("decode/128 rows at 64", "ms", 6, 20, "padding rows cost little: 128 are one tile of the tensor cores"),
    Prediction("decode/prompt of 4096", "ms", 70, 600, "tiles of 32 tokens take 500, a kernel 70"),
    Prediction("torch/2x4096", "tokens_per_s", 9000, 14000, "a guess: there is no published figure of this set-up"),
    Prediction("torch/generate8", "ms_per_step", 25, 30, "eager generate(), 36 layers"),
]


def table(rows: Sequence[dict[str, Any]], phases: Sequence[str], tiny: bool) -> str:
    """Return predictions beside measurements, then every other figure, then what failed."""
    lines, known = [f"{'row':40}{'measured':>12}  {'predicted, H100':18} verdict"], set[str]()
    for each in PREDICTIONS:
        if each.row.partition("/")[0] not in phases:
            continue
        value = next((row[each.field] for row in rows if row["row"] == each.row and each.field in row), None)
        known |= {each.row} if value is not None else set()
        shown = "-" if value is None else f"{value:.4g}"
        named = f"{each.row} {each.field}"
        lines.append(f"{named:40}{shown:>12}  {f'{each.low:g} to {each.high:g}':18} {_verdict(each, value, tiny)}")
    lines.append("\nwithout a prediction")
    for row in rows:
        figures = {key: value for key, value in row.items() if key != "at_s" and isinstance(value, int | float)}
        if figures and row["row"] not in known:
            lines.append(f"{row['row']}: " + ", ".join(f"{key} {value:.5g}" for key, value in figures.items()))
    lines.append("\nfailed, killed or left out")
    for row in rows:
        wrong = {key: row[key] for key in ("error", "skipped", "out_of_memory", "code", "failed") if row.get(key)}
        if wrong:
            lines.append(f"{row['row']}: " + "; ".join(f"{key} {value}" for key, value in wrong.items()))
    return "\n".join(line[:200] for line in lines) + "\n"


def _verdict(each: Prediction, value: float | None, tiny: bool) -> str:
    if value is None:
        return "not measured"
    if tiny:
        return "a toy"
    if each.low <= value <= each.high:
        return "as predicted"
    near = each.low / NEAR <= value <= each.high * NEAR
    return f"{'near' if near else 'MISS'}; {each.why}"
