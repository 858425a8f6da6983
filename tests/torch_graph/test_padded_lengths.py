"""Does one program of a padded length compute what a program of the exact length computes?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.torch_graph.graph import read_graph
from jax_client.torch_graph.program import GraphProgram, shapes_of
from jax_client.torch_graph.traced import padding
from support.graphs.traced_losses import F, numbers, ppo, torch, wire

pytestmark = pytest.mark.torch
LENGTHS = (5, 23)
# Elementwise, and places taken: there is nothing to round.
EXACT: dict[str, Callable[[Any], Any]] = {
    "first": lambda p: p[0] * 2,
    "last": lambda p: p[-1] * p[-3:][0],
    "greatest": lambda p: p.amax(0) - p.amin(0) + p.max(0).values,
    "where it is greatest": lambda p: p[p.argmax()] + p[p.argmin()],
    "likeliest": lambda p: p.topk(3).values[2] + p.sort().values[-1] - p.sort(descending=True).values[1],
    "neighbours": lambda p: (p[1:] - p[:-1])[-1] + p.diff()[0] + p.roll(1)[0] + p.roll(-1)[-1] + p.flip(0)[2],
    "joined": lambda p: torch.cat([p, p * 2])[-1] + torch.cat([p[:1], p[:-1]])[-1] + torch.stack([p, p], 1)[-1, 0],
    "indices": lambda p: p[torch.arange(p.shape[0])][-2] * p.shape[0] / (p.shape[0] - 1),
}
CLOSE: dict[str, Callable[[Any], Any]] = {
    "mean": lambda p: p.mean() + p.sum() / p.shape[0] + p.sum() / p.numel(),
    "spread": lambda p: p.std() + p.var() + p.norm(),
    "softmax": lambda p: (p.softmax(0) * p).sum() + p.logsumexp(0) + p.log_softmax(0).mean(),
    "scans": lambda p: (p.cumsum(0) ** 2).mean() + p.logcumsumexp(0).mean(),
    "parts": lambda p: (p[::2] ** 2).mean() + p[: p.shape[0] // 2].mean() + p[p.shape[0] // 2 :].mean(),
    "order": lambda p: (p.sort().values * torch.arange(p.shape[0])).mean(),
    "pairs": lambda p: F.softplus(p[:, None] - p[None, :]).mean() + torch.tril(torch.outer(p, p)).mean() + p @ p,
    "shapes": lambda p: torch.stack([p, p * 2], 1).flatten().cumsum(0).mean() + p.view(-1, 1).expand(-1, 3).mean(),
    "losses": lambda p: F.kl_div(p, p.exp(), reduction="batchmean") + F.mse_loss(p, torch.zeros_like(p)),
    "any": lambda p: (p * (p > -1).any().float()).mean() + torch.where(p > -1, p, -p).mean(),
}
# What follows from the length in another way, or has no rule, is compiled for each length.
EACH_LENGTH: dict[str, Callable[[Any], Any]] = {
    "a number of the length": lambda p: p.sum() * math.log(p.shape[0]),
    "products of everything": lambda p: p.cumprod(0).sum(),
    "one by one": lambda p: p.unbind()[0],
    "halves": lambda p: p.chunk(2)[0].sum(),
}


def read(loss: Callable[..., Any], names: dict[str, int]) -> Any:
    return read_graph(*wire(loss, names), "loss")


def of_logprobs(loss: Callable[[Any], Any]) -> Any:
    return read(lambda logprobs: (loss(logprobs), {}), {"p": 1})


def alone(graph: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """The same function, compiled for exactly this length."""
    with jax.enable_x64(True):
        compiled = (
            jax.jit(jax.value_and_grad(graph.function(), has_aux=True))
            .lower(*arrays)
            .compile(compiler_options={"xla_disable_hlo_passes": "fusion"})
        )
        (loss, _), gradient = jax.device_get(compiled(*arrays))
    return float(loss), gradient


def padded(graph: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray]:
    program = GraphProgram(graph)
    (found,) = program.prepare([shapes_of(arrays)]).result(60).evaluate([arrays])
    assert program._patterns[padding.pattern_of(shapes_of(arrays))[0]] is not None
    return found[:2]


@pytest.mark.parametrize("name", EXACT)
def test_what_only_takes_values_is_equal_to_the_last_bit(name: str) -> None:
    graph = of_logprobs(EXACT[name])
    for length in LENGTHS:
        (found, gradient), (expected, its) = (way(graph, numbers(length, (length,))) for way in (padded, alone))
        assert found == pytest.approx(expected, rel=2e-7) and np.array_equal(gradient, its)


@pytest.mark.parametrize("name", CLOSE)
def test_what_adds_up_is_equal_up_to_rounding(name: str) -> None:
    graph = of_logprobs(CLOSE[name])
    for length in LENGTHS:
        (found, gradient), (expected, its) = (way(graph, numbers(length, (length,))) for way in (padded, alone))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        np.testing.assert_allclose(gradient, its, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EACH_LENGTH)
def test_what_depends_on_the_length_otherwise_has_a_program_for_each(name: str) -> None:
    graph, loss = of_logprobs(EACH_LENGTH[name]), EACH_LENGTH[name]
    program = GraphProgram(graph)
    for length in (6, 7):
        (p,) = numbers(length, (length,))
        (found,) = program.prepare([shapes_of([p])]).result(60).evaluate([[p]])
        by_torch = torch.from_numpy(p).requires_grad_(True)
        expected = loss(by_torch)
        expected.backward()
        assert found[0] == pytest.approx(float(expected.detach()), rel=1e-5)
        np.testing.assert_allclose(found[1], by_torch.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert list(program._patterns.values()) == [None]


def test_several_inputs_and_targets_are_padded_together() -> None:
    names = {"p": 1, "logprobs_old": 1, "advantages": 1, "mask": 1}
    graph, arrays = read(ppo, names), [*numbers(3, (21,), (21,), (21,)), (np.arange(21) > 4).astype(np.float32)]
    for way in (padded, alone):
        found, gradient = way(graph, arrays)
        assert found == pytest.approx(alone(graph, arrays)[0], rel=1e-6)
        np.testing.assert_allclose(gradient, alone(graph, arrays)[1], rtol=1e-6, atol=1e-7)
    mixed = read(lambda logprobs, w, scale: ((logprobs.logsumexp(-1) * w[: logprobs.shape[0]]).sum() * scale, {}), {"p": 2, "w": 1, "scale": 0})  # noqa: E501 # fmt: skip
    arrays = [*numbers(4, (19, 2), (40,)), np.array(0.5, np.float32)]
    (found,) = GraphProgram(mixed).prepare([shapes_of(arrays)]).result(60).evaluate([arrays])
    assert found[0] == pytest.approx(alone(mixed, arrays)[0], rel=1e-6)


def test_a_new_length_compiles_nothing() -> None:
    program = GraphProgram(of_logprobs(lambda p: (p**2).mean()))
    program.prepare([(((17,), "float32"),)]).result(60)
    ready = program.prepare((((length,), "float32"),) for length in range(17, 33))
    assert ready.done()
    batch = [numbers(length, (length,)) for length in range(17, 33)]
    for (p,), (loss, gradient, _) in zip(batch, ready.result().evaluate(batch), strict=True):
        assert loss == pytest.approx(float((p.astype(np.float64) ** 2).mean()), rel=1e-6)
        np.testing.assert_allclose(gradient, 2 * p / len(p), rtol=1e-6)
    assert not program.prepare([(((33,), "float32"),)]).done()


def test_the_sizes_of_a_length_are_checked_with_the_nodes_name() -> None:
    program = GraphProgram(of_logprobs(lambda p: torch.outer(p, p).mean()))
    program.prepare([(((16,), "float32"),)]).result(60)
    with pytest.raises(Exception, match=r"node 'outer' \(torch.outer\) cannot be computed: .* 16777216 elements"):
        program.prepare([(((4999,), "float32"),)]).result(60)
