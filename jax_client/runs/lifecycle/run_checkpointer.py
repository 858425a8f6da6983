"""Who writes a run's checkpoints, both requested and automatic? One `RunCheckpointer` per run.

It outlives the run's client, so that unsaved steps can be written after the client is forgotten, or when the process is
told to end.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jax_client.checkpoint.disk import files
from jax_client.engine.core.requests import AdamSettings
from jax_client.runs.lifecycle import base_models
from jax_client.runs.lifecycle.base_models import ModelRef
from jax_client.runs.lifecycle.futures import settled
from jax_client.runs.results import api_records
from jax_client.values import AdapterState, CheckpointKey, Kind, LoraSpec

if TYPE_CHECKING:
    from jax_client.checkpoint.disk.run_lock import RunLock
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.engine.core.adapters import Adapter, Snapshot, Version
    from jax_client.runs.results.run_metrics import RunMetrics

logger = logging.getLogger(__name__)

# How a run ends: closed in order, or with the words of its session; unloaded, until it is used again; forgotten by its
# program; with the program, in order or by an exception; by a signal; with hosts or devices that were lost.
End = Literal["closed", "errored", "interrupted", "unloaded", "forgotten", "exit", "exception", "signal", "lost"]
_open: weakref.WeakSet[RunCheckpointer] = weakref.WeakSet()

# Two, so that the older one is still there should the disk damage the newer.
SLOTS = ("autosave-0", "autosave-1")


def note_ends(how: End, text: str = "", *, final: bool = True) -> None:
    """Record the end of every run that this process has open; see `RunCheckpointer.note_end`."""
    for checkpointer in list(_open):
        checkpointer.note_end(how, text, final=final)


def forget_open_runs() -> None:
    """Know of no open run, in a forked process: its parent has them."""
    _open.clear()


class RunCheckpointer:
    """Writes the checkpoints of one run. Thread-safe.

    Args:
        store: where to.
        model_ref: the base model, whose engine stays until `end`.
        adapter: the engine's handle.
        spec: the adapter's configuration.
        run_id: `SESSION:train:N`.
        claim: of the run's directory, released by `end`.
        step: optimizer steps that the adapter starts with; they are saved elsewhere.
        observed: where what is written is noted.
        owner: who pays for what it does on the device, "" for no one.
        source: the checkpoint that the adapter was made from, None for a fresh one.

    Attributes:
        optimizer_config: the settings of the newest `optim_step`, None before the first.
        newest: the checkpoint from which training can be continued; None before the first.
    """

    def __init__(
        self,
        *,
        store: CheckpointStore,
        model_ref: ModelRef,
        adapter: Adapter,
        spec: LoraSpec,
        run_id: str,
        claim: RunLock,
        step: int,
        observed: RunMetrics,
        owner: str,
        source: CheckpointKey | None = None,
    ) -> None:
        self.run_id = run_id
        self.observed = observed
        self.store = store
        self.spec = spec
        self.optimizer_config: AdamSettings | None = None
        self.newest: CheckpointKey | None = source
        model_ref.retain()
        self._model_ref = model_ref
        self._engine = model_ref.model.engine
        self._adapter = adapter
        self._claim = claim
        self._owner = owner
        self._saved = 0, step
        # Not over the one that this run goes on from.
        self._autosaves = int(source is not None and source.run_id == run_id and source.name == SLOTS[0])
        self._autosaved: tuple[CheckpointKey, Version] | None = None
        self._ended = False
        self._lock = threading.Lock()
        _open.add(self)

    def note_end(self, how: End, text: str, *, final: bool) -> None:
        """Record that the process ends, how, and why; `final` says that it does so for certain. Never raises."""
        if not self._ended:
            self._claim.note_end(how, text)
            if final:
                self.observed.end(how, text)

    def write(
        self,
        held: Snapshot,
        kind: Kind,
        name: str,
        *,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> CheckpointKey:
        """Write a checkpoint; on return it is durable. Raises as `CheckpointStore.save` does."""
        state, began = held.fetch(), time.monotonic()
        path = CheckpointKey(self.run_id, kind, name)
        self.store.save(
            key=path,
            state=state,
            metadata=self._metadata(state, user_metadata),
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
        )
        if kind == "weights":
            self._saved, self.newest = max(self._saved, held.version), path
        event = "autosave" if name in SLOTS else "save"
        self.observed.event(event, state.step, path=str(path), seconds=time.monotonic() - began)
        return path

    def export(
        self, state: AdapterState, name: str, *, ttl_seconds: int | None = None, recipients: list[str] | None = None
    ) -> CheckpointKey:
        """Write the adapter as peft does, as a checkpoint of kind external_weights, and check it. Raises as `write`.

        Args:
            state: the adapter.
            name: of the checkpoint.
            ttl_seconds: None keeps it.
            recipients: the age keys for which its files are encrypted; None leaves them readable.
        """
        # Imported here: a process without a model has no use for it.
        from jax_client.runs.lifecycle.export_check import check_export
        from jax_client.weights.write import age, peft

        def write(directory: Path) -> None:
            if recipients is None:
                write_checked(directory)
                return
            with files.temporary_directory(directory) as readable:
                write_checked(readable)
                age.encrypt_files(readable, directory, recipients)

        def write_checked(directory: Path) -> None:
            peft.write_adapter(directory, state, self._engine.model, self._model_ref.source.lasting_name, "peft")
            check = check_export(self._engine, state, directory, self._owner)
            logger.info(
                "export %s: largest difference of logits on %d probe tokens: %.2g", name, check.tokens, check.difference
            )

        path = CheckpointKey(self.run_id, "external_weights", name)
        self.store.save_files(
            key=path,
            state=state,
            metadata=self._metadata(state, None),
            write=write,
            size_bytes=sum(array.nbytes for array in state.weights.values()),
            ttl_seconds=ttl_seconds,
        )
        self.observed.event("export", state.step, path=str(path))
        return path

    def save_if_needed(self) -> tuple[CheckpointKey, int] | None:
        """Write the adapter with its optimizer as it is now into the next slot, unless its steps are saved already.

        Requests of the run that have not finished do not count, and are not waited for.

        Returns:
            The path and the step, None if there was nothing to save.
        """
        with self._lock:
            held = self._engine.snapshot(None, self._adapter, optimizer=True).result()
            if held.version == self._saved:
                return None
            return self._autosave(held), held.step

    def save_for_eviction(self) -> tuple[CheckpointKey, int | None] | None:
        """Make sure that the run can continue exactly from a checkpoint that no one else deletes.

        Returns:
            The checkpoint, and the step if no one had saved it before.

        None, and nothing is written, while the run holds gradients, of which a checkpoint has none.
        """
        with self._lock:
            held = self._engine.snapshot(None, self._adapter, optimizer=True).result()
            if held.accumulating:
                return None
            new = held.step if held.version != self._saved else None
            if self._autosaved is not None and self._autosaved[1] == held.version:
                return self._autosaved[0], new
            return self._autosave(held), new

    def loaded(self, version: Version) -> None:
        """Take note that the adapter has saved weights, as this version."""
        self._saved = max(self._saved, version)

    def _autosave(self, held: Snapshot) -> CheckpointKey:
        path = self.write(held, "weights", SLOTS[self._autosaves % len(SLOTS)], overwrite=True)
        self._autosaves += 1
        self._autosaved = path, held.version
        return path

    def end(self, how: End, text: str = "", *, wait: bool = True) -> None:
        """Give back the adapter's memory, the run and the base model; ending again does nothing.

        Args:
            how: it ends, for the record.
            text: more about that.
            wait: for the end of the engine, if no one else uses the base model.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self.observed.end(how, text)
        self._engine.release(self._adapter)
        self._claim.release(how, text)
        if wait:
            self._model_ref.release()
        else:
            base_models.drop([settled(self._model_ref)])

    def _metadata(self, state: AdapterState, user_metadata: Mapping[str, str] | None) -> dict[str, object]:
        return api_records.checkpoint_metadata(
            self._model_ref.source.lasting_name,
            self._model_ref.model.fingerprint,
            self.spec,
            step=state.step,
            optimizer=None if state.mu is None else self._optimizer(),
            user_metadata=user_metadata,
        )

    def _optimizer(self) -> dict[str, object]:
        settings: dict[str, object] = {} if self.optimizer_config is None else asdict(self.optimizer_config)
        return {"name": "adamw"} | settings
