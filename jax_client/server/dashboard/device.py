"""What does the page show of the devices? What the engines of this process say, and the newest points of open runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax_client.errors import NotFoundError
from jax_client.runs.overview.records import OPEN
from jax_client.server.dashboard.source import Source
from jax_client.values import JsonObject

# Runs whose points are shown, of those that are open; compiles that are shown.
MOST_RUNS, MOST_COMPILES = 8, 200


class Devices:
    """The devices as the page shows them. Thread-safe.

    Args:
        source: the runs.
        engines: `engines() -> what each engine of this process says`; None where the viewer may see none of it.
    """

    def __init__(self, source: Source, engines: Callable[[], Sequence[JsonObject]] | None) -> None:
        self._source = source
        self._engines = engines

    def shown(self, rows: Sequence[JsonObject] | None = None) -> JsonObject:
        """Return engines, hosts, points and compiles; reads files.

        Args:
            rows: the runs, where they are known already.
        """
        engines = [] if self._engines is None else [_shortened(engine) for engine in self._engines()]
        points: dict[str, JsonObject] = {}
        compiles: list[JsonObject] = []
        if self._engines is not None:
            found = rows if rows is not None else [row.to_json() for row in self._source.runs()]
            for row in [row for row in found if row.get("state") in OPEN][:MOST_RUNS]:
                self._add(str(row["run"]), points, compiles)
        compiles.sort(key=lambda each: each["time"])
        hosts = [host for engine in engines for host in engine.get("hosts") or []]
        return {"engines": engines, "hosts": hosts, "points": points, "compiles": compiles[-MOST_COMPILES:]}

    def _add(self, run: str, points: dict[str, JsonObject], compiles: list[JsonObject]) -> None:
        try:
            found = self._source.device(run, most=MOST_COMPILES)
        except NotFoundError:
            return
        if found["point"] is not None:
            points[run] = found["point"]
        compiles += [{"run": run, **each} for each in found["compiles"]]


def _shortened(engine: JsonObject) -> JsonObject:
    """Return what an engine says with its newest compiles only."""
    compiled = engine.get("compiled")
    return engine | {"compiled": compiled[-MOST_COMPILES:]} if isinstance(compiled, list) else engine
