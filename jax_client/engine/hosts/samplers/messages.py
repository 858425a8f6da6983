"""What do the pool of samplers and a replica say to each other? Frozen values, which Ray carries between processes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from jax_client.config import EngineConfig
from jax_client.errors import JaxClientError, RequestFailedError, first_line
from jax_client.weights.read.source import ModelSource

if TYPE_CHECKING:
    from jax_client.engine.core.programs import CompileRecord, Compiling
    from jax_client.engine.core.requests import GenerationRequest, GenerationResult
    from jax_client.values import LoraSpec

# What `SamplingLoop.describe` returns.
Counts = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What a replica opens its engine with.

    Attributes:
        source: the files of the base model, as the trainer has them.
        fingerprint: of the weights that the trainer has loaded.
        config: the settings of the engine; its dtype is the one that the trainer chose.
    """

    source: ModelSource
    fingerprint: str
    config: EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a replica is, once it can sample.

    Attributes:
        host: its name.
        pid: of the process there.
        logs: the directory of Ray's logs there.
        device: kind and number of its devices.
        cores: that its process may run on.
        slots: rows of its largest decode batch.
        counts: what it has sampled: nothing yet.
    """

    host: str
    pid: int
    logs: str
    device: str
    cores: int
    slots: int
    counts: Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to a request, or the error that it failed with; and what the replica has sampled by then."""

    result: GenerationResult | None = None
    error: BaseException | None = None
    counts: Counts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How a replica does: what it has sampled, the bytes of its memory by kind, and what it compiles."""

    counts: Counts
    memory_bytes: dict[str, int]
    compiling: list[Compiling]


class ReplicaLostError(RuntimeError):
    """A replica's process is gone, or cannot be reached. The pool sends its requests to others."""


class Replica(Protocol):
    """One sampler as the pool sees it. No method waits; a future fails with ReplicaLostError where the process is gone.

    What the replica itself refuses or fails at is an error of `jax_client.errors`.
    """

    @property
    def host(self) -> str:
        """The name of the host that it is on."""
        ...

    def start(self, opening: Opening) -> Future[Opened]:
        """Start the process, unless it has been started, and open its engine; after `kill`, start another one."""
        ...

    def bind(self, version: int, weights: object) -> Future[None]:
        """Put an adapter on the replica's devices, under a number.

        Args:
            version: the number of the trainer's snapshot.
            weights: what `Versions` was given by its function `share`.
        """
        ...

    def free(self, version: int) -> None:
        """Drop an adapter."""
        ...

    def generate(self, number: int, version: int, request: GenerationRequest) -> Future[Answer]:
        """Carry out a request with an adapter that is bound, or with the base model for version 0."""
        ...

    def cancel(self, number: int) -> None:
        """Give up a request."""
        ...

    def warm(self, spec: LoraSpec) -> Future[list[CompileRecord]]:
        """Compile what sampling from such an adapter will need."""
        ...

    def ping(self) -> Future[Report]:
        """Ask how it does."""
        ...

    def kill(self, *, hung: bool = False) -> None:
        """End the process; `hung` tells that it may not listen."""
        ...

    def wait_ended(self, seconds: float) -> None:
        """Wait for the end of the killed processes of this host; after these seconds they are ended by force."""
        ...


def portable(error: BaseException) -> BaseException:
    """Return an error that every process can read: this package's and Python's own stay, others are named."""
    if isinstance(error, JaxClientError):
        return error
    plain = all(isinstance(each, str | int | float | None) for each in error.args)
    if type(error).__module__ == "builtins" and isinstance(error, Exception) and plain:
        return error
    return RequestFailedError(f"a sampler failed: {type(error).__name__}: {first_line(error)}.", category="server")
