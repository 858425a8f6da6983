"""Where else do a run's metrics and alerts go? To the trackers and the address that its settings name."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from jax_client.metrics.exports import KINDS, Exports, RunFacts
from jax_client.metrics.store import Point
from jax_client.runs.results.alert_poster import AlertPoster
from jax_client.values import JsonObject

LOOK_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporting:
    """Where a run's metrics and alerts go.

    Attributes:
        name: of the run, for people.
        config: how it was made, for trackers.
        trackers: names of `host.reporting.TRACKERS`.
        webhook: an address, None for none.
    """

    name: str = ""
    config: JsonObject = field(default_factory=dict)
    trackers: tuple[str, ...] = ()
    webhook: str | None = None


NOWHERE = Reporting()


class Reports:
    """The trackers and addresses of this process. Thread-safe; no method waits, but for `flush`."""

    def __init__(self) -> None:
        self._exports = Exports()
        self._lock = threading.Lock()
        self._posters: dict[str, AlertPoster] = {}
        self._looked: dict[str, float] = {}

    def point(self, reporting: Reporting, state_dir: Path, point: Point) -> None:
        """Hand a point on."""
        if reporting.trackers and point.kind in KINDS:
            facts = RunFacts(run=point.run, name=reporting.name, config=reporting.config, state_dir=state_dir)
            for export in self._exports.of(reporting.trackers):
                export.put(facts, point.step, point.time, point.metrics)

    def look(self, reporting: Reporting, path: Path, run: str) -> None:
        """Have the alerts of a run posted, where that is wanted and was not done just now."""
        if reporting.webhook is None or time.monotonic() - self._looked.get(run, -LOOK_SECONDS) < LOOK_SECONDS:
            return
        self._looked[run] = time.monotonic()
        with self._lock:
            poster = self._posters.setdefault(reporting.webhook, AlertPoster(reporting.webhook))
        poster.look(path, run, reporting.name)

    def ended(self, reporting: Reporting, state_dir: Path, run: str) -> None:
        """Finish a run."""
        self._looked.pop(run, None)
        facts = RunFacts(run=run, name=reporting.name, config=reporting.config, state_dir=state_dir)
        for export in self._exports.of(reporting.trackers):
            export.end(facts)

    def flush(self) -> None:
        """Wait until all that was handed on so far has arrived, some seconds at most."""
        self._exports.flush()

    def end(self) -> None:
        """Have every thread end; do not wait for it."""
        self._exports.end()
        for poster in list(self._posters.values()):
            poster.end()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process."""
        self._lock = threading.Lock()
        self._exports.restart_in_fork()
        for poster in self._posters.values():
            poster.restart_in_fork()
