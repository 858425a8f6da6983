"""How do the tests trace a torch loss, and run it by torch and as a graph? Where torch is missing, they are skipped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jax_client.torch_graph.graph import read_graph
from jax_client.torch_graph.program import GraphProgram, shapes_of

torch = pytest.importorskip("torch")
F = torch.nn.functional
custom_loss = pytest.importorskip("tinker.lib.public_interfaces.custom_loss")


def wire(fn: Any, ranks: dict[str, int]) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Trace a loss and write it as the SDK does, through JSON."""
    names = {("logprobs" if name == "p" else name): rank for name, rank in ranks.items()}
    handle = custom_loss.trace_loss(fn, names, "session")
    nodes = json.loads(custom_loss.encode_graph(handle).model_dump_json())["nodes"]
    return nodes, list(names.items())


def by_torch(fn: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray, dict[str, float]]:
    logprobs, *others = map(torch.from_numpy, arrays)
    logprobs = logprobs.clone().requires_grad_(True)
    loss, metrics = fn(logprobs, *others)
    loss.backward()
    return float(loss.detach()), logprobs.grad.numpy(), {k: float(v.detach()) for k, v in metrics.items()}


def by_graph(nodes: Any, inputs: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray, dict[str, float]]:
    program = GraphProgram(read_graph(nodes, inputs, "loss"))
    (found,) = program.prepare([shapes_of(arrays)]).result(300).evaluate([arrays])
    return found


def same(found: Any, expected: Any, atol: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=atol)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=atol)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, rel=1e-5, abs=atol)


def ppo(logprobs, logprobs_old, advantages, mask):
    count = mask.sum().clamp(min=1)
    centred = (advantages - (advantages * mask).sum() / count) / (advantages.std() + 1e-6)
    ratio = torch.exp(logprobs - logprobs_old)
    surrogate = torch.minimum(ratio * centred, ratio.clamp(0.8, 1.2) * centred)
    kl = torch.exp(logprobs_old - logprobs) - (logprobs_old - logprobs) - 1
    loss = -(surrogate * mask).sum() / count + 0.05 * (kl * mask).mean()
    clipped = ((ratio < 0.8) | (ratio > 1.2)) & mask.bool()
    return loss, {"custom/clipped:mean": clipped.float().mean(), "custom/kl:sum": (kl * mask).sum()}


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(-1, 0.4, shape).astype(np.float32) for shape in shapes]
