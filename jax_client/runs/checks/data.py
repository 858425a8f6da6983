"""Which training data are accepted, and how do they become plain arrays for the engine?

Everything is checked here, on the host, before anything is queued: on the device a wrong token id reads another row
of the embedding and a NaN has no address.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

import numpy as np
from tinker import types

from jax_client.config import STABLE_REINFORCE_ADVICE
from jax_client.engine.core.requests import LossSpec
from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.losses.loss import Loss
from jax_client.losses.registry import LOSSES
from jax_client.runs.checks.numbers import FLOAT32_LARGEST, real, shown
from jax_client.runs.checks.tensors import dense, finite_floats, token_ids
from jax_client.runs.checks.tokens import text_tokens
from jax_client.values import TrainExample

logger = logging.getLogger(__name__)

MAX_DATUMS = 65_536
_CLIP = ("clip_low_threshold", "clip_high_threshold")
_REFUSED_LOSSES = {
    "stable_reinforce": STABLE_REINFORCE_ADVICE,
    "custom": "It stands for a loss that a server was sent, with forward_backward; use forward_backward_custom.",
}

_WHY_NOTHING_COUNTS = {
    "weights": "Perhaps the prompts alone filled the length at which the data are cut.",
    "advantages": "Perhaps all rewards of each group are equal.",
}


def training_data(
    data: object,
    loss_fn: object,
    loss_fn_config: object,
    *,
    vocab_size: int,
    max_context: int,
    warned: set[str] | None = None,
    mapped: Mapping[str, str] | None = None,
) -> tuple[list[TrainExample], LossSpec]:
    """Check a forward or forward_backward call.

    Args:
        data: list of Datum.
        loss_fn: the name of a built-in loss.
        loss_fn_config: its settings, or None.
        vocab_size: token ids are below it.
        max_context: the longest input in tokens.
        mapped: `EngineConfig.map_loss`.
        warned: the losses whose empty batches were warned about before, to which one is added; None warns of each.

    Returns:
        The data as arrays of their own, with optional inputs filled in, and the loss with every setting filled in.

    Raises:
        BadTypeError: an argument, an element or a tensor has the wrong type or dtype.
        UnsupportedError: a loss or a chunk that is refused by name.
        BadRequestError: any other fault; the message names datum, key and position.
    """
    loss = _loss((mapped or {}).get(loss_fn, loss_fn) if isinstance(loss_fn, str) else loss_fn)
    config = _config(loss, loss_fn_config)
    datums = _datums(data)
    sequences = [_sequence(datum, i, loss, vocab_size, max_context) for i, datum in enumerate(datums)]
    _warn_if_nothing_counts(sequences, loss, set() if warned is None else warned)
    return sequences, LossSpec(name=loss.name, config=config)


def _warn_if_nothing_counts(sequences: list[TrainExample], loss: Loss, warned: set[str]) -> None:
    """Warn of a batch whose gradient is zero: every label was masked, or every reward of a group was the same."""
    if loss.masked_has_gradient or loss.name in warned or any(one.inputs[loss.mask].any() for one in sequences):
        return
    warned.add(loss.name)
    logger.warning(
        "every %s of the %d datums is zero: loss and gradient are zero. %s (Said once for each run and loss.)",
        loss.mask.removesuffix("s"),
        len(sequences),
        _WHY_NOTHING_COUNTS[loss.mask],
    )


def custom_data(data: object, *, vocab_size: int, max_context: int) -> list[TrainExample]:
    """Check a forward_backward_custom call; inputs other than target_tokens belong to the user's function.

    Raises:
        BadTypeError: an argument or an element has the wrong type.
        BadRequestError: target_tokens is missing or does not fit the tokens.
    """
    sequences = []
    for i, datum in enumerate(_datums(data)):
        tokens_T, targets = _tokens_and_targets(datum, i, "forward_backward_custom", vocab_size, max_context)
        _check_shapes(i, tokens_T, {"target_tokens": targets})
        sequences.append(TrainExample(tokens_T=tokens_T, targets=targets))
    return sequences


def _loss(loss_fn: object) -> Loss:
    names = ", ".join(LOSSES)
    if callable(loss_fn):
        raise BadTypeError(
            f"loss_fn is the callable {shown(loss_fn)}; use forward_backward_custom for a loss function of your own. "
            f"Built-in losses are given by name: {names}."
        )
    if not isinstance(loss_fn, str):
        raise BadTypeError(f"loss_fn is {shown(loss_fn)} ({type(loss_fn).__name__}); give one of {names}.")
    if loss_fn in LOSSES:
        return LOSSES[loss_fn]
    if loss_fn in _REFUSED_LOSSES:
        raise UnsupportedError(f"loss_fn {loss_fn!r} is not supported. {_REFUSED_LOSSES[loss_fn]}")
    raise BadRequestError(f"loss_fn is {shown(loss_fn)}{_nearest(loss_fn, LOSSES)}; give one of {names}.")


def _config(loss: Loss, given: object) -> dict[str, float]:
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise BadTypeError(f"loss_fn_config is {shown(given)} ({type(given).__name__}); give a dict or None.")
    allowed = f"allowed for {loss.name!r}: {', '.join(loss.config) or 'none'}"
    for key in given:
        if key not in loss.config:
            raise BadRequestError(
                f"loss_fn_config has the unknown key {shown(key)}{_nearest(key, loss.config)}; {allowed}."
            )
    config = dict(loss.config)
    for key, value in given.items():
        config[key] = real(f"loss_fn_config[{key!r}]", value, 0, FLOAT32_LARGEST)
    if all(key in config for key in _CLIP) and config[_CLIP[0]] > config[_CLIP[1]]:
        raise BadRequestError(
            f"loss_fn_config has {_CLIP[0]} {config[_CLIP[0]]:g} above {_CLIP[1]} {config[_CLIP[1]]:g}; they are "
            "bounds of the probability ratio itself, such as 0.8 and 1.2."
        )
    return config


def _datums(data: object) -> list[types.Datum]:
    if not isinstance(data, (list, tuple)):
        raise BadTypeError(f"data is {type(data).__name__}, expected a list of Datum; use list(...).")
    if not data:
        raise BadRequestError("No data provided")
    if len(data) > MAX_DATUMS:
        raise BadRequestError(
            f"data has {len(data)} datums; the limit of a call is {MAX_DATUMS}. Call forward_backward several times "
            "before optim_step: gradients add up."
        )
    for i, datum in enumerate(data):
        if isinstance(datum, str):
            raise BadTypeError(
                f"data[{i}] is text; make a types.Datum of its token ids, which client.get_tokenizer().encode(text) "
                "gives: ids[:-1] are the model_input, ids[1:] the target_tokens."
            )
        if not isinstance(datum, types.Datum):
            raise BadTypeError(f"data[{i}] is {type(datum).__name__}, expected Datum.")
    return list(data)


def _tokens_and_targets(
    datum: types.Datum, i: int, method: str, vocab_size: int, max_context: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens_T = text_tokens(datum.model_input, f"data[{i}].model_input", vocab_size, max_context)
    if "target_tokens" not in datum.loss_fn_inputs:
        raise _missing(i, "target_tokens", datum, method)
    where = f"data[{i}].loss_fn_inputs['target_tokens']"
    targets = token_ids(dense(datum.loss_fn_inputs["target_tokens"], where), where, vocab_size)
    if targets.ndim not in (1, 2) or 0 in targets.shape[1:]:
        raise BadRequestError(
            f"{where} has shape {list(targets.shape)}; give [N], or [N, K] for K targets per position, "
            f"with N = {len(tokens_T)}."
        )
    return tokens_T, targets


def _sequence(datum: types.Datum, i: int, loss: Loss, vocab_size: int, max_context: int) -> TrainExample:
    tokens_T, targets = _tokens_and_targets(datum, i, loss.name, vocab_size, max_context)
    inputs: dict[str, np.ndarray] = {}
    for key, tensor in datum.loss_fn_inputs.items():
        if key == "target_tokens":
            continue
        if key not in loss.inputs:
            raise _unknown_input(i, key, loss)
        where = f"data[{i}].loss_fn_inputs[{key!r}]"
        inputs[key] = finite_floats(dense(tensor, where), where)
    for key, required in loss.inputs.items():
        if required and key not in inputs:
            raise _missing(i, key, datum, loss.name)
    _check_shapes(i, tokens_T, {"target_tokens": targets, **inputs})
    if loss.one_target and targets.ndim == 2 and targets.shape[1] > 1:
        raise UnsupportedError(
            f"data[{i}].loss_fn_inputs['target_tokens'] has {targets.shape[1]} targets per position; {loss.name!r} "
            "compares the probabilities of whole sequences, so it takes one: give [N]."
        )
    for key, value in loss.defaults.items():
        if key not in inputs:
            inputs[key] = np.full(targets.shape, value, dtype=np.float32)
    for key, other in loss.copies.items():
        inputs.setdefault(key, inputs[other])
    return TrainExample(tokens_T=tokens_T, targets=targets, inputs=inputs)


def _check_shapes(i: int, tokens_T: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    targets = arrays["target_tokens"]
    if len(targets) == len(tokens_T) and all(array.shape == targets.shape for array in arrays.values()):
        return
    listed = ", ".join(f"{key} {list(array.shape)}" for key, array in arrays.items())
    raise BadRequestError(
        f"data[{i}] has {len(tokens_T)} tokens in model_input, but shapes {listed}. target_tokens must have one row "
        "per token, and every other input exactly the shape of target_tokens, [N] or [N, K]. Target i is scored at "
        "token i: shift tokens and targets by one yourself, as in tokens[:-1] and tokens[1:]."
    )


def _missing(i: int, key: str, datum: types.Datum, loss: str) -> BadRequestError:
    present = ", ".join(datum.loss_fn_inputs) or "none"
    meant = difflib.get_close_matches(key, datum.loss_fn_inputs, n=1, cutoff=0.8)
    advice = f"Did you mean {key!r} by {meant[0]!r}?" if meant else "Add it to the Datum."
    return BadRequestError(f"data[{i}].loss_fn_inputs has no {key!r}, which {loss} needs; present: {present}. {advice}")


def _unknown_input(i: int, key: str, loss: Loss) -> BadRequestError:
    allowed = ", ".join(["target_tokens", *loss.inputs])
    hint = ""
    if key in ("mask", "weights"):
        hint = f" Leave it out, and set advantages to 0 where a token must not count: {loss.name!r} has no {key}."
    return BadRequestError(
        f"data[{i}].loss_fn_inputs has the key {shown(key)}, which {loss.name!r} does not read"
        f"{_nearest(key, loss.inputs)}; allowed: {allowed}.{hint}"
    )


def _nearest(name: object, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
