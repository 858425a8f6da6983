"""How fast does the package train the model, and what does the device do in one step?"""

from __future__ import annotations

import gzip
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpu_phases.models import LENGTHS, TOY_LENGTHS
from gpu_phases.rows import Journal
from gpu_phases.timing import peak_mib
from jax_client.config import EngineConfig
from jax_client.engine.core.requests import AdamSettings, LossSpec
from jax_client.engine.engine import Engine
from jax_client.values import LoraSpec, TrainExample
from jax_client.weights.read.source import resolve

ADAM = AdamSettings(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0)
SPEC = LoraSpec(rank=32, seed=0, train_unembed=False)
SHOWN = ("matmul_fraction", "limit_fraction", "host_share", "padding_waste")
STEPS = 4
LONGEST_S = 20.0  # of the steps of one row


def open_engine(journal: Journal, model: Path) -> Engine:
    """Open an engine of the model, and write down how long that took and what "auto" chose."""
    with journal.row("load") as row:
        start = time.perf_counter()
        # "" leaves the compilation cache to the environment, where the command has set it.
        settings = EngineConfig(dtype="bfloat16", compilation_cache_dir="", precompile=False)
        engine = Engine(resolve(str(model)), settings)
        row["seconds"] = time.perf_counter() - start
        described = engine.monitor.describe()
        row |= {name: described[name] for name in ("attention", "remat", "max_tokens_per_micro_batch")}
        row["free_GB"] = engine.trainer.available_bytes() / 1e9
    return engine


def examples(lengths: tuple[int, ...], vocabulary: int) -> list[TrainExample]:
    """Return sequences of random tokens, each target weighted by one."""
    rng, found = np.random.default_rng(len(lengths)), []
    for length in lengths:
        ids = rng.integers(0, vocabulary, length + 1).astype(np.int32)
        weights = np.ones(length, np.float32)
        found.append(TrainExample(tokens_T=ids[:-1], targets=ids[1:], inputs={"weights": weights}))
    return found


def stepper(engine: Engine, lane: Any, adapter: Any, lengths: tuple[int, ...]) -> Callable[[], dict[str, float]]:
    """Return one step, forward_backward and optim_step, which waits for both and returns the metrics."""
    data = examples(lengths, engine.model.vocab_size)

    def step() -> dict[str, float]:
        futures = (
            engine.train_batch(lane, adapter, data, LossSpec(name="cross_entropy")),
            engine.optim_step(lane, adapter, ADAM),
        )
        result = futures[0].result()
        return {"loss": result.metrics["loss:sum"] / sum(lengths)} | futures[1].result()

    return step


def train(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Time steps of several shapes, the settings being those that "auto" chooses, and trace one."""
    engine = open_engine(journal, model)
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    device = engine.mesh.devices.flat[0]
    for name, lengths in (TOY_LENGTHS if journal.tiny else LENGTHS).items():
        if not journal.has_time(name, 15):
            continue
        step, times, began = stepper(engine, lane, adapter, lengths), list[float](), time.perf_counter()
        before = len(engine.monitor.compiled())
        with journal.row(name) as row:
            while len(times) < STEPS and (len(times) < 3 or time.perf_counter() - began < LONGEST_S):
                start = time.perf_counter()
                metrics = step()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[2:] or times[1:])
            row |= {"tokens_per_s": sum(lengths) / seconds, "ms": seconds * 1e3, "first_s": times[0]}
            row |= {key: metrics[f"{key}:mean"] for key in SHOWN if f"{key}:mean" in metrics}
            row |= {"loss": metrics["loss"], "peak_MiB": peak_mib(device)}
            compiled = engine.monitor.compiled(before)
            row["compiled"] = [f"{each.program} {each.shapes}: {each.seconds:.0f} s" for each in compiled]
        if name == "2x4096":
            trace(journal, step)
    engine.close()


def trace(journal: Journal, step: Callable[[], Any]) -> None:
    """Profile one step: time by kernel, and the longest that the device waited; keep the profile."""
    with journal.row("trace") as row:
        folder = journal.out / "trace"
        shutil.rmtree(folder, ignore_errors=True)
        with jax.profiler.trace(str(folder)):
            step()
        (file,) = folder.rglob("*.xplane.pb")
        with gzip.open(journal.out / "train.xplane.pb.gz", "wb") as packed:
            packed.write(file.read_bytes())
        row |= kernel_times(jax.profiler.ProfileData.from_file(str(file)))
        shutil.rmtree(folder, ignore_errors=True)


def kernel_times(profile: Any) -> dict[str, Any]:
    """Return the busy time of the device, its largest gaps, and the kernels that took longest."""
    planes = [p for p in profile.planes if "GPU" in p.name] or [p for p in profile.planes if "CPU" in p.name]
    lines = [line for plane in planes for line in plane.lines if "Stream" in line.name or "GPU" not in plane.name]
    events = sorted((event.start_ns, event.duration_ns, event.name) for line in lines for event in line.events)
    total, count = Counter[str](), Counter[str]()
    busy, gaps, end = 0.0, list[float](), events[0][0]
    for start, duration, name in events:
        total[name] += duration
        count[name] += 1
        gaps.append(max(0.0, start - end))
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    span = end - events[0][0]
    return {
        "span_ms": span / 1e6,
        "busy_ms": busy / 1e6,
        "idle_ms": (span - busy) / 1e6,
        "largest_gaps_ms": [round(gap / 1e6, 3) for gap in sorted(gaps, reverse=True)[:6]],
        "kernels": len(events),
        "top": [f"{ns / 1e6:.2f} ms, {count[name]} x {name[:80]}" for name, ns in total.most_common(20)],
    }
