"""Which method takes which kind of checkpoint? Another kind is refused; `CheckpointKey.parse` reads the path."""

from __future__ import annotations

from jax_client.errors import BadRequestError
from jax_client.values import CheckpointKey, Kind


def training_path(text: object, method: str) -> CheckpointKey:
    """Parse the path of a checkpoint to train on.

    Args:
        text: the path.
        method: the method that was called, for the message.

    Raises:
        BadRequestError: malformed, or not of kind weights.
    """
    path = CheckpointKey.parse(text)
    use = "create_sampling_client(model_path=...)" if path.kind == "sampler_weights" else "get_external_weights_urls"
    return _of_kind(
        path,
        "weights",
        method,
        f"{use} takes this path. To train further, use a path from save_state, which keeps the optimizer's state too.",
    )


def external_path(text: object, method: str) -> CheckpointKey:
    """Parse the path of an export; as `training_path`, of kind external_weights."""
    advice = "Call TrainingClient.save_weights_external and use the path that it returns."
    return _of_kind(CheckpointKey.parse(text), "external_weights", method, advice)


def sampler_path(text: object, method: str) -> CheckpointKey:
    """Parse the path of weights to sample from; as `training_path`, of kind sampler_weights."""
    advice = (
        "Call TrainingClient.save_weights_for_sampler and use the path that it returns; "
        "create_training_client_from_state loads a training checkpoint."
    )
    return _of_kind(CheckpointKey.parse(text), "sampler_weights", method, advice)


def _of_kind(path: CheckpointKey, kind: Kind, method: str, advice: str) -> CheckpointKey:
    if path.kind != kind:
        raise BadRequestError(
            f"{method} got {path}, which is of kind {path.kind}; expected tinker://RUN/{kind}/NAME. {advice}"
        )
    return path
