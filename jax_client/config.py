"""Which engine settings can a user choose?"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar, get_args

from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.host import places, reporting

DType = Literal["auto", "bfloat16", "float32"]
Remat = Literal["auto", "none", "selective", "full"]
# A loss whose formula is not public, and those that can stand in for it: they read the same inputs.
MAPPABLE_LOSSES = ("stable_reinforce",)
STABLE_REINFORCE_ADVICE = (
    "The formula of stable_reinforce is not public. Train with another loss: the option of a recipe is "
    "loss_fn=importance_sampling, or ppo, or cispo. Or let one of them stand in for it: jax_client serve or run "
    "--map-loss stable_reinforce=importance_sampling, in-process EngineConfig(map_loss=...)."
)
STAND_INS = ("importance_sampling", "ppo", "cispo", "dro")
MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")


def default_state_dir() -> Path:
    """Return where checkpoints live: `$JAX_CLIENT_HOME`, else `jax_client` under the XDG state directory.

    Raises:
        BadRequestError: neither is set, and this user has no home directory.
    """
    if chosen := os.environ.get("JAX_CLIENT_HOME"):
        return places.expand(chosen, "JAX_CLIENT_HOME")
    if chosen := os.environ.get("XDG_STATE_HOME"):
        return Path(chosen) / "jax_client"
    if (home := places.home()) is None:
        settings = "EngineConfig.state_dir (or JAX_CLIENT_HOME, or --state-dir)"
        raise BadRequestError(places.needs_home("checkpoints", settings))
    return home / ".local" / "state" / "jax_client"


def default_mirror() -> str | None:
    """Return where checkpoints are copied: `$JAX_CLIENT_MIRROR`, nowhere if it is not set."""
    return os.environ.get("JAX_CLIENT_MIRROR") or None


def default_compilation_cache_dir() -> Path | None:
    """Return where compiled programs are kept, under the XDG cache directory; None for a user without a home."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "jax_client" / "xla"
    home = places.home()
    return None if home is None else home / ".cache" / "jax_client" / "xla"


_Class = TypeVar("_Class", bound=type)


def _names_the_nearest(cls: _Class) -> _Class:
    """Make a dataclass refuse an unknown field by the name of the field that is like it."""
    init, known = cls.__init__, [each.name for each in fields(cls)]

    @functools.wraps(init)
    def checked(self: object, *args: object, **kwargs: object) -> None:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                guess = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}."
                raise BadTypeError(f"{cls.__name__} has no field {name!r}; {guess}")
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


@_names_the_nearest
@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of the engine behind a `ServiceClient`. What "auto" chose is shown by `ServiceClient.describe()`.

    Attributes:
        dtype: storage and matmul operand type of the frozen weights. "auto" takes bfloat16 where this device's matmul
            is half as fast again with it (probed), else float32. "float32" also raises every dot to full float32
            precision.
        mesh: "auto", or sizes by axis, such as {"fsdp": 4, "tensor": 2}; the axes are data, fsdp, sequence, expert,
            tensor, those left out have size 1, sequence stays 1. "expert" splits the experts of a layer, as "fsdp" does
            together with all other weights, and the rows of a batch. "auto" has all devices on "fsdp"; on TPUs at most
            those whose parts of the model's width are multiples of 128, and the rest on "tensor", where that divides
            the model.
        max_tokens_per_micro_batch: ceiling of the tokens computed at once in a training pass, at most 8,192 for each
            way of the mesh that rows are split (on a CPU for each of the two that run at once); None chooses.
        remat: what the backward pass recomputes to save memory. "none" keeps every layer's activations, "selective" all
            but the wide half of each layer, "full" each layer's input only; "auto" takes the first that fits, on
            an accelerator together with the tokens of a micro-batch.
        state_dir: checkpoints and their catalogue, on a disk of this machine; None is `default_state_dir()`.
        mirror: where every checkpoint is copied after it is safe in `state_dir`, and found again when it is gone there,
            such as "gs://bucket/path": any URL that fsspec opens; None is `default_mirror()`.
        autosave_minutes: how often a run that has taken steps since its last save is saved by itself, into the slots
            autosave-0 and autosave-1 in turn; also on SIGTERM, at exit and when its client is closed. None is never.
        compilation_cache_dir: compiled programs, kept between processes, in a directory or at a URL that jax can write
            to, such as "gs://bucket/path"; None is `default_compilation_cache_dir()`, "" leaves jax's own setting as it
            is. jax has one per process: the newest engine's choice holds. Where it cannot be written, a warning says
            so, and every start compiles.
        memory_fraction: share of a device's memory (of the host's, on a CPU) that may be filled; what needs more is
            refused before it is allocated.
        precompile: compile beside the requests what they will need next, and let a larger program that is there serve
            while a smaller one is compiled. False compiles each program when it is first needed, and nothing else.
        record_metrics: keep the metrics and events of every run in `metrics.sqlite` under `state_dir`, written beside
            the training.
        progress: say on stderr what is loaded or compiled while a request waits for it, and the seconds; a terminal
            shows it live. `$JAX_CLIENT_PROGRESS` = 0 turns it off, too. A server tells of its clients, runs and
            compiles.
        map_loss: a loss of this package by the name of one whose formula is not public, such as
            {"stable_reinforce": "importance_sampling"}. The first is then accepted, and computed as the second, which
            every answer's metrics say; record_stability_info=True is accepted too, and records nothing.
        hosts: "ray" computes on all hosts of the Ray cluster that this process belongs to, as one engine; this process
            stays the only one that runs the program. None is `$JAX_CLIENT_HOSTS`, and this host alone where that is not
            set.
        samplers: further engines that only sample, each with the base weights: on other hosts of the Ray cluster first,
            one on each, then on this host with a share of its chips, on a CPU of its cores. 0 samples with the engine
            that trains.
        export_metrics: also write the metrics of steps, and those of `jax_client.log`, to "wandb", "trackio" or
            "tensorboard", or to several, with commas between them; each needs its package. None is
            `$JAX_CLIENT_EXPORT_METRICS`, and nothing where that is not set.
        alert_webhook: an https address to which new alerts of open runs are posted as JSON; http to this machine alone.
            None is `$JAX_CLIENT_ALERT_WEBHOOK`, and nothing where that is not set.
        alert_hosts: the hosts that `alert_webhook` may name, with commas between them; None is
            `$JAX_CLIENT_ALERT_HOSTS`.

    Raises:
        BadRequestError: a field has a value outside its range; the message names both.
    """

    dtype: DType = "auto"
    mesh: Literal["auto"] | Mapping[str, int] = "auto"
    max_tokens_per_micro_batch: int | None = None
    remat: Remat = "auto"
    state_dir: str | os.PathLike[str] | None = None
    mirror: str | None = None
    autosave_minutes: float | None = 10.0
    compilation_cache_dir: str | os.PathLike[str] | None = None
    memory_fraction: float = 0.9
    precompile: bool = True
    record_metrics: bool = True
    progress: bool = True
    map_loss: Mapping[str, str] = field(default_factory=dict)
    hosts: Literal["ray"] | None = None
    samplers: int = 0
    export_metrics: str | Sequence[str] | None = None
    alert_webhook: str | None = None
    alert_hosts: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise BadRequestError(f"EngineConfig.dtype is {self.dtype!r}; choose one of {', '.join(get_args(DType))}.")
        if self.remat not in get_args(Remat):
            raise BadRequestError(f"EngineConfig.remat is {self.remat!r}; choose one of {', '.join(get_args(Remat))}.")
        tokens = self.max_tokens_per_micro_batch
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 16):
            raise BadRequestError(
                f"EngineConfig.max_tokens_per_micro_batch is {tokens!r}; give an integer of at least 16, or None."
            )
        fraction = self.memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise BadRequestError(f"EngineConfig.memory_fraction is {fraction!r}; give a number above 0 and at most 1.")
        for name in ("precompile", "record_metrics", "progress"):
            if not isinstance(value := getattr(self, name), bool):
                raise BadRequestError(f"EngineConfig.{name} is {value!r}; give True or False.")
        if self.hosts not in (None, "ray"):
            raise BadRequestError(f"EngineConfig.hosts is {self.hosts!r}; give 'ray', or None for this host alone.")
        if isinstance(self.samplers, bool) or not isinstance(self.samplers, int) or self.samplers < 0:
            raise BadRequestError(f"EngineConfig.samplers is {self.samplers!r}; give an integer of at least 0.")
        reporting.tracker_names(self.export_metrics, "EngineConfig.export_metrics")
        if self.alert_webhook is not None:
            self.webhook  # noqa: B018
        self._check_places()
        self._check_losses()
        minutes = self.autosave_minutes
        if minutes is not None and (
            isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < float("inf")
        ):
            raise BadRequestError(
                f"EngineConfig.autosave_minutes is {minutes!r}; give a number above 0, or None for no autosave."
            )
        if self.mesh == "auto":
            return
        if not isinstance(self.mesh, Mapping):
            raise BadRequestError(f"EngineConfig.mesh is {self.mesh!r}; give 'auto' or a mapping of axis sizes.")
        for axis, size in self.mesh.items():
            if axis not in MESH_AXES:
                raise BadRequestError(f"EngineConfig.mesh has an axis {axis!r}; the axes are {', '.join(MESH_AXES)}.")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise BadRequestError(f"EngineConfig.mesh[{axis!r}] is {size!r}; give an integer of at least 1.")
            if axis == "sequence" and size != 1:
                raise BadRequestError(
                    f"EngineConfig.mesh[{axis!r}] is {size}; it stays 1 so far. Use data, fsdp, expert and tensor."
                )

    def to_json(self) -> dict[str, object]:
        """Return the settings as JSON has them, for the record of a run; paths are texts."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        # An address may hold a secret.
        return {name: _plain(value) for name, value in values.items() if name != "alert_webhook"}

    @property
    def on_several_hosts(self) -> bool:
        """Whether the engine computes on all hosts of a Ray cluster.

        Raises:
            BadRequestError: `$JAX_CLIENT_HOSTS` has another value than "ray".
        """
        chosen = self.hosts or os.environ.get("JAX_CLIENT_HOSTS") or None
        if chosen not in (None, "ray"):
            raise BadRequestError(f"the environment's JAX_CLIENT_HOSTS is {chosen!r}; set 'ray', or unset it.")
        return chosen == "ray"

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of the programs to which metrics are exported. Raises BadRequestError for an unknown one."""
        if self.export_metrics is not None:
            return reporting.tracker_names(self.export_metrics, "EngineConfig.export_metrics")
        where = "JAX_CLIENT_EXPORT_METRICS"
        return reporting.tracker_names(os.environ.get(where), f"the environment's {where}")

    @property
    def webhook(self) -> str | None:
        """The address to which alerts are posted. Raises BadRequestError for one that is not allowed."""
        url, where = self.alert_webhook, "EngineConfig.alert_webhook"
        if url is None:
            url, where = os.environ.get("JAX_CLIENT_ALERT_WEBHOOK"), "the environment's JAX_CLIENT_ALERT_WEBHOOK"
        hosts = os.environ.get("JAX_CLIENT_ALERT_HOSTS") if self.alert_hosts is None else self.alert_hosts
        return reporting.webhook_url(url, hosts, where)

    def check_stability_info(self, record_stability_info: object) -> None:
        """Raise UnsupportedError if stability information is asked for, and no loss stands in for stable_reinforce."""
        if record_stability_info and "stable_reinforce" not in self.map_loss:
            raise UnsupportedError(f"record_stability_info=True is not supported. {STABLE_REINFORCE_ADVICE}")

    def _check_losses(self) -> None:
        if not isinstance(self.map_loss, Mapping):
            raise BadRequestError(f"EngineConfig.map_loss is {self.map_loss!r}; give a mapping of names.")
        for name, other in self.map_loss.items():
            if name not in MAPPABLE_LOSSES or other not in STAND_INS:
                raise BadRequestError(
                    f"EngineConfig.map_loss maps {name!r} to {other!r}; it can map {', '.join(MAPPABLE_LOSSES)} to "
                    f"{', '.join(STAND_INS[:-1])} or {STAND_INS[-1]}."
                )

    def _check_places(self) -> None:
        # A pathlib.Path of a URL has one slash left.
        if self.state_dir is not None and re.match("[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(self.state_dir)):
            raise UnsupportedError(
                f"EngineConfig.state_dir is {os.fspath(self.state_dir)!r}: an object store has no locks or renames, on "
                "which saving relies. Give a directory of this machine, and the URL as EngineConfig.mirror, where "
                "every checkpoint is then copied."
            )
        if self.mirror is not None and not (isinstance(self.mirror, str) and "://" in self.mirror):
            raise BadRequestError(
                f"EngineConfig.mirror is {self.mirror!r}; give a URL such as gs://bucket/path, or None. A directory is "
                "file:///path."
            )


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return list(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value
