"""Does a loss that was sent as a graph compute what torch computes, and is everything else refused by name?"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.errors import BadRequestError
from jax_client.torch_graph.graph import MAX_NODES, read_graph
from jax_client.torch_graph.ops import OPERATIONS
from jax_client.torch_graph.program import GraphProgram, shapes_of

torch = pytest.importorskip("torch")
F = torch.nn.functional
custom_loss = pytest.importorskip("tinker.lib.public_interfaces.custom_loss")
pytestmark = pytest.mark.torch

# What the cases below are given: logprobs p and floats y of one shape, both with ties, integers n and a mask m.
P = np.array([[-0.5, -1.5, -0.5], [-2.0, -0.1, -0.7], [-1.5, -3.0, -0.2], [-0.9, -0.9, -1.1]], np.float32)
Y = np.array([[0.3, -1.5, 2.0], [-0.5, 0.8, -0.7], [1.5, -2.0, 0.1], [0.9, -0.4, 1.2]], np.float32)
N = np.array([2, 0, 1, 1], np.int64)
M = np.array([1, 0, 1, 1], np.float32)
RANKS = {"p": 2, "y": 2, "n": 1, "m": 1}

Case = Callable[[Any, Any, Any, Any], Any]


def _dims(f: Any, x: Any) -> list[Any]:
    """Over all, one dimension from either side, several, and kept."""
    return [f(x), f(x, 0), f(x, dim=-1), f(x, dim=(0, 1)), f(x, dim=1, keepdim=True)]


def _in_two_places(f: Any, method: str, x: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [f(x, *args, **kwargs), getattr(x, method)(*args, **kwargs)]


def _both(name: str) -> Case:
    """A function of one tensor, as a function and as a method, at values inside its domain."""
    return lambda p, y, n, m: _in_two_places(getattr(torch, name), name, p.abs() / 4 + 0.1)


def _pairs(name: str) -> Case:
    """An operation of two, between tensors, and with a column."""
    return lambda p, y, n, m: [*_in_two_places(getattr(torch, name), name, p, y), getattr(p, name)(p[:, :1])]


def _scalars(name: str) -> Case:
    return lambda p, y, n, m: [*_in_two_places(getattr(torch, name), name, p, -0.5), getattr(n, name)(1), *_pairs(name)(p, y, n, m)]  # noqa: E501 # fmt: skip


def _bits(name: str) -> Case:
    return lambda p, y, n, m: [getattr(torch, name)(p > y, n[:, None] > 0), getattr(p > y, name)(p < -1)]


def _each(of: Callable[[str], Case], names: tuple[str, ...]) -> Case:
    return lambda p, y, n, m: [value for name in names for value in of(name)(p, y, n, m)]


CASES: dict[str, Case] = {
    "functions": _each(_both, (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh",
        "erf", "sigmoid", "square",
    )),
    "steps": _each(_both, ("isnan", "isinf", "isfinite", "logical_not", "floor", "ceil", "trunc", "round")),
    "products": _each(_scalars, ("mul", "multiply", "remainder", "div", "divide", "true_divide")),
    "sums": _each(_scalars, ("add", "sub", "subtract")),
    "orders": _each(_scalars, ("eq", "ne", "lt", "le", "gt", "ge")),
    "pairs": _each(_pairs, ("maximum", "minimum", "logaddexp")),
    "bits": _each(_bits, ("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor")),
    "signs": lambda p, y, n, m: [f(y * 1.0) for f in (torch.neg, torch.negative, torch.abs, torch.absolute, torch.sign)],  # noqa: E501
    "sign methods": lambda p, y, n, m: [(p + 0.5).neg(), p.negative(), (p + 0.5).abs(), p.absolute(), p.sign()],
    "special": lambda p, y, n, m: [torch.special.expit(p), torch.special.erf(y), torch.special.xlogy(p, y.abs()), torch.special.logit(p.exp()), torch.special.softmax(p, 1), torch.special.log_softmax(p, 0), torch.special.logsumexp(p, 1)],  # noqa: E501
    "xlogy": lambda p, y, n, m: [torch.xlogy(p, y.abs()), p.exp().xlogy(2.0), torch.xlogy(m, m + 1)],
    "operators": lambda p, y, n, m: [p + 1, 1 - p, p * y, 2 / p, p % 0.7, p.detach() // 0.7, p ** 2, p ** 2.0, (-p) ** 0.5, (-p) ** y, 2 ** p, -p, +p, abs(p + 0.5), p + n[:, None], n / 2, n * 0.5, n[:, None] - p],  # noqa: E501
    "comparisons": lambda p, y, n, m: [p == -0.5, p != y, p < -0.5, p <= -0.5, p > y, p >= -0.9, ~(p > y), (p > y) & (p < -0.2), (p > y) | (n > 1)[:, None], (p > y) ^ (y > 0), ~n],  # noqa: E501
    "bitwise_not": lambda p, y, n, m: [torch.bitwise_not(n), (p > y).bitwise_not()],
    "pow": lambda p, y, n, m: [torch.pow(p, 3), p.pow(0), torch.pow(2.0, p), (-p).pow(y), p.pow(-1.0)],
    "alpha": lambda p, y, n, m: [torch.add(p, y, alpha=2), p.sub(y, alpha=0.5), torch.rsub(p, 1, alpha=2)],
    "rounding": lambda p, y, n, m: [torch.div(p, y, rounding_mode="floor") * p, p.div(0.3, rounding_mode="trunc")],
    "numbers": lambda p, y, n, m: [p * (p.shape[0] + 1), p * (p.shape[0] - 7), p / (p.shape[1] * 2), p * (7 // p.shape[1]), p * (p.shape[0] % 3), p ** p.shape[1], p * (p.size(0) / 3), p * -p.shape[0]],  # noqa: E501
    "math": lambda p, y, n, m: [p * f(p.shape[0]) for f in (math.log, math.log2, math.log10, math.log1p, math.exp, math.expm1, math.sqrt, math.floor, math.ceil, math.fabs)] + [p * math.pow(p.shape[1], 0.5)],  # noqa: E501
    "where": lambda p, y, n, m: [torch.where(p > -1, p, y), p.where(y > 0, -1.0), torch.where(n[:, None] > 0, p, 0), torch.where(p > -1, p, -math.inf).exp()],  # noqa: E501
    "masked_fill": lambda p, y, n, m: [torch.masked_fill(p, p > y, 2.0), p.masked_fill((m == 0)[:, None], 0)],
    "clamp": lambda p, y, n, m: [torch.clamp(p, -1.5, -0.5), p.clamp(max=-0.9), torch.clip(p, min=-1.5), p.clip(y, y + 1), p.clamp(min=y), n.clamp(0.5, 1.5)],  # noqa: E501
    "clamp_min": lambda p, y, n, m: [torch.clamp_min(p, -0.9), p.clamp_min(-0.9), torch.clamp_max(p, -0.5), p.clamp_max(y)],  # noqa: E501
    "relu": lambda p, y, n, m: [torch.relu(p + 0.5), (p + 0.9).relu(), F.relu(p + 1.5), F.leaky_relu(p + 0.5, 0.1), F.softplus(p), F.softplus(y * 30, beta=2, threshold=5), F.logsigmoid(p - y)],  # noqa: E501
    "logit": lambda p, y, n, m: [torch.logit(p.exp()), p.exp().logit(eps=0.2)],
    "lerp": lambda p, y, n, m: [torch.lerp(p, y, 0.3), p.lerp(y, p)],
    "nan_to_num": lambda p, y, n, m: [torch.nan_to_num((p + 0.5) / (p + 0.5)), (p * 0 + 1).div(p + 0.5).nan_to_num(1.0, 2.0, 3.0)],  # noqa: E501
    "detach": lambda p, y, n, m: [torch.detach(p) * p, p.detach() * y, p.data * p, torch.clone(p), p.clone(), p.contiguous(), p.cpu()],  # noqa: E501
    "to": lambda p, y, n, m: [p.to(torch.float64), p.to("cpu"), n.to(p), p.to(dtype=torch.int64), p.type(torch.int32), n.type_as(p), p.to(y.device), n.to(y.dtype), p.to(torch.bool)],  # noqa: E501
    "casts": lambda p, y, n, m: [n.float(), p.double() * y, (p * 3).long(), p.int(), m.bool(), p.double() / 3],
    "sum": lambda p, y, n, m: [*_dims(torch.sum, p), *_dims(lambda x, *a, **k: x.sum(*a, **k), p), (p > y).sum(), n.sum() / 3, torch.sum(p, axis=1, keepdims=True), p.sum(dtype=torch.float64)],  # noqa: E501
    "mean": lambda p, y, n, m: [*_dims(torch.mean, p), p.mean(-1), n.float().mean(), n.mean(dtype=torch.float32)],
    "prod": lambda p, y, n, m: [torch.prod(p), p.prod(1), torch.prod(p + 0.5, dim=0, keepdim=True), n.prod()],
    "max": lambda p, y, n, m: [torch.max(p), p.max(), torch.max(p, 1).values, p.max(dim=0)[0], p.max(0, keepdim=True).indices, torch.max(p, y), p.max(y), p.max(1)[0:1][0]],  # noqa: E501
    "min": lambda p, y, n, m: [torch.min(p), p.min(), torch.min(p, 1).values, p.min(dim=0)[0], p.min(0)[1], torch.min(p, y)],  # noqa: E501
    "amax": lambda p, y, n, m: [*_dims(torch.amax, p), *_dims(torch.amin, p), p.amax(0), p.amin(dim=(0, 1))],
    "argmax": lambda p, y, n, m: [torch.argmax(p), p.argmax(1), torch.argmin(p, dim=0, keepdim=True), p.argmin()],
    "all": lambda p, y, n, m: [torch.all(p < 0), (p > y).all(1), torch.any(p > y, dim=0), (p > 0).any()],
    "var": lambda p, y, n, m: [torch.var(p), p.var(1), torch.var(p, dim=0, correction=0), p.var(0, False), p.var(unbiased=False), p.var(False), p.var((0, 1), True, True)],  # noqa: E501
    "std": lambda p, y, n, m: [torch.std(p), p.std(1, keepdim=True), torch.std(p, dim=0, correction=2), (p * 0).std(), p.std(dim=1, unbiased=False)],  # noqa: E501
    "norm": lambda p, y, n, m: [torch.norm(p), p.norm(), p.norm(dim=1), p.norm(p=1, dim=0), torch.norm(p, p=float("inf")), (p * 0).norm(), torch.linalg.vector_norm(p, dim=1), torch.linalg.norm(p), torch.linalg.norm(p[0], 1), torch.linalg.vector_norm(p, 1)],  # noqa: E501
    "logsumexp": lambda p, y, n, m: [torch.logsumexp(p, 1), p.logsumexp((0, 1)), p.logsumexp(0, keepdim=True)],
    "scans": lambda p, y, n, m: [torch.cumsum(p, 0), p.cumsum(dim=-1), torch.cumprod(p, 1), p.cumprod(0), torch.logcumsumexp(p, 0), p.logcumsumexp(1), n.cumsum(0)],  # noqa: E501
    "softmax": lambda p, y, n, m: [torch.softmax(p, 1), p.softmax(-1), F.softmax(p, dim=0), torch.log_softmax(p, 1), p.log_softmax(dim=0), F.log_softmax(p, -1)],  # noqa: E501
    "sort": lambda p, y, n, m: [torch.sort(y - p, 0).values, (p + y).sort(descending=True)[0], torch.argsort(y, dim=1), y.argsort(0, True), torch.topk(y - p, 2).values, (p + y).topk(2, dim=0, largest=False)[0]],  # noqa: E501
    "matmul": lambda p, y, n, m: [p @ y.T, torch.matmul(p, y[0]), p.matmul(y.t()), torch.mm(p, y.T), p.mm(y.mT), torch.mv(p, y[1]), p.mv(y[0]), torch.dot(p[0], y[0]), p[1].dot(p[1])],  # noqa: E501
    "diff": lambda p, y, n, m: [torch.diff(p), p.diff(2, dim=0)],
    "floor_divide": lambda p, y, n, m: [torch.floor_divide(n, 2), p.detach().floor_divide(y)],
    "attributes": lambda p, y, n, m: [p * p.shape[1], p * p.ndim, p * p.dim(), p * p.ndimension(), p * p.numel(), p * p.nelement(), p * torch.numel(p), p.T, p.mT, p.reshape(p.size()), p.view(p.shape[:1] + p.shape[1:]), p * p.size(dim=-1)],  # noqa: E501
    "getitem": lambda p, y, n, m: [p[0], p[-1, 1:], p[:, None, ::2], p[..., 0], p[1:-1], p[n], p[n, n], p[[0, 2]], p[:, n[:2]], p[n[0]], p[None], p[1:, 0]],  # noqa: E501
    "gather": lambda p, y, n, m: [torch.gather(p, 1, n[:, None]), p.gather(-1, n[:2, None])],
    "index_select": lambda p, y, n, m: [torch.index_select(p, 0, n), p.index_select(1, n)],
    "select": lambda p, y, n, m: [torch.select(p, 0, 1), p.select(1, -1), torch.narrow(p, 0, 1, 2), p.narrow(1, -2, 2)],
    "reshape": lambda p, y, n, m: [torch.reshape(p, (2, 6)), p.reshape(3, -1), p.view(-1), p.view((6, 2)), p.view_as(y.reshape(2, 6)), p.reshape_as(y), torch.flatten(p), p[None].flatten(1, 2), torch.ravel(p), p.ravel(), p.reshape(shape=(2, 6))],  # noqa: E501
    "squeeze": lambda p, y, n, m: [torch.squeeze(p[:1]), p[:, :1].squeeze(1), p.squeeze(0), torch.unsqueeze(p, 1), p.unsqueeze(-1)],  # noqa: E501
    "transpose": lambda p, y, n, m: [torch.transpose(p, 0, 1), p.transpose(-1, 0), torch.swapaxes(p, 0, 1), p.swapaxes(0, 1), torch.t(p), p.t(), p.permute(1, 0), p.permute((1, 0)), torch.permute(p, (1, 0)), p.permute(dims=(1, 0))],  # noqa: E501
    "expand": lambda p, y, n, m: [m[:, None].expand(4, 3) * p, p[:1].expand(2, -1), p[0].expand(2, 2, 3), m[:, None].expand_as(p) * p, torch.broadcast_to(p[0], (2, 3)), p[0].broadcast_to((2, 3)), p[:1].expand(size=(2, -1))],  # noqa: E501
    "repeat": lambda p, y, n, m: [p.repeat(2, 1), p[0].repeat(2, 2), torch.repeat_interleave(p, 2, dim=1), p.repeat_interleave(2), p.repeat(repeats=(2, 1))],  # noqa: E501
    "stack": lambda p, y, n, m: [torch.stack([p, y]), torch.stack((p, y), dim=-1), torch.cat([p, y], 1), torch.concat((p, n[:, None]), dim=1), torch.concatenate([p, y], dim=0)],  # noqa: E501
    "split": lambda p, y, n, m: [torch.split(p, 3)[1], p.split([1, 3])[1], torch.chunk(p, 2)[0], p.chunk(2, dim=1)[1], torch.unbind(p)[2], p.unbind(1)[0]],  # noqa: E501
    "flip": lambda p, y, n, m: [torch.flip(p, (0,)) * y, p.flip(0, 1) * y, torch.roll(p, 1) * y, p.roll(-1, 0) * y, torch.flip(p, dims=[0]) * y, p.flip(dims=(1,)) * y],  # noqa: E501
    "tril": lambda p, y, n, m: [torch.tril(p), p.tril(-1), torch.triu(p), p.triu(1), torch.outer(p[0], y[1]), p[0].outer(p[1])],  # noqa: E501
    "filled": lambda p, y, n, m: [torch.zeros_like(p), torch.ones_like(p, dtype=torch.int64) * p, torch.full_like(p, 0.3) * p, p.new_zeros(2), p.new_ones((2, 3)) * p[:2], p.new_full((3,), 2) * p],  # noqa: E501
    "made": lambda p, y, n, m: [torch.zeros(p.shape[1]) + p, torch.ones((p.shape[0], 1)) * p, torch.full((p.shape[1],), 2) * p, torch.full((p.shape[1],), 0.5) * p, torch.arange(p.shape[1]) * p, torch.arange(1, p.shape[1] + 1, 1.0) * p],  # noqa: E501
    "differences": lambda p, y, n, m: [F.mse_loss(p, y), F.l1_loss(p, y, reduction="sum"), F.smooth_l1_loss(p, y, beta=0.5), F.smooth_l1_loss(p, y, beta=0.0), F.huber_loss(p, y, reduction="none", delta=0.7)],  # noqa: E501
    "binary": lambda p, y, n, m: [F.binary_cross_entropy_with_logits(p, m[:, None].expand_as(p)), F.binary_cross_entropy_with_logits(p, y, weight=m[:, None], pos_weight=y.abs(), reduction="sum"), F.binary_cross_entropy(p.exp(), m[:, None].expand_as(p)), F.binary_cross_entropy(p.exp(), y.abs() / 2, weight=y, reduction="none"), F.binary_cross_entropy((p + 1).clamp(0, 1), (p.detach() > -0.5).float()), F.binary_cross_entropy((p - p.detach()).exp(), torch.ones_like(p))],  # noqa: E501
    "kl_div": lambda p, y, n, m: [F.kl_div(p, y.softmax(1), reduction="batchmean"), F.kl_div(p, y, reduction="sum", log_target=True), F.kl_div(p, m[:, None].expand_as(p), reduction="none")],  # noqa: E501
    "classes": lambda p, y, n, m: [F.nll_loss(p, n), F.nll_loss(p, n, ignore_index=1, reduction="sum"), F.cross_entropy(p, n), F.cross_entropy(p, n, ignore_index=0, reduction="none"), F.cross_entropy(p, y.softmax(1)), F.cross_entropy(p[0], n[0])],  # noqa: E501
    "ranking": lambda p, y, n, m: [F.margin_ranking_loss(p, y, torch.sign(y), margin=0.1), F.cosine_similarity(p, y), F.cosine_similarity(p, p[:1], dim=0)],  # noqa: E501
}  # fmt: skip
# Names that other versions of torch write for the same operation.
OTHER_NAMES = {
    "builtins.getattr": "getattr",
    "torch.split": "torch.functional.split",
    "torch.norm": "torch.functional.norm",
    "torch.nn.functional.softplus": "torch._C._nn.softplus",
    "torch.nn.functional.logsigmoid": "torch._C._nn.log_sigmoid",
    "torch.nn.functional.cosine_similarity": "torch.cosine_similarity",
}


def wire(fn: Any, ranks: dict[str, int]) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Trace a loss and write it as the SDK does, through JSON."""
    names = {("logprobs" if name == "p" else name): rank for name, rank in ranks.items()}
    handle = custom_loss.trace_loss(fn, names, "session")
    nodes = json.loads(custom_loss.encode_graph(handle).model_dump_json())["nodes"]
    return nodes, list(names.items())


def key(node: dict[str, Any]) -> str:
    return f".{node['target']}" if node["op"] == "call_method" else node["target"]


@cache
def traced(case: str) -> tuple[Any, Any]:
    body = CASES[case]

    def loss(logprobs, y, n, m):
        total = logprobs.mean()
        for value in body(logprobs, y, n, m):
            # Each result with its own cotangent, and never without a gradient.
            total = total + (torch.sin(value.float() / 4) * (2 + logprobs.mean())).sum()
        return total, {"custom/total:sum": total.detach()}

    return loss, wire(loss, RANKS)


def by_torch(fn: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray, dict[str, float]]:
    logprobs, *others = map(torch.from_numpy, arrays)
    logprobs = logprobs.clone().requires_grad_(True)
    loss, metrics = fn(logprobs, *others)
    loss.backward()
    return float(loss.detach()), logprobs.grad.numpy(), {k: float(v.detach()) for k, v in metrics.items()}


def by_graph(nodes: Any, inputs: Any, arrays: list[np.ndarray]) -> tuple[float, np.ndarray, dict[str, float]]:
    program = GraphProgram(read_graph(nodes, inputs, "loss"))
    program.check(shapes_of(arrays))
    (found,) = program.evaluate([arrays])
    return found


def same(found: Any, expected: Any, atol: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=atol)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=atol)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, rel=1e-5, abs=atol)


@cache
def agreement(case: str) -> None:
    fn, (nodes, inputs) = traced(case)
    arrays = [P, Y, N, M]
    same(by_graph(nodes, inputs, arrays), by_torch(fn, arrays))


@cache
def cases_by_operation() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in CASES:
        for node in traced(case)[1][0]:
            if case not in found.setdefault(key(node), []):
                found[key(node)].append(case)
    # What the wrapping of every case calls is tested by the cases that are about it.
    return found


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_torchs(case: str) -> None:
    agreement(case)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_has_a_case(name: str) -> None:
    assert cases_by_operation().get(OTHER_NAMES.get(name, name)), f"no case calls {name}"
    assert OPERATIONS[OTHER_NAMES.get(name, name)].call is OPERATIONS[name].call


def dpo(logprobs, reference, mask, chosen):
    """Two answers per datum, side by side: [T, 2]."""
    margin = ((logprobs - reference) * mask).sum(0)
    reward = 0.1 * (margin[0] - margin[1]) * chosen
    loss = -F.logsigmoid(reward)
    return loss, {"custom/margin:mean": reward, "custom/right:mean": (reward > 0).float()}


def ppo(logprobs, logprobs_old, advantages, mask):
    count = mask.sum().clamp(min=1)
    centred = (advantages - (advantages * mask).sum() / count) / (advantages.std() + 1e-6)
    ratio = torch.exp(logprobs - logprobs_old)
    surrogate = torch.minimum(ratio * centred, ratio.clamp(0.8, 1.2) * centred)
    kl = torch.exp(logprobs_old - logprobs) - (logprobs_old - logprobs) - 1
    loss = -(surrogate * mask).sum() / count + 0.05 * (kl * mask).mean()
    clipped = ((ratio < 0.8) | (ratio > 1.2)) & mask.bool()
    return loss, {"custom/clipped:mean": clipped.float().mean(), "custom/kl:sum": (kl * mask).sum()}


def gspo(logprobs, logprobs_old, advantages, mask):
    log_s = ((logprobs - logprobs_old) * mask).sum() / torch.clamp(mask.sum(), min=1.0)
    ratio = torch.exp(log_s.detach() + logprobs - logprobs.detach())
    loss = -torch.min(ratio * advantages, torch.clip(ratio, 0.9, 1.1) * advantages).sum()
    return loss, {"custom/ratio:mean": log_s.exp()}


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(-1, 0.4, shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("seed", range(3))
def test_whole_losses_equal_torchs(seed: int) -> None:
    length = 5 + seed
    p, q, a = numbers(seed, (length,), (length,), (length,))
    mask = (np.arange(length) > 1).astype(np.float32)
    for loss in (ppo, gspo):
        names = {"p": 1, "logprobs_old": 1, "advantages": 1, "mask": 1}
        same(by_graph(*wire(loss, names), [p, q, a, mask]), by_torch(loss, [p, q, a, mask]))
    p, q = numbers(seed, (length, 2), (length, 2))
    arrays = [p, q, np.ones((length, 2), np.float32), np.array(1 - 2 * (seed % 2), np.float32)]
    names = {"p": 2, "reference": 2, "mask": 2, "chosen": 0}
    same(by_graph(*wire(dpo, names), arrays), by_torch(dpo, arrays))


def test_one_program_per_shape_and_no_more_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_client.torch_graph.program.MOST_PROGRAMS", 2)
    program = GraphProgram(read_graph(*wire(lambda logprobs: (logprobs.sum() ** 2, {}), {"p": 1}), "loss"))
    batch = [numbers(i, (length,)) for i, length in enumerate((3, 5, 3, 4))]
    for _ in range(2):
        for (p,), (loss, gradient, _) in zip(batch, program.evaluate(batch), strict=True):
            assert loss == pytest.approx(float(p.sum()) ** 2, rel=1e-5)
            np.testing.assert_allclose(gradient, np.full(len(p), 2 * p.sum()), rtol=1e-5)
    assert len(program._compiled) == 2


def placeholder(name: str) -> dict[str, Any]:
    return {"op": "placeholder", "name": name, "target": name, "args": [], "kwargs": {}}


def call(name: str, target: str, /, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def output(loss: Any, /, **metrics: Any) -> dict[str, Any]:
    return {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [loss, {"dict": metrics}]}]}


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


LP = ref("logprobs")
P_IN = placeholder("logprobs")
TOTAL = call("total", "sum", LP, op="call_method")
OUT = output(ref("total"))


def read(*nodes: Any, inputs: Any = (("logprobs", 1),)) -> Any:
    return read_graph(list(nodes), list(inputs), "mine")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([P_IN, call("a", "os.system", "true"), OUT], ["'a'", "'os.system'"]),
        ([P_IN, call("a", "builtins.eval", "1"), OUT], ["'a'", "'builtins.eval'"]),
        ([P_IN, call("a", ".sum", LP), OUT], ["'a'", "'.sum'"]),
        ([P_IN, call("a", "__class__", LP, op="call_method"), OUT], ["'a'", "'__class__'"]),
        ([P_IN, call("a", "add_", LP, 1, op="call_method"), OUT], ["'a'", "method 'add_'"]),
        ([P_IN, call("layer", "net.0", LP, op="call_module"), OUT], ["'layer'", "module ('net.0')"]),
        ([P_IN, call("const", "_tensor_constant0", op="get_attr"), OUT], ["'const'", "from outside"]),
        ([P_IN, call("a", "torch.exp", op="call"), OUT], ["'a'", "kind 'call'"]),
        ([P_IN, call("a", "torch.exp", ref("b")), call("b", "torch.exp", ref("a")), OUT], ["'a'", "'b', which no node"]),  # noqa: E501
        ([P_IN, call("a", "torch.exp", ref("a")), OUT], ["'a'", "refers to 'a'"]),
        ([P_IN, call("logprobs", "torch.exp", LP), OUT], ["name of an earlier node"]),
        ([P_IN, call("a", "torch.exp"), OUT], ["'a'", "'torch.exp' wrongly", "input"]),
        ([P_IN, call("a", "torch.exp", LP, out=LP), OUT], ["'a'", "out="]),
        ([P_IN, call("a", "torch.nn.functional.relu", LP, inplace=True), OUT], ["inplace=True"]),
        ([P_IN, call("a", "to", LP, {"dtype": "bfloat16"}, op="call_method"), OUT], ["'bfloat16'", "float64"]),
        ([P_IN, call("a", "to", LP, {"device": "cuda:0"}, op="call_method"), OUT], ["device 'cuda:0'"]),
        ([P_IN, call("a", "torch.add", LP, 2**70), OUT], ["64 bits"]),
        ([P_IN, call("a", "torch.add", LP, {"code": "x"}), OUT], ["'a'", "not known"]),
        ([P_IN, TOTAL], ["no output"]),
        ([P_IN, TOTAL, OUT, TOTAL], ["'output'", "others come after"]),
        ([P_IN, TOTAL, output(1.0)], ["'output'", "must be a tensor"]),
        ([P_IN, TOTAL, output(ref("total"), loss=ref("total"))], ["'loss'", "custom/"]),
        ([P_IN, TOTAL, output(ref("total"), **{"custom/a:sum": 1.0})], ["custom/a:sum", "must be a tensor"]),
        ([P_IN, call("cut", "detach", LP, op="call_method"), output(ref("cut"))], ["does not depend"]),
        ([placeholder("other"), TOTAL, OUT], ["input 'other'"]),
        ([TOTAL, OUT], ["'total'", "before the inputs"]),
        ([P_IN, *(call(f"n{i}", "torch.exp", LP) for i in range(MAX_NODES)), OUT], ["1002 nodes", "1000"]),
        ([P_IN] * 10**6, ["1000000 nodes"]),
    ],
)  # fmt: skip
def test_what_is_not_in_the_table_is_refused_by_name(nodes: list[Any], words: list[str]) -> None:
    with pytest.raises(BadRequestError) as refused:
        read(*nodes)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "pass that to forward_backward_custom" in message


@pytest.mark.parametrize(
    "inputs",
    [(), (("a", 1),), (("logprobs", 0),), (("logprobs", 3),), (("logprobs", 1), ("A b", 1)), (("logprobs", 1),) * 2,
     (("logprobs", 1), *((f"a{i}", 1) for i in range(16)))],
)  # fmt: skip
def test_inputs_that_are_not_possible(inputs: Any) -> None:
    with pytest.raises(BadRequestError, match=r"input|rank"):
        read(P_IN, TOTAL, OUT, inputs=inputs)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"tuple": [value]}
    return value


@pytest.mark.parametrize("arg", [deep(10), [1] * 3000, "x" * 200, {"ref": ["logprobs"]}, {"slice": [1]}, {1: 2, 3: 4}])
def test_arguments_are_bounded(arg: Any) -> None:
    with pytest.raises(BadRequestError, match="node 'a'"):
        read(P_IN, call("a", "torch.add", LP, arg), OUT)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([call("total", "torch.outer", LP, LP)], ["'total' (torch.outer)", "16777216"]),
        ([call("total", "expand", LP, 10**9, -1, op="call_method")], ["'total'", "limit"]),
        ([call("z", "new_zeros", LP, 10**12, op="call_method"), call("total", "operator.add", LP, ref("z"))], ["'z'", "limit"]),  # noqa: E501
        ([call("total", "repeat", LP, 10**6, op="call_method")], ["'total'", "limit"]),
        ([call("c", "unsqueeze", LP, 1, op="call_method"), call("total", "torch.nn.functional.mse_loss", ref("c"), LP)], ["'total'", "limit"]),  # noqa: E501
        ([call("total", "unbind", LP, op="call_method")], ["'total'", "1024 pieces"]),
        ([call("a", "operator.pow", 3, 10**9), call("total", "operator.mul", LP, ref("a"))], ["'a'", "exponent"]),
        ([call("a", "operator.mul", 2**62, 4), call("total", "operator.mul", LP, ref("a"))], ["'a'", "64 bits"]),
        ([call("a", "operator.mul", "x", 10**9), call("total", "operator.mul", LP, ref("a"))], ["'a'", "number"]),
        ([call("total", "operator.getitem", LP, 5000)], ["'total'", "out of range"]),
        ([call("m", "operator.gt", LP, 0), call("total", "operator.getitem", LP, ref("m"))], ["'total'", "torch.where"]),  # noqa: E501
        ([call("total", "getattr", LP, "__class__")], ["'total'", "'__class__'"]),
        ([call("total", "view", LP, 7, op="call_method")], ["'total'", "view"]),
        ([call("total", "mean", LP, 3, op="call_method")], ["'total'", "dimension 3"]),
        ([call("total", "math.log", LP)], ["does not depend"]),
        ([call("total", "torch.exp", LP)], ["scalar loss"]),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_before_it_is(nodes: list[Any], words: list[str]) -> None:
    with pytest.raises(BadRequestError) as refused:
        GraphProgram(read(P_IN, *nodes, OUT)).check((((4999,), "float32"),))
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_all_tensors_together_are_bounded() -> None:
    nodes = [call(f"n{i}", "expand", LP, 2000, -1, op="call_method") for i in range(40)]
    last = [
        call("total", "torch.cat", [ref(node["name"]) for node in nodes[:1]]),
        call("sum", "torch.sum", ref("total")),
    ]
    with pytest.raises(BadRequestError, match="all tensors together"):
        GraphProgram(read(P_IN, *nodes, *last, output(ref("sum")))).check((((8000,), "float32"),))


def test_an_index_out_of_range_does_not_go_unseen() -> None:
    nodes, inputs = wire(lambda logprobs, n: (logprobs[n].sum(), {}), {"p": 1, "n": 1})
    loss, *_ = by_graph(nodes, inputs, [P[0], np.array([0, 7])])
    assert math.isnan(loss)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ref", "tuple", "slice", "dict", "dtype", "float", "x"]), inner, max_size=2),  # noqa: E501
    max_leaves=6,
)  # fmt: skip
ARGUMENT = st.sampled_from([LP, ref("n0"), ref("n1"), {"dtype": "int64"}, 0, 1, -1, 0.5, [1, 2]]) | JSON
CALLS = st.builds(
    lambda op, name, target, args, kwargs: {"op": op, "name": name, "target": target, "args": args, "kwargs": kwargs},
    st.sampled_from(["call_function", "call_method", "placeholder", "get_attr", "output"]) | JSON,
    st.sampled_from(["n0", "n1", "n2"]) | JSON,
    st.sampled_from([name.removeprefix(".") for name in sorted(OPERATIONS)]) | JSON,
    st.lists(ARGUMENT, max_size=3) | JSON,
    st.dictionaries(st.sampled_from(["dim", "keepdim", "input", "dtype", "axis"]), ARGUMENT, max_size=2) | JSON,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CALLS | JSON, max_size=4))
def test_malformed_graphs_are_only_ever_refused(nodes: list[Any]) -> None:
    last = next(
        (n["name"] for n in reversed(nodes) if isinstance(n, dict) and isinstance(n.get("name"), str)), "logprobs"
    )
    for end in (output(ref(last)), output(LP)):
        try:
            GraphProgram(read(P_IN, *nodes, end)).check((((3,), "float32"),))
        except BadRequestError:
            continue


# Each function once, under the first of its names.
NAMES = list({operation.call: name for name, operation in sorted(OPERATIONS.items(), reverse=True)}.values())
STRANGE = [LP, "x", None, {"slice": [0, 1, None]}, -5, 1.5, {"dtype": "bool"}, [LP], 2**40]


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_fails_in_another_way(name: str) -> None:
    """Whatever each is given, it is computed or refused."""
    op, target = ("call_method", name[1:]) if name.startswith(".") else ("call_function", name)
    for args in (
        [],
        ["x"],
        [1],
        [LP],
        *([LP, value] for value in STRANGE),
        *([LP, value, value] for value in STRANGE[:5]),
    ):
        with contextlib.suppress(BadRequestError):
            function = read(P_IN, call("total", target, *args, op=op), OUT).function()
            jax.eval_shape(function, jax.ShapeDtypeStruct((3,), np.float32))


def documented() -> list[str]:
    """The operations as docs/server.md lists them: under the names that a user writes."""
    written = {"torch._C._special.special_": "torch.special.", "torch._C._linalg.linalg_": "torch.linalg."}
    written |= {"torch._C._nn.log_sigmoid": "F.logsigmoid", "torch._C._nn.": "F.", "torch.nn.functional.": "F."}
    written |= {"torch.functional.": "torch."}
    names = set()
    for name in OPERATIONS:
        start = next((start for start in written if name.startswith(start)), "")
        names.add(written.get(start, "") + name.removeprefix(start))

    def of(start: str) -> set[str]:
        found = {name.removeprefix(start) for name in names if name.startswith(start)}
        return {name for name in found if "." not in name}

    functions, methods = of("torch."), of(".")
    groups = {
        "Functions of `torch` and methods of tensors": functions & methods,
        "Functions of `torch`": functions - methods,
        "Methods": methods - functions,
        "`torch.nn.functional`": of("F."),
        "`torch.special`": of("torch.special."),
        "`torch.linalg`": of("torch.linalg."),
        "`math`, of numbers": of("math."),
        "`operator`, which Python's own operators and indexing become": of("operator."),
    }
    return [f"- {head}: {', '.join(f'`{name}`' for name in sorted(found))}." for head, found in groups.items()]


def test_the_documentation_lists_the_table() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "server.md").read_text().split())
    for line in documented():
        assert line in text, line


def test_a_server_needs_no_torch() -> None:
    nodes, inputs = wire(ppo, {"p": 1, "logprobs_old": 1, "advantages": 1, "mask": 1})
    arrays = [*numbers(1, (6,), (6,), (6,)), np.ones(6, np.float32)]
    about = {"session_id": "s", "name": "ppo", "inputs": inputs, "nodes": nodes}
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from jax_client.server import app\nfrom jax_client.server.state import server\n"
        "from jax_client.server.wire import custom_losses\n"
        "about, arrays = json.load(sys.stdin)\n"
        "loss = custom_losses.custom_loss(about).program.evaluate([[np.float32(a) for a in arrays]])[0]\n"
        "print(json.dumps([loss[0], loss[1].tolist(), loss[2]]))"
    )
    sent = json.dumps([about, [a.tolist() for a in arrays]])
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, text=True, check=True)
    same(json.loads(done.stdout), by_torch(ppo, arrays))
