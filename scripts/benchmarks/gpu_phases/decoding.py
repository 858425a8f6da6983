"""How long does a decode step take, by rows and by context, and a prompt? Measured through the engine's own surface.

Requests of the same prompts are sampled twice, with few and with many new tokens. The difference is that of the steps
alone: prompts, admission and the way back are in both.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_phases.rows import Journal
from gpu_phases.timing import peak_mib
from gpu_phases.training import SPEC, open_engine
from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.engine import Engine

FEW, MANY = 32, 96
CASES = ((16, 64), (16, 512), (16, 1984), (128, 64), (128, 512))  # rows, tokens of context
PROMPTS = (512, 4096)
TOY_CASES, TOY_PROMPTS, TOY_TOKENS = ((8, 32),), (128,), (8, 40)


def seconds(engine: Engine, snapshot: Any, prompts: np.ndarray, tokens: int) -> float:
    """Return how long it takes to sample `tokens` tokens after each prompt, greedily and through every stop."""
    start = time.perf_counter()
    asked = [
        engine.generate(snapshot, GenerationRequest(tokens_T=prompt_T, max_tokens=tokens, temperature=0.0))
        for prompt_T in prompts
    ]
    lengths = {len(future.result().rows[0].tokens) for future in asked}
    if lengths != {tokens}:
        raise RuntimeError(f"rows of {sorted(lengths)} tokens instead of {tokens}: the figures would be wrong")
    return time.perf_counter() - start


def decode(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Time decode steps and prompts with an adapter."""
    engine = open_engine(journal, model)
    lane, rng = engine.open_lane(), np.random.default_rng(0)
    snapshot = engine.snapshot(lane, engine.open_adapter(lane, SPEC).result()).result()
    few, many = TOY_TOKENS if journal.tiny else (FEW, MANY)
    # Fresh prompts each time: the cache would know those of before.
    fresh = lambda rows, length: rng.integers(0, config["vocab_size"], (rows, length)).astype(np.int32)  # noqa: E731
    for rows, context in TOY_CASES if journal.tiny else CASES:
        name = f"{rows} rows at {context}"
        if not journal.has_time(name, 10):
            continue
        with journal.row(name) as row:
            first = seconds(engine, snapshot, fresh(rows, context), few)  # compiles
            short, long = (
                min(seconds(engine, snapshot, fresh(rows, context), n) for _ in range(2)) for n in (few, many)
            )
            ms = 1e3 * (long - short) / (many - few)
            if ms <= 0:
                raise RuntimeError(
                    f"{many} tokens took {long:.3f} s and {few} took {short:.3f} s: no step is that fast"
                )
            row |= {
                "ms": ms,
                "tokens_per_s": rows / ms * 1e3,
                "whole_tokens_per_s": rows * many / long,
                "first_s": first,
            }
            row["peak_MiB"] = peak_mib(engine.mesh.devices.flat[0])
    for length in TOY_PROMPTS if journal.tiny else PROMPTS:
        if not journal.has_time(f"prompt of {length}", 10):
            continue
        with journal.row(f"prompt of {length}") as row:
            times = [seconds(engine, snapshot, fresh(1, length), 1) for _ in range(3)]
            row |= {"ms": min(times[1:]) * 1e3, "first_s": times[0]}
    with journal.row("compiled") as row:
        compiled = engine.monitor.compiled()
        row["programs"] = [f"{each.program} {each.shapes}: {each.seconds:.0f} s" for each in compiled]
        row["cache_tokens"] = engine.monitor.usage()["sampling"]["cache_tokens"]
    engine.close()
