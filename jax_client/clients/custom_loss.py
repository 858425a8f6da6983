"""How is the user's loss function called? On a copy of the batch and torch logprobs, as the SDK calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np
from tinker import LossHandle, types

from jax_client import torch_bridge
from jax_client.clients.sdk_errors import warn_caller
from jax_client.engine.core.requests import CustomLoss
from jax_client.errors import BadRequestError, BadTypeError
from jax_client.runs.sdk import check_loss_inputs, run_loss_handle

if TYPE_CHECKING:
    import torch


class CustomCall:
    """One call of `forward_backward_custom`: the user's function over its own copy of the data.

    Args:
        data: the batch. It is copied now, so that the function cannot reach the caller's objects.
        loss_fn: `fn(data, logprobs) -> (loss, metrics)`, or a handle from `create_custom_loss`.
        session_id: the session that a handle must belong to.

    Raises:
        ImportError: torch is not installed.
        BadTypeError: `loss_fn` is neither a function nor a handle.
        BadRequestError: the handle is another session's.
        ValueError: a datum lacks an input that the handle reads.
    """

    def __init__(self, data: object, loss_fn: object, session_id: str) -> None:
        # Other data are refused by the request's own checks, before the function is called.
        datums = data if _are_datums(data) else []
        if isinstance(loss_fn, LossHandle):
            if loss_fn.session_id != session_id:
                raise BadRequestError(
                    f"LossHandle {loss_fn.name!r} was created in session {loss_fn.session_id}, this client's session "
                    f"is {session_id}; create it again with this client's ServiceClient."
                )
            check_loss_inputs(loss_fn, datums)
        elif not callable(loss_fn):
            raise BadTypeError(
                f"loss_fn is {type(loss_fn).__name__}; give a function of (data, logprobs) that returns (loss, metrics)"
                ", or use forward_backward for a built-in loss."
            )
        self._data = [_copy(datum) for datum in datums]
        self._function = cast("LossHandle | Callable[..., tuple[torch.Tensor, Mapping[str, object]]]", loss_fn)
        self._metrics: dict[str, float] = {}
        self._bridged = torch_bridge.custom_loss(self._call)

    def _call(self, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, object]]:
        if isinstance(self._function, LossHandle):
            return run_loss_handle(self._function, self._data, logprobs)
        return self._function(self._data, logprobs)

    @property
    def loss(self) -> CustomLoss:
        """The loss function in the form that the engine calls."""
        return self._run

    def _run(self, logprobs: list[np.ndarray]) -> tuple[float, list[np.ndarray], dict[str, float]]:
        loss, gradients, metrics = self._bridged(logprobs)
        # The SDK reports this for the linear loss with these gradients.
        surrogate = sum(float(np.vdot(g, p)) for g, p in zip(gradients, logprobs, strict=True))
        self._metrics = {**metrics, "loss:sum": loss, "surrogate_loss:sum": surrogate}
        return loss, gradients, metrics

    def metrics(self) -> dict[str, float]:
        """Return the user's metrics and the loss; empty before the function has run."""
        return self._metrics


def _are_datums(data: object) -> TypeGuard[list[types.Datum]]:
    return isinstance(data, list) and all(isinstance(datum, types.Datum) for datum in data)


def _copy(datum: types.Datum) -> types.Datum:
    return types.Datum(
        model_input=datum.model_input,
        loss_fn_inputs=copy.deepcopy(datum.loss_fn_inputs),
        model_input_spans=datum.model_input_spans,
        loss_fn_input_spans=datum.loss_fn_input_spans,
    )


def check_loss_type_input(value: str | None) -> None:
    """Warn about the deprecated argument, as the SDK does, and refuse anything but "logprobs"."""
    if value is None:
        return
    warn_caller(
        "loss_type_input is deprecated: the loss always receives logprobs. Remove it from the call.", DeprecationWarning
    )
    if value != "logprobs":
        raise BadRequestError(f"loss_type_input is {value!r}; the only supported value is 'logprobs'. Leave it out.")


def register(handle: LossHandle, keys: set[str]) -> LossHandle:
    """Remember a handle in its session's `keys`.

    Raises:
        BadRequestError: the session has this loss already.
    """
    if handle.key in keys:
        raise BadRequestError(
            f"loss {handle.name!r} was already created in this session; use the handle that the first call returned."
        )
    keys.add(handle.key)
    return handle
