"""What does a tinker:// path say, and which method takes which kind of checkpoint?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jax_client.checkpoint.names import NAME_FORM, RUN_ID_FORM, is_name, is_run_id
from jax_client.errors import BadRequestError, BadTypeError
from jax_client.runs.checks.numbers import shown

Kind = Literal["weights", "sampler_weights", "external_weights"]

_SCHEME = "tinker://"
_FORM = "tinker://RUN/KIND/NAME with KIND weights, sampler_weights or external_weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class TinkerPath:
    """Where a checkpoint is: `tinker://RUN/KIND/NAME`; `str()` gives that text.

    Attributes:
        run_id: such as "SESSION:train:0".
        kind: "weights" has the optimizer's state and can be trained on, "sampler_weights" can be sampled from,
            "external_weights" is an export.
        name: as the user gave it.
    """

    run_id: str
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: object) -> TinkerPath:
        """Parse a path.

        Raises:
            BadTypeError: not text.
            BadRequestError: another scheme, another number of parts, an unknown kind, or a malformed run or name.
        """
        if not isinstance(text, str):
            raise BadTypeError(f"path is {shown(text)} ({type(text).__name__}), expected text: {_FORM}.")
        got = f"got path {shown(text, 200)}, expected {_FORM}"
        if not text.startswith(_SCHEME):
            raise BadRequestError(f"{got}; use the path that save_state or save_weights_for_sampler returned.")
        parts = text.removeprefix(_SCHEME).split("/")
        if len(parts) != 3:
            raise BadRequestError(f"{got}; it has {len(parts)} parts after {_SCHEME}, not 3.")
        run_id, kind, name = parts
        if kind not in get_args(Kind):
            raise BadRequestError(f"{got}; {kind!r} is not a kind.")
        if not is_run_id(run_id):
            raise BadRequestError(f"{got}; the run {shown(run_id)} must be of the form {RUN_ID_FORM}.")
        if not is_name(name):
            raise BadRequestError(f"{got}; the name {shown(name)} must be of the form {NAME_FORM}.")
        return cls(run_id=run_id, kind=kind, name=name)  # type: ignore[arg-type]


def training_path(text: object, method: str) -> TinkerPath:
    """Parse the path of a checkpoint to train on.

    Args:
        text: the path.
        method: the method that was called, for the message.

    Raises:
        BadRequestError: malformed, or not of kind weights.
    """
    path = TinkerPath.parse(text)
    use = "create_sampling_client(model_path=...)" if path.kind == "sampler_weights" else "get_external_weights_urls"
    return _of_kind(
        path,
        "weights",
        method,
        f"{use} takes this path. To train further, use a path from save_state, which keeps the optimizer's state too.",
    )


def external_path(text: object, method: str) -> TinkerPath:
    """Parse the path of an export; as `training_path`, of kind external_weights."""
    advice = "Call TrainingClient.save_weights_external and use the path that it returns."
    return _of_kind(TinkerPath.parse(text), "external_weights", method, advice)


def sampler_path(text: object, method: str) -> TinkerPath:
    """Parse the path of weights to sample from; as `training_path`, of kind sampler_weights."""
    advice = (
        "Call TrainingClient.save_weights_for_sampler and use the path that it returns; "
        "create_training_client_from_state loads a training checkpoint."
    )
    return _of_kind(TinkerPath.parse(text), "sampler_weights", method, advice)


def _of_kind(path: TinkerPath, kind: Kind, method: str, advice: str) -> TinkerPath:
    if path.kind != kind:
        raise BadRequestError(
            f"{method} got {path}, which is of kind {path.kind}; expected tinker://RUN/{kind}/NAME. {advice}"
        )
    return path
