"""What do log directories look like among the runs? As rows, series and rollouts under the id "log:NAME"."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from jax_client.metrics.store import Cursor
from jax_client.runs.overview.alerts import alerts_of
from jax_client.runs.overview.columns import MAX_VALUES, Table, forget_oldest
from jax_client.runs.overview.described import run_of, spark_of
from jax_client.runs.overview.logdirs.files import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    LogDirectory,
    LogFile,
    find_logs,
    printable,
    read_object,
    saved_paths,
)
from jax_client.runs.overview.logdirs.rollouts import Rollouts
from jax_client.runs.overview.notes import Notes
from jax_client.runs.overview.records import RunRow, Series
from jax_client.runs.overview.run_points import parse_cursor, spelt
from jax_client.runs.overview.small_file import file_stamp
from jax_client.values import JsonObject

PREFIX = "log:"
# A directory tree is looked through no more often.
LOOK_SECONDS = 5.0
# Directories whose points stay in memory, and the numbers of all of them; whose rollouts do.
MOST_FILES, MOST_VALUES, MOST_ROLLOUTS = 64, 4 * MAX_VALUES, 4


class Logs:
    """The log directories below some roots. Thread-safe.

    Args:
        roots: where to look.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = list(roots)
        self._lock = threading.Lock()
        self._looked = 0.0
        self._known: dict[str, LogDirectory] = {}
        # A row is made anew where one of its files has changed.
        self._seen: dict[Path, tuple[tuple[str, tuple[object, ...]], RunRow]] = {}
        self._files: OrderedDict[Path, LogFile] = OrderedDict()
        self._rollouts: OrderedDict[Path, Rollouts] = OrderedDict()

    def _look(self) -> dict[str, LogDirectory]:
        """With the lock held: return the directories by id."""
        if self._roots and (not self._known or time.monotonic() - self._looked > LOOK_SECONDS):
            self._known = {PREFIX + log.name: log for log in find_logs(self._roots)}
            self._looked = time.monotonic()
            paths = {log.path for log in self._known.values()}
            self._seen = {path: row for path, row in self._seen.items() if path in paths}
        return self._known

    def has(self, run_id: str) -> bool:
        """Return whether an id is a log directory's."""
        with self._lock:
            return run_id in self._look()

    def files(self) -> list[Path]:
        """Return the metrics files that are known so far."""
        with self._lock:
            return [log.path / METRICS for log in self._known.values()]

    def rows(self, notes: Notes) -> list[RunRow]:
        """Return a row for each directory."""
        with self._lock:
            return [self._row(run_id, log, notes) for run_id, log in self._look().items()]

    def row(self, run_id: str, notes: Notes) -> RunRow | None:
        """Return the row of a directory; None for an id that is none of these."""
        with self._lock:
            log = self._look().get(run_id)
            return None if log is None else self._row(run_id, log, notes)

    def _row(self, run_id: str, log: LogDirectory, notes: Notes) -> RunRow:
        stamps = tuple(file_stamp(log.path / name) for name in (METRICS, CONFIG, CHECKPOINTS))
        known = self._seen.get(log.path)
        if known is None or known[0] != (run_id, stamps):
            known = self._seen[log.path] = (run_id, stamps), self._new_row(run_id, log)
        return replace(known[1], **notes.of(run_id).to_json())

    def _new_row(self, run_id: str, log: LogDirectory) -> RunRow:
        summary, config = LogFile(log).glance(), _config(log)
        saved = saved_paths(log)
        return RunRow(
            run=run_id,
            source="log",
            name=_text(config, "wandb_name", "run_name", "name") or log.name,
            model=_text(config, "model_name", "base_model", "model"),
            rank=_whole(config, "lora_rank", "rank"),
            reason=None if summary.active is None else "a log directory: whether its loop still runs is not known",
            created=summary.first,
            updated=summary.active,
            step=summary.step if summary.active is not None else None,
            loss=summary.loss,
            reward=summary.reward,
            wall_seconds=_span(summary.first, summary.active),
            last_checkpoint=saved[-1] if saved else None,
            parent=run_of(saved[-1]) if saved else None,
            **spark_of(summary),
            alerts=alerts_of(summary, is_open=False, now=time.time()),
        )

    def config(self, run_id: str) -> JsonObject | None:
        """Return the configuration that a loop wrote; None for an id that is none of these."""
        with self._lock:
            log = self._look().get(run_id)
        if log is None:
            return None
        config = _config(log)
        return {
            "model": _text(config, "model_name", "base_model", "model"),
            "rank": _whole(config, "lora_rank", "rank"),
            "settings": config,
            "directory": str(log.path),
            "checkpoints": saved_paths(log),
        }

    def series(self, run_id: str, names: Collection[str] | None, *, points: int, since: str | None) -> Series | None:
        """Return the points of a log directory after a cursor; None for an id that is none of these."""
        if (file := self._file(run_id)) is None:
            return None
        # A large file takes seconds, the first time; meanwhile others are read.
        with file.lock:
            is_readable, columns = file.update(), file.columns
            begin, newest = parse_cursor(since), Cursor(point=columns.newest())
            reset = since is not None and spelt(begin, columns.mark(begin.point)) != since
            if reset and not is_readable:
                return Series(run=run_id, names=columns.names(), next=since or "")
            return Series(
                run=run_id,
                series=columns.series(names, points=points, since=0 if reset else begin.point),
                names=columns.names(),
                next=spelt(newest, columns.mark(newest.point)) or "",
                reset=reset,
            )

    def table(self, run_id: str, names: Collection[str] | None) -> Table | None:
        """Return every point of a log directory; None for an id that is none of these."""
        if (file := self._file(run_id)) is None:
            return None
        with file.lock:
            file.update()
            return file.columns.table(names)

    def _file(self, run_id: str) -> LogFile | None:
        with self._lock:
            log = self._look().get(run_id)
            if log is None:
                return None
            file = self._files.pop(log.path, None) or LogFile(log)
            self._files[log.path] = file
            forget_oldest(self._files, MOST_FILES, MOST_VALUES)
        return file

    def rollouts(self, run_id: str, *, offset: int, limit: int) -> JsonObject | None:
        """Return a page of groups; None for an id that is none of these."""
        with self._lock:
            log = self._look().get(run_id)
            if log is None:
                return None
            found = self._rollouts.pop(log.path, None) or Rollouts(log)
            self._rollouts[log.path] = found
            while len(self._rollouts) > MOST_ROLLOUTS:
                self._rollouts.popitem(last=False)
        with found.lock:
            return found.page(offset, limit)


def _config(log: LogDirectory) -> JsonObject:
    return read_object(log.root, log.path / CONFIG)


def _text(config: JsonObject, *names: str) -> str | None:
    found = (config.get(name) for name in names)
    return next((printable(value) for value in found if isinstance(value, str) and value.strip()), None)


def _whole(config: JsonObject, *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def _span(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else max(0.0, last - first)
