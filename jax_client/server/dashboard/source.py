"""What does the page read? A `Source`: the runs, series and checkpoints of one owner in one state directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from jax_client.metrics.summary import OF_ENGINES
from jax_client.runs.overview.columns import Table
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

    def table(self, run_id: str, names: Collection[str] | None, *, without: Collection[str] = ()) -> Table:
        """Return every point of a run, but those of some kinds."""
        ...

    def device(self, run_id: str, *, most: int) -> JsonObject:
        """Return {"point", "compiles"}: the newest point of a run's devices, or None, and its newest compiles."""
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


def listed(row: Shown) -> JsonObject:
    """Return a run as lists have it: without a user's own metadata, which may be longer than all the rest."""
    return {name: value for name, value in row.to_json().items() if name != "user_metadata"}


@dataclass(frozen=True, slots=True)
class _Series:
    fields: JsonObject

    def to_json(self) -> JsonObject:
        return self.fields


class WithoutEngines:
    """A source that leaves out what engines do, as it is of all keys together.

    Args:
        source: of the runs of one key.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.runs, self.run, self.config = source.runs, source.run, source.config
        self.checkpoints, self.rollouts, self.changed = source.checkpoints, source.rollouts, source.changed

    def series(self, run_id: str, names: Collection[str] | None, *, points: int, since: str | None = None) -> Shown:
        """Return metrics and events of a run, but those of its engine."""
        found = self._source.series(run_id, names, points=points, since=since).to_json()
        series = {name: each for name, each in found["series"].items() if each["kind"] not in OF_ENGINES}
        events = [event for event in found["events"] if event["kind"] not in OF_ENGINES]
        return _Series({**found, "series": series, "names": self._names(run_id, found), "events": events})

    def table(self, run_id: str, names: Collection[str] | None, *, without: Collection[str] = ()) -> Table:
        """Return every point of a run, but those of its engine."""
        return self._source.table(run_id, names, without=(*without, *OF_ENGINES))

    def device(self, run_id: str, *, most: int) -> JsonObject:
        """Return nothing of a run's devices."""
        return {"point": None, "compiles": []}

    def _names(self, run_id: str, found: JsonObject) -> list[str]:
        whole = self._source.series(run_id, None, points=2).to_json()["series"]
        hidden = {name for name, each in whole.items() if each["kind"] in OF_ENGINES}
        return [name for name in found["names"] if name not in hidden]
