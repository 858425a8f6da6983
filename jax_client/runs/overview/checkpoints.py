"""What can be done with each checkpoint, where does it come from, and how good was the run when it was saved?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from jax_client.checkpoint.record import Record
from jax_client.metrics.store import Event
from jax_client.runs.overview.records import CheckpointRow
from jax_client.runs.overview.verified import Verified
from jax_client.values import CheckpointKey, JsonObject

SAVES = ("save", "autosave", "export")
AUTOSAVES = ("autosave-0", "autosave-1")
_RESUME = {
    "training": 'service_client.create_training_client_from_state_with_optimizer("{}")',
    "weights": 'service_client.create_training_client_from_state("{}")',
    "sampler": 'service_client.create_sampling_client(model_path="{}")',
    "export": 'service_client.create_rest_client().get_external_weights_urls("{}").result()',
}


def checkpoint_rows(
    records: Iterable[Record], events: Iterable[Event], parents: Mapping[str, str | None], verified: Verified
) -> list[CheckpointRow]:
    """Return the checkpoints, the newest first.

    Args:
        records: what the store has of them.
        events: of kinds SAVES, with the loss and the reward at the save.
        parents: by run, the checkpoint that it was made from.
        verified: what is known of them.
    """
    at_save: dict[str, Mapping[str, object]] = {str(event.details.get("path")): event.details for event in events}
    rows = [_row(record, at_save.get(str(record.key), {}), parents.get(record.run_id), verified) for record in records]
    return sorted(rows, key=lambda row: (row.created, row.path), reverse=True)


def _row(record: Record, at_save: Mapping[str, object], parent: str | None, verified: Verified) -> CheckpointRow:
    path = str(record.key)
    return CheckpointRow(
        path=path,
        run=record.run_id,
        kind=kind_of(record.key),
        name=record.name,
        step=record.step,
        loss=_number(at_save.get("loss")),
        reward=_number(at_save.get("reward")),
        size_bytes=record.size_bytes,
        created=record.created,
        expires_at=record.expires_at,
        public=record.public,
        verified=verified.of(path, record.created),
        parent=parent,
        resume=resume_line(record.key, record.metadata),
    )


def kind_of(key: CheckpointKey) -> Literal["training", "sampler", "autosave", "export"]:
    """Return what a checkpoint is for."""
    if key.kind == "weights":
        return "autosave" if key.name in AUTOSAVES else "training"
    return "sampler" if key.kind == "sampler_weights" else "export"


def resume_line(key: CheckpointKey, metadata: JsonObject) -> str:
    """Return one line of Python that trains on from a checkpoint, samples from it, or finds its files."""
    kind = kind_of(key)
    if kind in ("training", "autosave"):
        kind = "training" if metadata.get("optimizer") else "weights"
    return _RESUME[kind].format(key)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
