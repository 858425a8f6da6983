"""What is this card, does the package compute right on it, and how fast are its kernels by themselves?"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench_rows import machine, output
from gpu_phases.rows import Journal
from gpu_phases.timing import milliseconds
from jax_client.engine.core.attention_check import choose, cudnn_version
from jax_client.engine.core.matmul_benchmark import BF16, F32, matmul_rate
from jax_client.models.families.registry import config_from_hf
from jax_client.models.parts.lora import linear
from jax_client.selftest.rates import copy_row
from jax_client.selftest.run import SelfTest, run
from jax_client.sharding import make_mesh

RANK = 32


def facts(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Write down versions, the card, and the two ceilings: its memory's rate and its matmuls'."""
    with journal.row("machine") as row:
        row |= machine()
        query = "--query-gpu=name,memory.total,driver_version,clocks.sm,power.limit"
        row["card"] = output("nvidia-smi", query, "--format=csv,noheader")
        row |= {"cores": os.cpu_count(), "python": sys.version.split()[0], "cudnn": cudnn_version()}
    device = jax.devices()[0]
    with journal.row("device") as row:
        stats = device.memory_stats() or {}
        row |= {"platform": device.platform, "kind": device.device_kind, "count": len(jax.devices())}
        row |= {name: stats[name] for name in ("bytes_limit", "bytes_in_use") if name in stats}
    with journal.row("memory copy") as row:
        rate = copy_row(device).values["bytes_per_second"]
        row["GB_s"] = float(str(rate)) / 1e9
    for dtype in (BF16, F32):
        with journal.row(f"matmul {dtype.name}") as row:
            row["TF_s"] = matmul_rate(device, dtype) / 1e12
    with journal.row("attention") as row:
        choice = choose(make_mesh("auto", [device]), config_from_hf(config, "qwen3"), BF16)
        row |= {"name": choice.attention.name, "refused": dict(choice.refused), "failed": choice.failed}


def right(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Run the self-test's numbers on one device; its rates are measured by the other phases."""
    with tempfile.TemporaryDirectory() as directory:
        test = SelfTest(Path(directory), jax.devices()[:1])
        wanted = {name: group for name, group in test.groups().items() if name not in ("rates of the device", "speed")}
        if journal.tiny:  # the rest has a test of its own
            wanted = {name: wanted[name] for name in ("attention kernels", "paged attention")}
        for row in run(wanted, lambda name: None):
            failed = row.meaning if row.verdict == "FAIL" else ""
            journal.write(row.check, verdict=row.verdict, measured=row.measured, failed=failed, **dict(row.values))
        test.close()


def kernels(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Time attention and a linear layer with its adapter, alone, in the model's widths."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    tokens = 512 if journal.tiny else 8192
    attention = choose(make_mesh("auto", jax.devices()[:1]), config_from_hf(config, "qwen3"), BF16).attention
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
    for name, rows in (("2x4096", 2), ("1x8192", 1)):
        with journal.row(f"attention {name}") as row:
            T = tokens // rows
            q, k, v = (draw(i, rows, T, K, *more, H).astype(jnp.float32) for i, more in enumerate([(N // K,), (), ()]))
            segments = jnp.ones((rows, T), jnp.int32)
            forward = jax.jit(lambda q, k, v, s: attention.forward(q, k, v, s, BF16))
            backward = jax.jit(lambda *args: attention.backward(*args, BF16))
            o, kept = forward(q, k, v, segments)
            flops = 2 * rows * T * T * N * H  # of the pairs that causality allows
            row |= {"kernel": attention.name, "forward_ms": milliseconds(forward, q, k, v, segments)}
            row["backward_ms"] = milliseconds(backward, q, k, v, segments, o, kept, q)
            row |= {
                "forward_TF_s": flops / row["forward_ms"] / 1e9,
                "backward_TF_s": 2.5 * flops / row["backward_ms"] / 1e9,
            }
    x = draw(0, tokens, D)
    for name, outputs in (("gate_up", [F, F]), ("qkv", [(N + 2 * K) * H])):
        with journal.row(name) as row:
            ws, bs = ([draw(i, inputs, out) for i, out in enumerate(outputs)] for inputs in (D, RANK))
            a = draw(9, RANK * len(outputs), D)
            plain = jax.jit(lambda x, ws: linear(x, ws, None, 1.0, BF16)[0])
            adapted = jax.jit(lambda x, ws, a, bs: linear(x, ws, (a, bs), 1.0, BF16)[0])
            row |= {"plain_ms": milliseconds(plain, x, ws), "adapter_ms": milliseconds(adapted, x, ws, a, bs)}
            row["plain_TF_s"] = 2 * tokens * D * sum(outputs) / row["plain_ms"] / 1e9
