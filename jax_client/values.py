"""Which plain values do several floors pass on? Adapters, examples, owners, and keys that `tinker://` paths spell.

All are frozen records of numpy arrays, scalars and names. `CheckpointKey` alone parses and prints the text
`tinker://RUN/KIND/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from jax_client.errors import BadRequestError, BadTypeError, shown

# An object of JSON: text, finite numbers, truth values, None, lists and objects by name.
JsonObject: TypeAlias = dict[str, Any]

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_LORA_RANK = 512
NAME_FORM = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
RUN_ID_FORM = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"

_SCHEME = "tinker://"
_PATH_FORM = "tinker://RUN/KIND/NAME with KIND weights, sampler_weights or external_weights"


def is_name(text: object) -> bool:
    """Return whether `text` has the form of a checkpoint's name."""
    return isinstance(text, str) and re.fullmatch(NAME_FORM, text) is not None


def is_run_id(text: object) -> bool:
    """Return whether `text` has the form of a run id."""
    return isinstance(text, str) and re.fullmatch(RUN_ID_FORM, text) is not None


@dataclass(frozen=True, order=True, slots=True)
class CheckpointKey:
    """Which checkpoint is meant; `str()` gives its path, `tinker://RUN/KIND/NAME`.

    Attributes:
        run_id: such as "SESSION:train:0".
        kind: "weights" has the optimizer's state and can be trained on, "sampler_weights" can be sampled from,
            "external_weights" is an export.
        name: as the user gave it.

    Raises:
        BadRequestError: the run, the kind or the name has another form. Names come from users and from the network and
            become part of a path: they hold no separator, are never "." or "..", and never begin with a dot.
    """

    run_id: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        if not is_run_id(self.run_id):
            raise BadRequestError(f"run_id is {self.run_id!r}; give an id of the form {RUN_ID_FORM}.")
        if self.kind not in KINDS:
            raise BadRequestError(f"kind is {self.kind!r}; give one of {', '.join(KINDS)}.")
        if not is_name(self.name):
            raise BadRequestError(f"name is {self.name!r}; give a name of the form {NAME_FORM}.")

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        """KIND/NAME, which tells it from the other checkpoints of its run."""
        return f"{self.kind}/{self.name}"

    @property
    def in_words(self) -> str:
        """The key as a message names it."""
        return f"checkpoint {self.checkpoint_id} of run {self.run_id}"

    @classmethod
    def parse(cls, text: object) -> CheckpointKey:
        """Parse a path.

        Raises:
            BadTypeError: not text.
            BadRequestError: another scheme, another number of parts, an unknown kind, or a malformed run or name.
        """
        if not isinstance(text, str):
            raise BadTypeError(f"path is {shown(text)} ({type(text).__name__}), expected text: {_PATH_FORM}.")
        got = f"got path {shown(text, 200)}, expected {_PATH_FORM}"
        if not text.startswith(_SCHEME):
            raise BadRequestError(f"{got}; use the path that save_state or save_weights_for_sampler returned.")
        parts = text.removeprefix(_SCHEME).split("/")
        if len(parts) != 3:
            raise BadRequestError(f"{got}; it has {len(parts)} parts after {_SCHEME}, not 3.")
        run_id, kind, name = parts
        if kind not in KINDS:
            raise BadRequestError(f"{got}; {kind!r} is not a kind.")
        if not is_run_id(run_id):
            raise BadRequestError(f"{got}; the run {shown(run_id)} must be of the form {RUN_ID_FORM}.")
        if not is_name(name):
            raise BadRequestError(f"{got}; the name {shown(name)} must be of the form {NAME_FORM}.")
        return cls(run_id, kind, name)

    @classmethod
    def of_run(cls, run_id: str, checkpoint_id: str) -> CheckpointKey:
        """Parse a checkpoint's KIND/NAME beside its run. Raises as `parse` does."""
        return cls.parse(f"{_SCHEME}{run_id}/{checkpoint_id}")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns runs and checkpoints where a server has several keys. None in its place is who may use all of them.

    Attributes:
        name: of the key; it is recorded with whatever its clients write.
        admin: whether it also has what no owner is recorded of, as a process without keys writes it.
    """

    name: str
    admin: bool = False

    def has(self, recorded: object) -> bool:
        """Return whether something is the owner's, of which this name is recorded, None for no name."""
        return self.admin if recorded is None else recorded == self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """One adapter: which linear layers it covers, and how it starts.

    Attributes:
        rank: 1 to `MAX_LORA_RANK`. The adapter adds (alpha / rank) (x A) B to each covered layer, alpha =
            `models.parts.lora.LORA_ALPHA`.
        seed: of the initial A (uniform in ±1/√fan_in); B starts at zero.
        train_attn: cover q, k, v, o.
        train_mlp: cover gate, up, down.
        train_unembed: cover the output projection (only that, when it is tied to the embedding).
    """

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LoraSpec:
        """Undo `to_json`."""
        return cls(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExample:
    """One datum, validated: target i is scored with the logits at token i; there is no shift.

    Attributes:
        tokens_T: int32 (T,).
        targets: int32 (T,) or (T, K).
        inputs: float32 arrays in the shape of `targets`, by the loss's input names.
    """

    tokens_T: np.ndarray
    targets: np.ndarray
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterState:
    """An adapter on the host, as it is saved: flat names to float32 arrays, module by module.

    Attributes:
        spec: the adapter's configuration.
        step: optimizer steps taken.
        weights: such as "q.A" (L, R, D), "q.B" (L, R, K, G, H); see `engine/core/adapters.py`.
        mu, nu: Adam's moments under the same names; None in sampler weights.
    """

    spec: LoraSpec
    step: int
    weights: Mapping[str, np.ndarray]
    mu: Mapping[str, np.ndarray] | None = None
    nu: Mapping[str, np.ndarray] | None = None
