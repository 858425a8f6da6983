"""What does the page read? A `Source`: the runs, series and checkpoints of one owner in one state directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from jax_client.values import JsonObject


class Shown(Protocol):
    """Something that the page shows as JSON."""

    def to_json(self) -> JsonObject:
        """Return its fields."""
        ...


class Source(Protocol):
    """What `runs.overview` gives. Thread-safe; its methods read files, all but `changed`, and raise NotFoundError."""

    def runs(self) -> Sequence[Shown]:
        """Return the runs, the newest activity first."""
        ...

    def run(self, run_id: str) -> Shown:
        """Return one run."""
        ...

    def config(self, run_id: str) -> JsonObject:
        """Return what is known of a run's settings."""
        ...

    def series(self, run_id: str, names: Collection[str] | None, *, points: int, since: str | None = None) -> Shown:
        """Return metrics and events of a run, thinned out to `points` of each metric, after a cursor."""
        ...

    def checkpoints(self, run_id: str | None = None) -> Sequence[Shown]:
        """Return the checkpoints of a run, or of all."""
        ...

    def rollouts(self, run_id: str, *, offset: int, limit: int) -> JsonObject:
        """Return groups of samples of a log directory."""
        ...

    def changed(self) -> str:
        """Return a text that differs when anything of it may differ; takes less than a millisecond."""
        ...
