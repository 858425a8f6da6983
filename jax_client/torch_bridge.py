"""How does a torch function of logprobs become the engine's custom loss?

Arrays go across as copies, torch's autograd differentiates the function by every logprob. Nothing here knows what a
datum is beyond its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jax_client.engine.core.requests import CustomLoss
from jax_client.errors import BadRequestError, BadTypeError, RequestFailedError

if TYPE_CHECKING:
    import torch

NOTE = "inside your loss function; no gradients were accumulated"
T = TypeVar("T")
# f(one logprob tensor per datum) -> (loss, metrics): a one-element tensor, and numbers or one-element tensors by name.
TorchLoss = Callable[["list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, object]]"]


def require_torch() -> None:
    """Import torch.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "custom losses are written in PyTorch, which is not installed: pip install 'jax_client[torch]'."
        ) from error


def custom_loss(function: TorchLoss) -> CustomLoss:
    """Turn a torch function of one logprob tensor per datum into a custom loss of the engine.

    The function gets a list of float32 leaf tensors on the CPU, each in the shape of its datum's targets, and returns
    (loss, metrics): a tensor of one element, and a mapping of names to numbers or one-element tensors.

    What the returned CustomLoss raises, with nothing accumulated:
        anything that the function raises, unchanged but for a note;
        BadTypeError: it returned something else; a metric is not a number;
        BadRequestError: the loss is not one real number, or does not depend on the logprobs of every datum;
        RequestFailedError: the loss or a gradient is not finite.

    Raises:
        ImportError: torch is not installed.
    """
    require_torch()
    import torch

    def run(logprobs: list[np.ndarray]) -> tuple[float, list[np.ndarray], dict[str, float]]:
        leaves = [torch.from_numpy(np.array(array, np.float32)).requires_grad_(True) for array in logprobs]
        with torch.enable_grad():
            loss, metrics = _unpack(_noted(lambda: function(list(leaves))))
            loss = _checked_loss(loss)
            if any(leaf.grad is not None for leaf in leaves):
                raise BadRequestError(f"backward() was called {NOTE}. Return the loss; it is differentiated for you.")
            value = float(loss.detach())
            if not math.isfinite(value):
                _refuse_loss(value, leaves)
            _noted(loss.backward)
        return value, _gradients(leaves, value), _numbers(metrics)

    return run


def _noted(call: Callable[[], T]) -> T:
    try:
        return call()
    except BaseException as error:
        error.add_note(NOTE)
        raise


def _unpack(answer: object) -> tuple[object, object]:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        returned = type(answer).__name__
        if isinstance(answer, tuple | list):
            returned += f" of {len(answer)}"
        raise BadTypeError(
            f"your loss function must return (loss, metrics); got {returned}. Return (loss, {{}}) without metrics."
        )
    return answer[0], answer[1]


def _checked_loss(loss: object) -> torch.Tensor:
    import torch

    if not isinstance(loss, torch.Tensor):
        raise BadTypeError(
            f"your loss function must return (loss, metrics) with a torch.Tensor as loss; got {type(loss).__name__}. "
            "Leave out .item(), float() and .numpy(): they cut the loss off from the logprobs."
        )
    if loss.numel() != 1 or loss.is_complex() or loss.device.type == "meta":
        raise BadRequestError(
            f"the loss must be one real number; got shape {tuple(loss.shape)}, dtype {loss.dtype}, device "
            f"{loss.device}. Sum or average it over tokens and datums."
        )
    if not loss.requires_grad:
        raise BadRequestError(_UNRELATED)
    return loss


_UNRELATED = (
    "the loss does not depend on logprobs, so it has no gradient. Compute it from the tensors that your function is "
    "given, without .detach(), .item(), torch.no_grad() or a new torch.tensor(...)."
)


def _refuse_loss(value: float, leaves: list[torch.Tensor]) -> None:
    where = ""
    for index, leaf in enumerate(leaves):
        if not bool(leaf.detach().isfinite().all()):
            where = f" The logprobs of datum {index} are not finite either."
            break
    raise RequestFailedError(f"your loss is {value}; no gradients were accumulated.{where}", category="user")


def _gradients(leaves: list[torch.Tensor], value: float) -> list[np.ndarray]:
    unused = [index for index, leaf in enumerate(leaves) if leaf.grad is None]
    if len(unused) == len(leaves):
        raise BadRequestError(_UNRELATED)
    if unused:
        raise BadRequestError(
            f"the loss does not use the logprobs of datum {unused[0]} ({len(unused)} of {len(leaves)} datums are "
            "unused); no gradients were accumulated. Leave these datums out of the call, or add 0 * logprobs.sum()."
        )
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    gradients = [grad.detach().to_dense().numpy().astype(np.float32) for grad in grads]
    for index, gradient in enumerate(gradients):
        bad = np.argwhere(~np.isfinite(gradient))
        if len(bad):
            position = bad[0].tolist()
            raise RequestFailedError(
                f"the gradient of your loss (which is {value}) is {gradient[tuple(bad[0])]} at datum {index}, position "
                f"{position[0] if len(position) == 1 else position}; no gradients were accumulated. Look for a "
                "division, a logarithm or a square root of zero there.",
                category="user",
            )
    return gradients


def _numbers(metrics: object) -> dict[str, float]:
    import torch

    if not isinstance(metrics, Mapping):
        raise BadTypeError(
            f"your loss function must return (loss, metrics) with a dict as metrics; got {type(metrics).__name__}."
        )
    numbers = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise BadTypeError(f"a metric of your loss function is named {key!r}; names are strings.")
        plain = value.detach() if isinstance(value, torch.Tensor) else value
        size = plain.numel() if isinstance(plain, torch.Tensor) else getattr(plain, "size", 1)
        try:
            if size != 1 or isinstance(plain, str | bytes):
                raise ValueError("not one number")
            numbers[key] = float(plain)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadTypeError(
                f"metric {key!r} of your loss function is {_describe(value)}; give one number or a tensor of one."
            ) from error
    return numbers


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"
