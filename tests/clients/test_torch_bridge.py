"""Does a torch function become a custom loss, and is each mistake in it named?"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from jax_client import torch_bridge
from jax_client.errors import BadRequestError, BadTypeError, RequestFailedError

pytestmark = pytest.mark.torch

LOGPROBS = [np.array([-1.0, -2.0, -3.0], np.float32), np.array([[-0.5, -1.5]], np.float32)]


def total(tensors):
    return sum(tensor.sum() for tensor in tensors)


def test_gradients_metrics_and_copies():
    import torch

    def loss(tensors):
        assert [tuple(t.shape) for t in tensors] == [(3,), (1, 2)]
        assert all(t.dtype == torch.float32 and t.is_leaf for t in tensors)
        tensors_before = [t.detach().clone() for t in tensors]
        metrics = {"a": torch.tensor(2.0), "b": 3, "c": np.float32(4), "d": torch.tensor([math.nan]), "e": True}
        return sum((t**2).sum() for t in tensors_before) * 0 + sum((t**2).sum() for t in tensors), metrics

    value, gradients, metrics = torch_bridge.custom_loss(loss)(LOGPROBS)
    assert value == pytest.approx(sum(float((p**2).sum()) for p in LOGPROBS))
    for gradient, logprobs in zip(gradients, LOGPROBS, strict=True):
        np.testing.assert_allclose(gradient, 2 * logprobs)
        assert gradient.dtype == np.float32 and gradient.shape == logprobs.shape
    assert math.isnan(metrics.pop("d"))
    assert metrics == {"a": 2.0, "b": 3.0, "c": 4.0, "e": 1.0}


def test_the_function_cannot_reach_our_arrays():
    before = [array.copy() for array in LOGPROBS]

    def loss(tensors):
        result = total(tensors)
        for tensor in tensors:
            tensor.data.zero_()
        tensors.clear()
        return result, {}

    torch_bridge.custom_loss(loss)(LOGPROBS)
    for array, kept in zip(LOGPROBS, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def _float(tensors):
    return float(total(tensors).detach()), {}


def _numpy(tensors):
    return total(tensors).detach().numpy(), {}


def _complex(tensors):
    import torch

    return total(tensors).to(torch.complex64), {}


def _meta(tensors):
    return total(tensors).to("meta"), {}


def _other_parameter(tensors):
    import torch

    return torch.ones((), requires_grad=True) * 2, {}


def _own_backward(tensors):
    total(tensors).backward()
    return total(tensors), {}


def _nan_gradient(tensors):
    import torch

    return total(tensors) + torch.sqrt(tensors[1][0, 1] + 1.5) * 0, {}


MISTAKES = {
    "none": (lambda ts: None, BadTypeError, "must return (loss, metrics); got NoneType"),
    "loss only": (lambda ts: total(ts), BadTypeError, "must return (loss, metrics); got Tensor"),
    "three": (lambda ts: (total(ts), {}, 1), BadTypeError, "got tuple of 3"),
    "float": (_float, BadTypeError, "torch.Tensor as loss; got float"),
    "numpy": (_numpy, BadTypeError, "torch.Tensor as loss; got"),
    "vector": (lambda ts: (ts[0] + total(ts), {}), BadRequestError, "shape (3,)"),
    "complex": (_complex, BadRequestError, "dtype torch.complex64"),
    "meta": (_meta, BadRequestError, "device meta"),
    "detached": (lambda ts: (total(ts).detach(), {}), BadRequestError, "does not depend on logprobs"),
    "other parameter": (_other_parameter, BadRequestError, "does not depend on logprobs"),
    "unused datum": (lambda ts: (ts[0].sum(), {}), BadRequestError, "datum 1 (1 of 2 datums"),
    "own backward": (_own_backward, BadRequestError, "backward() was called"),
    "nan loss": (lambda ts: (total(ts) * math.nan, {}), RequestFailedError, "your loss is nan"),
    "infinite loss": (lambda ts: (total(ts) * math.inf, {}), RequestFailedError, "your loss is -inf"),
    "nan gradient": (_nan_gradient, RequestFailedError, "datum 1, position [0, 1]"),
    "metrics none": (lambda ts: (total(ts), None), BadTypeError, "dict as metrics; got NoneType"),
    "metric vector": (lambda ts: (total(ts), {"v": ts[0]}), BadTypeError, "metric 'v' of your loss function is a T"),
    "metric text": (lambda ts: (total(ts), {"v": "1"}), BadTypeError, "metric 'v' of your loss function is str"),
    "metric key": (lambda ts: (total(ts), {1: 1}), BadTypeError, "named 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    function, error, text = MISTAKES[name]
    with pytest.raises(error) as caught:
        torch_bridge.custom_loss(function)(LOGPROBS)
    assert text in str(caught.value)
    if error is RequestFailedError:
        assert caught.value.category == "user"


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_the_users_exception_passes_with_a_note(error):
    def loss(tensors):
        raise error

    with pytest.raises(type(error)) as caught:
        torch_bridge.custom_loss(loss)(LOGPROBS)
    assert caught.value is error
    assert caught.value.__notes__ == ["inside your loss function; no gradients were accumulated"]
    assert caught.traceback[-1].name == "loss"


def test_torch_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'jax_client\[torch\]'"):
        torch_bridge.custom_loss(lambda tensors: None)
