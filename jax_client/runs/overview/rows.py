"""How does each run do? `Overview` reads a state directory and log directories, for a page, a command or a program.

It reads what is there and writes nothing. A list of runs costs one summary of each, whatever they have recorded.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from jax_client.checkpoint.disk.clock import unix_seconds
from jax_client.checkpoint.disk.names import run_directory
from jax_client.checkpoint.disk.run_lock import LockRecord
from jax_client.checkpoint.record import Record
from jax_client.checkpoint.state_directory import OWNER
from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import default_mirror
from jax_client.errors import NotFoundError, RequestFailedError, UnsupportedError, shown
from jax_client.host.disk import free_share
from jax_client.metrics.store import FILE_NAME, MetricsStore
from jax_client.metrics.summary import Summary
from jax_client.runs.overview.alerts import alerts_of
from jax_client.runs.overview.checkpoints import SAVES, checkpoint_rows
from jax_client.runs.overview.columns import MAX_VALUES, Table, forget_oldest
from jax_client.runs.overview.described import children as children_of
from jax_client.runs.overview.described import model_of, origin, rank_of, run_name, run_of, spark_of
from jax_client.runs.overview.logdirs.rows import Logs
from jax_client.runs.overview.notes import FILE_NAME as NOTES
from jax_client.runs.overview.notes import Note, Notes
from jax_client.runs.overview.records import OPEN, CheckpointRow, RunRow, Series
from jax_client.runs.overview.run_points import RunPoints
from jax_client.runs.overview.small_file import file_stamp
from jax_client.runs.overview.states import condition
from jax_client.runs.overview.verified import FILE_NAME as VERIFIED
from jax_client.runs.overview.verified import Verified
from jax_client.sqlite_file import LOG
from jax_client.values import JsonObject, Owner, is_run_id

# Runs whose points stay in memory: those that pages show and compare; and the numbers of all of them, of which one run
# has at most MAX_VALUES.
MOST_POINTS, MOST_VALUES = 64, 8 * MAX_VALUES
# How often the token of `changed` differs for the time alone: a process may die without a trace in any file.
OPEN_SECONDS, CLOSED_SECONDS = 5.0, 60.0
# Runs whose directories `changed` looks at, the newest.
MOST_WATCHED = 64
POINTS = 2_000


class Overview:
    """What can be seen of the runs of a state directory. Thread-safe.

    Args:
        state_dir: where runs and checkpoints are; it need not be there.
        logs: directories below which loops write metrics.jsonl.
        owner: whose runs there are; None is for all. Log directories have no owner: they are for None and an admin.
        store: with that state directory and that owner, instead of a new one.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        logs: Sequence[Path] = (),
        owner: Owner | None = None,
        store: CheckpointStore | None = None,
    ) -> None:
        self.state_dir = Path(state_dir).absolute()
        self._store = store or CheckpointStore(self.state_dir, default_mirror(), owner)
        self._metrics = MetricsStore(self.state_dir / FILE_NAME)
        self._notes = Notes(self.state_dir)
        self._verified = Verified(self.state_dir)
        self._logs = Logs(logs if owner is None or owner.admin else ())
        self._lock = threading.Lock()
        self._points: OrderedDict[str, RunPoints] = OrderedDict()
        self._open = False
        self._watched: list[Path] = []

    def runs(self) -> list[RunRow]:
        """Return every run, that with the newest sign of life first."""
        saved: dict[str, list[Record]] = {}
        for record in self._store.list():
            saved.setdefault(record.run_id, []).append(record)
        described = dict(self._store.runs())
        rows = [*self._rows({*described, *saved}, described, saved), *self._logs.rows(self._notes)]
        rows.sort(key=lambda row: (row.updated or row.created or 0.0, row.run), reverse=True)
        self._remember(rows)
        return rows

    def run(self, run_id: str) -> RunRow:
        """Return one run; that costs less than all of them. Raises NotFoundError."""
        if (row := self._logs.row(run_id, self._notes)) is not None:
            return row
        if not is_run_id(run_id):
            raise _not_found(run_id)
        described, records = dict(self._store.runs()), self._store.list(run_id)
        if run_id not in described and not records:
            raise _not_found(run_id)
        return self._rows({run_id}, described, {run_id: records})[0]

    def _rows(
        self, runs: Collection[str], described: Mapping[str, JsonObject], saved: Mapping[str, Sequence[Record]]
    ) -> list[RunRow]:
        now, free, summaries = time.time(), free_share(self.state_dir), self._metrics.summaries()
        resumed = children_of({run: origin(fields) for run, fields in described.items()})
        return [
            self._row(
                run,
                described.get(run, {}),
                saved.get(run, []),
                summaries.get(run),
                resumed.get(run, ()),
                now=now,
                free=free,
            )
            for run in runs
        ]

    def config(self, run_id: str) -> JsonObject:
        """Return what is known of how a run was made. Raises NotFoundError."""
        if (config := self._logs.config(run_id)) is not None:
            return config
        row = self.run(run_id)
        fields = dict(self._store.runs()).get(run_id, {})
        start = next((dict(event.details) for event in self._metrics.events(("start",), run_id)), {})
        return {
            "model": row.model,
            "rank": row.rank,
            "spec": fields.get("spec"),
            "settings": fields.get("settings"),
            "script": row.script,
            "user_metadata": row.user_metadata,
            "session_metadata": fields.get("session_metadata"),
            "project_id": fields.get("project_id"),
            "resumed_from": row.resumed_from,
            "start": start,
        }

    def series(
        self, run_id: str, names: Collection[str] | None, *, points: int = POINTS, since: str | None = None
    ) -> Series:
        """Return the points and events of a run after a cursor.

        Args:
            run_id: of the run.
            names: of the metrics; None is for all.
            points: at most about this number of each name, its first, last, smallest and largest among them.
            since: the `next` of an earlier answer, None for all. Where the file was begun anew since then, the answer
                has everything and `reset`; where it cannot be read, `next` is `since`.

        Raises:
            NotFoundError: there is no such run.
        """
        if (found := self._logs.series(run_id, names, points=points, since=since)) is not None:
            return found
        lock = self._checked(run_id)
        return self._run_points(run_id).series(names, points=points, since=since, live=lock is not None and lock.held)

    def table(self, run_id: str, names: Collection[str] | None, *, without: Collection[str] = ()) -> Table:
        """Return every point of a run that is kept, in rows, without copying them.

        Args:
            run_id, names: as of `series`.
            without: kinds of points that are left out.

        Raises:
            NotFoundError: there is no such run.
        """
        if (found := self._logs.table(run_id, names)) is not None:
            return found
        self._checked(run_id)
        return self._run_points(run_id).table(names, without=without)

    def _checked(self, run_id: str) -> LockRecord | None:
        """Return the lock of a run. Raises NotFoundError."""
        if not is_run_id(run_id) or not self._store.has_run(run_id):
            raise _not_found(run_id)
        lock = self._lock_record(run_id)
        if lock is None and not any(run_id == run for run, _ in self._store.runs()):
            self.run(run_id)  # raises, unless checkpoints are all that is left of it
        return lock

    def device(self, run_id: str, *, most: int) -> JsonObject:
        """Return {"point", "compiles"}: the newest point of a run's devices, None without one, and `most` compiles."""
        found = self._metrics.latest(run_id, point="device", event="compile", most=most)
        return {"point": found["point"], "compiles": found["events"]}

    def checkpoints(self, run_id: str | None = None) -> list[CheckpointRow]:
        """Return the checkpoints of a run, or of all, the newest first. Raises NotFoundError for an unknown run."""
        if run_id is not None and self._logs.has(run_id):
            return []
        if run_id is not None and not is_run_id(run_id):
            raise _not_found(run_id)
        records = self._store.list(run_id)
        described = dict(self._store.runs())
        if run_id is not None and run_id not in described and not records:
            raise _not_found(run_id)
        parents = {run: origin(fields) for run, fields in described.items()}
        return checkpoint_rows(records, self._metrics.events(SAVES, run_id), parents, self._verified)

    def rollouts(self, run_id: str, *, offset: int, limit: int) -> JsonObject:
        """Return groups of rollouts of a log directory, those of the newest step first. Raises NotFoundError."""
        found = self._logs.rollouts(run_id, offset=offset, limit=limit)
        if found is None:
            self.run(run_id)
            return {"groups": [], "total": 0}
        return found

    def note(self, run_id: str) -> Note:
        """Return what a person has written beside a run. Raises NotFoundError."""
        self.run(run_id)
        return self._notes.of(run_id)

    def put_note(self, run_id: str, note: Note) -> None:
        """Replace what a person has written beside a run. Raises NotFoundError, and as `Notes.put`."""
        self.run(run_id)
        self._notes.put(run_id, note)

    def changed(self) -> str:
        """Return a text that differs when runs, points, events or checkpoints may differ; it costs little."""
        names = (FILE_NAME, FILE_NAME + LOG, NOTES, VERIFIED, "runs")
        with self._lock:
            watched, seconds = self._watched, OPEN_SECONDS if self._open else CLOSED_SECONDS
        stamps = [file_stamp(path) for path in (*(self.state_dir / name for name in names), *watched)]
        return f"{hash((*stamps, int(time.time() // seconds))) & (2**64 - 1):016x}"

    def _remember(self, rows: Sequence[RunRow]) -> None:
        own = [row for row in rows if row.source == "run"][:MOST_WATCHED]
        runs = self.state_dir / "runs"
        folders = [run_directory(runs, row.run) for row in own]
        paths = [path for folder in folders for path in (folder, folder / "weights", folder / "sampler_weights")]
        with self._lock:
            self._open = any(row.state in OPEN for row in rows)
            self._watched = [*paths, *self._logs.files()]

    def _run_points(self, run_id: str) -> RunPoints:
        with self._lock:
            found = self._points.pop(run_id, None) or RunPoints(run_id, self._metrics, self.state_dir / FILE_NAME)
            self._points[run_id] = found
            forget_oldest(self._points, MOST_POINTS, MOST_VALUES)
        return found

    def _lock_record(self, run_id: str) -> LockRecord | None:
        try:
            return self._store.lock_record(run_id)
        except (RequestFailedError, UnsupportedError):  # a file system without locks hides no run
            return None

    def _row(
        self,
        run_id: str,
        fields: JsonObject,
        records: Sequence[Record],
        summary: Summary | None,
        children: Sequence[str],
        *,
        now: float,
        free: float | None,
    ) -> RunRow:
        lock = self._lock_record(run_id)
        found, last = condition(lock, summary, now), records[-1] if records else None
        metadata = fields or (last.metadata if last else {})
        saved = min(record.created for record in records) if records else None
        created = unix_seconds(fields.get("created")) or saved
        signs = [created, found.ended, summary and unix_seconds(summary.active), last and last.created]
        updated = max((time for time in signs if time is not None), default=None)
        is_open = found.state in OPEN
        figures = summary or Summary()
        note, source = self._notes.of(run_id), origin(fields)
        until = now if is_open else found.ended or updated
        return RunRow(
            run=run_id,
            source="run",
            name=run_name(run_id, fields, created),
            script=fields.get("script"),
            model=model_of(metadata),
            rank=rank_of(metadata),
            state=found.state,
            reason=found.reason,
            created=created,
            updated=updated,
            ended=None if is_open else found.ended,
            # Whatever was saved: it may have gone back to an older checkpoint.
            step=summary.step if summary else last and last.step,
            loss=figures.loss,
            reward=figures.reward,
            tokens=int(figures.tokens) if figures.steps and math.isfinite(figures.tokens) else None,
            tokens_per_second=figures.speed,
            wall_seconds=None if until is None or created is None else max(0.0, until - created),
            disk_bytes=sum(record.size_bytes for record in records),
            checkpoints=len(records),
            last_checkpoint=None if last is None else str(last.key),
            last_saved=None if last is None else last.created,
            resumed_from=source,
            parent=run_of(source),
            children=children,
            pid=None if lock is None else lock.pid,
            host=None if lock is None else lock.host,
            key=metadata.get(OWNER),
            **spark_of(figures),
            alerts=alerts_of(figures, is_open=is_open, now=now, free=free),
            **note.to_json(),
            user_metadata=fields.get("user_metadata"),
        )


def _not_found(run_id: str) -> NotFoundError:
    return NotFoundError(f"there is no run {shown(run_id)}; 'jax_client runs list' shows what is there.")
