"""Does every operation of an uploaded loss compute what torch's does, its gradient included?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from jax_client.torch_graph.ops import OPERATIONS
from support.graphs.traced_losses import F, by_graph, by_torch, same, torch, wire

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
