"""What does a checkpoint say about itself, and how is it shown in the API's types?

The store keeps each record's `metadata` without knowing it. Here is what the runs put in and read back.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tinker import types

from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from jax_client.values import CheckpointKey, LoraSpec
from jax_client.weights.read.source import mended_name

if TYPE_CHECKING:
    from jax_client.checkpoint.record import Record
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.weights.read.source import ModelSource

_TYPES: dict[str, types.CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def checkpoint_metadata(
    base_model: str,
    base_fingerprint: str,
    spec: LoraSpec,
    *,
    step: int,
    optimizer: Mapping[str, object] | None,
    user_metadata: Mapping[str, str] | None,
) -> dict[str, object]:
    """Return what a checkpoint must know for `create_training_client_from_state` and for the listings.

    Args:
        base_model: the `ModelSource.lasting_name` of its files.
        base_fingerprint: of its weights.
        spec: of the adapter.
        step: optimizer steps taken.
        optimizer: the settings of the last one, None if the optimizer's state is not part of the checkpoint.
        user_metadata: kept with it.
    """
    return {
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
        "spec": spec.to_json(),
        "step": step,
        "optimizer": None if optimizer is None else dict(optimizer),
        "user_metadata": None if user_metadata is None else dict(user_metadata),
    }


def base_model(metadata: Mapping[str, Any]) -> str:
    """Return the base model's name from what was recorded of a checkpoint or a run."""
    return mended_name(metadata["base_model"])


def saved_spec(record: Record) -> LoraSpec:
    """Return the adapter configuration of a checkpoint."""
    return LoraSpec.from_json(record.metadata["spec"])


def check_base_model(record: Record, source: ModelSource, fingerprint: str) -> None:
    """Raise BadRequestError unless the checkpoint belongs to the base weights of this fingerprint."""
    if record.metadata["base_fingerprint"] != fingerprint:
        raise BadRequestError(
            f"checkpoint {record.key} was trained on {base_model(record.metadata)!r}, but this is {source.name!r} "
            f"from {source.path}, whose weights differ; nothing was loaded. Leave base_model out, or give "
            "the one it was trained on; if it is, its files were changed since: put them back."
        )


def check_adapter(record: Record, source: ModelSource, fingerprint: str, spec: LoraSpec) -> None:
    """Raise BadRequestError unless the checkpoint fits into an adapter of `spec` on this base model."""
    check_base_model(record, source, fingerprint)
    saved = saved_spec(record)
    if _shape(saved) != _shape(spec):
        raise BadRequestError(
            f"checkpoint {record.key} does not fit into this client; nothing was loaded.\n"
            f"  checkpoint: {_shape(saved)}\n  client:     {_shape(spec)}\n"
            "Use create_training_client_from_state, which takes the configuration from the checkpoint."
        )


def check_optimizer(record: Record) -> None:
    """Raise BadRequestError unless the checkpoint holds the optimizer's state."""
    if not record.metadata.get("optimizer"):
        raise BadRequestError(
            f"checkpoint {record.key} has weights only, Adam's moments are missing; nothing was loaded. "
            "Use load_state or create_training_client_from_state, which start a fresh optimizer."
        )


def _shape(spec: LoraSpec) -> str:
    return (
        f"rank={spec.rank}, train_attn={spec.train_attn}, train_mlp={spec.train_mlp}, "
        f"train_unembed={spec.train_unembed}"
    )


def copy_into_project(store: CheckpointStore, source: CheckpointKey, project_id: str, ttl: int | None) -> CheckpointKey:
    """Copy a checkpoint into a new run of a project, and return where it is."""
    try:
        fields = store.run(source.run_id)
    except (NotFoundError, RequestFailedError):  # not there, or damaged; its checkpoints tell enough
        saved = store.record(source).metadata
        fields = {"base_model": base_model(saved), "spec": saved["spec"]}
    session_id = str(uuid.uuid4())
    run_id = f"{session_id}:train:0"
    store.copy(source, to_run=run_id, ttl_seconds=ttl)
    now = {"session_id": session_id, "created": time.time(), "project_id": project_id}
    store.put_run(run_id, {**fields, **now})
    return replace(source, run_id=run_id)


def checkpoint(record: Record) -> types.Checkpoint:
    """Show a record as the API does."""
    return types.Checkpoint(
        checkpoint_id=record.key.checkpoint_id,
        checkpoint_type=_TYPES[record.kind],
        time=datetime.fromtimestamp(record.created, UTC),
        tinker_path=str(record.key),
        size_bytes=record.size_bytes,
        user_metadata=record.metadata.get("user_metadata"),
        expires_at=None if record.expires_at is None else datetime.fromtimestamp(record.expires_at, UTC),
        public=record.public,
    )


def run_metadata(
    *,
    session_id: str,
    base_model: str,
    spec: LoraSpec,
    user_metadata: Mapping[str, str] | None,
    project_id: str | None,
    display_name: str | None,
    session_metadata: Mapping[str, str] | None,
    script: str | None = None,
    resumed_from: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the record of a training run; `settings` are the engine's, `resumed_from` is a checkpoint's path.

    A name of the script that the metadata has goes before `script`: over the wire, only the client may know it.
    """
    said = {**(session_metadata or {}), **(user_metadata or {})}
    return {
        "session_id": session_id,
        "base_model": base_model,
        "spec": spec.to_json(),
        "created": time.time(),
        "user_metadata": None if user_metadata is None else dict(user_metadata),
        "project_id": project_id,
        "display_name": display_name,
        "session_metadata": None if session_metadata is None else dict(session_metadata),
        "script": said.get("script") or script,
        "resumed_from": resumed_from,
        "settings": None if settings is None else dict(settings),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def training_run(run_id: str, metadata: Mapping[str, Any], records: list[Record]) -> types.TrainingRun:
    """Show a run and its newest checkpoints as the API does."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r.created):
        newest[record.kind] = record
    last = max([metadata["created"], *(record.created for record in records)])
    training, sampler = newest.get("weights"), newest.get("sampler_weights")
    return types.TrainingRun(
        training_run_id=run_id,
        base_model=base_model(metadata),
        model_owner="local",
        is_lora=True,
        lora_rank=metadata["spec"]["rank"],
        last_request_time=datetime.fromtimestamp(last, UTC),
        last_checkpoint=None if training is None else checkpoint(training),
        last_sampler_checkpoint=None if sampler is None else checkpoint(sampler),
        user_metadata=metadata.get("user_metadata"),
    )
