"""How fast are the devices at hand? Matmul, copy, a training step and a decode step are timed, and judged.

A matmul is judged by the chip's peak where that is known, each device by the others, and a training step by what the
matmuls of this very process say that it could take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.engine.core import matmul_benchmark
from jax_client.engine.core.matmul_benchmark import BF16, F32
from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.engine import Engine
from jax_client.estimate.chips import machine_of
from jax_client.estimate.plan import Question, Range, estimate
from jax_client.estimate.speed import Speed, speed
from jax_client.selftest import toy
from jax_client.selftest.outcome import ADAM, CROSS_ENTROPY
from jax_client.selftest.row import Row
from jax_client.values import LoraSpec

# Of the peak that a chip's maker names. Large square matmuls reach three quarters and more.
PEAK_SHARE = 0.5
# Of the median device.
DEVICE_SHARE = 0.7
# Of the matmul rate, that useful arithmetic of a training step should reach on an accelerator. A CPU's toy is all
# overhead: its figure has no bar.
TRAINING_SHARE = 0.1
# A model that keeps an accelerator busy, and is written in a second.
LARGE = toy.Toy(vocab=32_768, width=1024, ffw=3072, layers=4, heads=8, kv_heads=4, context=4096)
SPEC = LoraSpec(rank=32, seed=0)
COPIES = 10


def matmul_rows(devices: list[Any], peak: float | None = None) -> Iterator[Row]:
    """Time matmuls in both types on the first device, and in the faster one on the others.

    Args:
        devices: of one kind.
        peak: FLOP/s of bfloat16 that the chip's maker names; None where it is not known.
    """
    rate_of = matmul_benchmark.matmul_rate
    first = {dtype.name: rate_of(devices[0], dtype) for dtype in (BF16, F32)}
    yield from rate_rows(first, peak)
    if devices[0].platform == "cpu":
        yield Row(
            check="devices alike", verdict="SKIP", meaning="these are one machine's cores, which all of them share"
        )
        return
    faster = BF16 if first["bfloat16"] >= first["float32"] else F32
    yield device_row({str(device): rate_of(device, faster) for device in devices})


def rate_rows(rates: Mapping[str, float], peak: float | None) -> Iterator[Row]:
    """Judge the matmul rates of one device, FLOP/s by type: bfloat16's by the chip's peak."""
    for dtype, rate in rates.items():
        least = None if peak is None or dtype != "bfloat16" else PEAK_SHARE * peak
        slow = least is not None and rate < least
        yield Row(
            check=f"{dtype} matmul",
            verdict="WARN" if slow else "PASS",
            measured=f"{_per_second(rate)}FLOP/s",
            bar="" if least is None else f"at least {_per_second(least)}FLOP/s, half of the chip's peak",
            meaning="slow device: it is throttled, shared with another process, or not the chip that it says it is."
            if slow
            else "",
            values={"flops_per_second": rate, "least": least},
        )


def device_row(rates: Mapping[str, float]) -> Row:
    """Judge devices by each other: a mesh is as fast as its slowest."""
    if len(rates) == 1:
        return Row(check="devices alike", verdict="SKIP", meaning="there is one device")
    usual = statistics.median(rates.values())
    slow = {name: rate for name, rate in rates.items() if rate < DEVICE_SHARE * usual}
    worst = min(rates, key=lambda name: rates[name])
    return Row(
        check="devices alike",
        verdict="WARN" if slow else "PASS",
        measured=f"the slowest of {len(rates)}, {worst}, has {rates[worst] / usual:.0%} of the median",
        bar=f"at least {DEVICE_SHARE:.0%}",
        meaning=f"slow device: {', '.join(slow)}. The others wait for it in every collective." if slow else "",
        values={"flops_per_second": dict(rates)},
    )


def copy_row(device: Any) -> Row:
    """Time how fast a device reads and writes its memory."""
    count = 2**24 if device.platform == "cpu" else 2**28
    array = jax.device_put(np.zeros(count, np.float32), device)
    negative = jax.jit(jnp.negative)
    negative(array).block_until_ready()
    times = []
    for _ in range(COPIES):
        start = time.perf_counter()
        negative(array).block_until_ready()
        times.append(time.perf_counter() - start)
    rate = 2 * array.nbytes / min(times)
    return Row(check="memory copy", measured=f"{_per_second(rate)}B/s", values={"bytes_per_second": rate})


def peak_of(device: Any) -> float | None:
    """Return the FLOP/s of bfloat16 that the maker of a chip names; None where they are not known."""
    return machine_of(device.platform, device.device_kind, 1, None).chip.flops


def estimated(engine: Engine, call: tuple[int, int], rows: int, tokens: int) -> Speed | None:
    """Return how fast an engine on one device should be; None where the chip's peaks are not known.

    Args:
        engine: of the model.
        call: sequences of a training call, and the tokens of each.
        rows: that are sampled at the same time.
        tokens: of each row, with its prompt.
    """
    device = engine.mesh.devices.flat[0]
    machine = machine_of(device.platform, device.device_kind, 1, None)
    if machine.chip.flops is None or engine.dtype != BF16:
        return None
    question = Question(
        model=engine.model,
        machine=machine,
        spec=SPEC,
        rows=call[0],
        length=call[1],
        sampled_rows=rows,
        sampled_tokens=tokens,
    )
    return speed(estimate(question))


def training_row(engine: Engine, spec: LoraSpec, lengths: tuple[int, ...]) -> Row:
    """Time forward_backward and optim_step over sequences of these lengths, the second time that they run."""
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    data, metrics = toy.examples(engine.model.vocab_size, lengths), {}
    for _ in range(3):
        start = time.perf_counter()
        done = engine.train_batch(lane, adapter, data, CROSS_ENTROPY), engine.optim_step(lane, adapter, ADAM)
        done[0].result()
        metrics = done[1].result()
        seconds = time.perf_counter() - start
    engine.release(adapter)
    on_cpu = engine.mesh.devices.flat[0].platform == "cpu"
    wanted = estimated(engine, (len(lengths), max(lengths)), 1, 1)
    between = None if wanted is None else wanted.tokens_per_second
    return training_verdict(sum(lengths) / seconds, metrics["matmul_fraction:mean"], bar=not on_cpu, between=between)


def training_verdict(tokens_per_second: float, fraction: float, *, bar: bool, between: Range | None = None) -> Row:
    """Judge a training step by the share of the measured matmul rate that its useful arithmetic reached.

    Args:
        tokens_per_second: of the step.
        fraction: that share.
        bar: whether there is one.
        between: the estimate's tokens/s, the fastest first.
    """
    slow = bar and fraction < TRAINING_SHARE
    beside = "" if between is None else f", estimated {between[1]:,.0f} to {between[0]:,.0f}"
    return Row(
        check="training speed",
        verdict="WARN" if slow else "PASS",
        measured=f"{tokens_per_second:,.0f} tokens/s{beside}; {fraction:.1%} of the matmul rate",
        bar=f"at least {TRAINING_SHARE:.0%} of the matmul rate" if bar else "",
        meaning="slow training: the device waits for the host, or a program has a slow part. Report this table."
        if slow
        else "",
        values={"tokens_per_second": tokens_per_second, "matmul_fraction": fraction, "estimated": between},
    )


def decode_row(engine: Engine, rows: int = 8, tokens: int = 64) -> Row:
    """Time greedy samples, the second time that they run: the milliseconds of one token of all rows, the host's too."""
    times = []
    for seed in (4, 5, 6):
        prompts = toy.prompts(engine.model.vocab_size, (32,) * rows, seed)
        start = time.perf_counter()
        asked = [
            engine.generate(None, GenerationRequest(tokens_T=prompt_T, max_tokens=tokens, temperature=0.0))
            for prompt_T in prompts
        ]
        longest = max(len(future.result().rows[0].tokens) for future in asked)
        times.append((time.perf_counter() - start) / longest)
    ms = 1e3 * min(times[1:])
    wanted = estimated(engine, (1, 1), rows, 32 + tokens)
    between = None if wanted is None or wanted.decode_seconds is None else [1e3 * s for s in wanted.decode_seconds]
    beside = "" if between is None else f", estimated {between[0]:.2f} to {between[1]:.2f}"
    return Row(
        check="decode speed",
        measured=f"{ms:.2f} ms a step of {rows} rows{beside}; {rows / ms * 1e3:,.0f} tokens/s",
        values={"ms_per_step": ms, "rows": rows, "estimated": between},
    )


def _per_second(rate: float) -> str:
    for unit in ("", "k", "M", "G"):
        if rate < 1e3:
            return f"{rate:.3g} {unit}"
        rate /= 1e3
    return f"{rate:.4g} T"
