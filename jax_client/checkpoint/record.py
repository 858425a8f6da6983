"""What does a caller learn of a checkpoint? A `Record` has what its manifest and its tags say."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from jax_client.checkpoint.disk.clock import unix_seconds
from jax_client.checkpoint.manifest import Manifest, split_key
from jax_client.checkpoint.tags import Tags
from jax_client.values import CheckpointKey, JsonObject, Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One checkpoint.

    Attributes:
        key: its run, kind and name.
        created: unix seconds; 0.0 where the manifest gives no time.
        step: optimizer steps taken.
        size_bytes: on disk.
        metadata: what the saver gave, JSON.
        expires_at: unix seconds, None for never.
        public: as `set_public` left it.
    """

    key: CheckpointKey
    created: float
    step: int
    size_bytes: int
    metadata: JsonObject
    expires_at: float | None = None
    public: bool = False

    @property
    def run_id(self) -> str:
        """The run of the key."""
        return self.key.run_id

    @property
    def kind(self) -> Kind:
        """The kind of the key."""
        return self.key.kind

    @property
    def name(self) -> str:
        """The name of the key."""
        return self.key.name

    def to_json(self) -> JsonObject:
        """Return the record as JSON has it, its key as three fields."""
        fields = asdict(self)
        return fields.pop("key") | fields

    @classmethod
    def from_json(cls, fields: JsonObject) -> Record:
        """Undo `to_json`."""
        key, others = split_key(fields)
        times = {"created": unix_seconds(others["created"]) or 0.0, "expires_at": unix_seconds(others["expires_at"])}
        return cls(key=key, **others | times)

    @classmethod
    def of(cls, manifest: Manifest, tags: Tags) -> Record:
        """Return the record of a checkpoint that has this manifest and these tags."""
        return cls(
            key=manifest.key,
            created=unix_seconds(manifest.created) or 0.0,
            step=manifest.step,
            size_bytes=manifest.size_bytes,
            metadata=dict(manifest.metadata),
            expires_at=None if tags.expires is None else unix_seconds(tags.expires.wall),
            public=tags.public,
        )
