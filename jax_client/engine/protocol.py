"""What can other rooms ask of an engine? A dozen operations, most of which return a future at once, and its monitor.

`engine.engine.Engine` is the engine; the tests have one without a device. This module imports no jax, so that a process
without a model can name the types. A lane, an adapter and a snapshot are handles: other rooms hand them back, and read
of a snapshot only `step`, `version`, `accumulating` and `fetch`.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    import numpy as np

    from jax_client.engine.core.adapters import Adapter, Snapshot, Version
    from jax_client.engine.core.programs import CompileRecord, Compiling
    from jax_client.engine.core.requests import (
        AdamSettings,
        CustomLoss,
        GenerationRequest,
        GenerationResult,
        LossSpec,
        TrainResult,
    )
    from jax_client.engine.core.turns import Lane
    from jax_client.models.config import ModelConfig
    from jax_client.values import AdapterState, LoraSpec, TrainExample
    from jax_client.weights.read.source import ModelSource

# The model, the mesh, every value that "auto" chose, memory by kind, the compiled programs: JSON, for people.
Description = dict[str, Any]


class Health(TypedDict):
    """How an engine does.

    Attributes:
        state: "idle", "busy" and "compiling" are well.
        waiting: requests that have not finished.
        stalled_seconds: since anything moved; 0 when nothing waits.
        compiling: what is being compiled.
        hosts: the other hosts of the mesh and the samplers, with their "host", "role" and "state", "ready" if well.
    """

    state: Literal["idle", "busy", "compiling", "stuck", "dead", "closed"]
    waiting: int
    stalled_seconds: float
    compiling: list[Compiling]
    hosts: NotRequired[list[dict[str, object]]]


class Usage(TypedDict):
    """What changes from step to step.

    Attributes:
        memory_bytes: by kind, all devices together; "available" is what one device may still allocate.
        sampling: the cache and what was sampled, as `SamplingLoop.describe` names it.
        training: the sums of all training, as `accounting.Work` names them.
        owner_seconds: that the turns of each owner have taken, "" for what has no owner.
    """

    memory_bytes: dict[str, int]
    sampling: dict[str, float]
    training: dict[str, float]
    owner_seconds: dict[str, float]


class Monitor(Protocol):
    """What an engine says about itself. No method waits for the thread that launches programs."""

    def describe(self) -> Description:
        """Return the model, the mesh, every value that "auto" chose, memory by kind and the compiled programs."""
        ...

    def usage(self) -> Usage:
        """Return what changes from step to step; walks the trees of the adapters once."""
        ...

    def compiled(self, since: int = 0) -> list[CompileRecord]:
        """Return the compiles so far, but for the first `since`."""
        ...

    def health(self) -> Health:
        """Return how the engine does."""
        ...


class Engine(Protocol):
    """One base model on one mesh. Requests of a lane run in order; lanes take turns."""

    @property
    def source(self) -> ModelSource:
        """Where the model's files are."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The model's sizes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The type of weights and matmul operands."""
        ...

    @property
    def monitor(self) -> Monitor:
        """What the engine says about itself."""
        ...

    def open_lane(self, owner: str = "") -> Lane:
        """Return a queue for one client of an owner. Owners share the device equally."""
        ...

    def open_adapter(self, lane: Lane, start: LoraSpec | AdapterState) -> Future[Adapter]:
        """Make an adapter: with fresh weights, or with those of a saved state and its moments if it has them."""
        ...

    def restore(self, lane: Lane, adapter: Adapter, state: AdapterState) -> Future[Version]:
        """Replace the adapter's weights and optimizer by a saved state; accumulated gradients are dropped."""
        ...

    def release(self, adapter: Adapter) -> None:
        """Forget an adapter; its memory is freed when nothing else refers to it."""
        ...

    def score_batch(
        self, lane: Lane, adapter: Adapter | None, examples: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        """Return the logprobs and the loss with an adapter, or with the base model for None; no gradient."""
        ...

    def train_batch(
        self, lane: Lane, adapter: Adapter, examples: list[TrainExample], loss: LossSpec | CustomLoss
    ) -> Future[TrainResult]:
        """Add the gradient of the summed loss to the adapter's accumulated gradient.

        A custom loss runs on the host, on a thread of its own, between a forward and a backward pass.
        """
        ...

    def optim_step(self, lane: Lane, adapter: Adapter, settings: AdamSettings) -> Future[dict[str, float]]:
        """Apply one AdamW step with the accumulated gradient, and clear it; return the step's metrics.

        A gradient whose norm is not finite is dropped without an update and reported as `skipped_nonfinite:sum`. A
        step that would leave float32's range fails, names the setting, and changes nothing; the gradient stays.
        """
        ...

    def snapshot(
        self, lane: Lane | None, source: Adapter | AdapterState, *, optimizer: bool = False
    ) -> Future[Snapshot]:
        """Return weights to sample from or to save: an adapter's as of this place in its lane, or a saved state's.

        An adapter's arrays are immutable: nothing is copied, and the lane continues at once.

        Args:
            lane: None takes an adapter as it is now, whatever is queued, in this call and from any thread; a state
                needs one.
            source: the adapter or the state.
            optimizer: keep Adam's moments of the adapter too.
        """
        ...

    def generate(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Sample from, or score, a prompt with a snapshot's weights, or the base model's for None.

        Requests of all clients run together, whatever their weights. Cancelling the future frees the request's rows.
        """
        ...

    def logits(
        self, lane: Lane, tokens_T: np.ndarray, state: AdapterState | None, model: ModelSource | None = None
    ) -> Future[np.ndarray]:
        """Score a short text over the whole vocabulary, float32 (T, V).

        Args:
            lane: of the client who pays for it.
            tokens_T: int32.
            state: an adapter to put on the device for this; None for none.
            model: of other weights, which are loaded beside the engine's own for this.
        """
        ...

    def warmup(
        self, spec: LoraSpec, lengths: list[int], targets_per_position: int, *, sampling: bool = False
    ) -> Future[list[CompileRecord]]:
        """Compile what train_batch over sequences of these lengths, and optim_step, will need.

        Args:
            spec: of the adapter.
            lengths: of the sequences.
            targets_per_position: K of the targets.
            sampling: compile what sampling from such an adapter will need, too.

        Returns:
            What was compiled or loaded for it; programs that were compiled before are left out.
        """
        ...

    def close(self) -> None:
        """Stop the engine's threads; requests that have not finished fail."""
        ...
