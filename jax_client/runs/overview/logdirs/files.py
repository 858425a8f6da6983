"""Which log directories are there, and what did their loops write? Each has a metrics.jsonl, as the cookbook writes it.

The files are other programs', perhaps hostile: nothing outside of the directory is opened, a link is not followed, and
a line that is broken, too long or full of names costs its own values alone. A file is read once, from where the last
read ended.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jax_client.metrics.store import MAX_STEP
from jax_client.metrics.summary import CURVE, Summary
from jax_client.runs.overview.columns import Columns
from jax_client.runs.overview.small_file import file_stamp
from jax_client.values import JsonObject

METRICS = "metrics.jsonl"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints.jsonl"
ITERATION = "iteration_"
MAX_DEPTH = 4
MAX_DIRECTORIES = 5_000
MAX_LOGS = 1_000
MAX_LINE = 2**20
MAX_KEYS = 512
MAX_NAME = 200
MAX_CONFIG = 2**20
CHUNK = 2**20
# Of the beginning of a file and of what was read last: where they differ now, the file was written anew.
ENDS = 512
# A larger file is looked at in places for a list: its end, and some lines on the way there.
WHOLE_BYTES = 2**20
TAIL_BYTES = 2**17
SAMPLE_BYTES = 2**13
MAX_CHECKPOINTS = 2**22
# Whose path would be another route's.
_ROUTES = ("series", "series.csv", "rollouts", "note")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogDirectory:
    """One log directory: its name below the root, and where it is."""

    name: str
    path: Path
    root: Path


def find_logs(roots: Sequence[Path]) -> list[LogDirectory]:
    """Return the directories at or below the roots that have a metrics.jsonl; links are not followed."""
    found: dict[str, LogDirectory] = {}
    for root in roots:
        real = root.resolve()
        for path in _directories(real):
            relative = path.relative_to(real).as_posix()
            name = printable(real.name if relative == "." else relative)
            if name in found:
                name = printable(f"{real.name}/{relative}")
            if "/" in name and name.rpartition("/")[2] in _ROUTES:
                name = f"{name}#1"
            number = 2
            base = name
            while name in found:
                name, number = f"{base}#{number}", number + 1
            found[name] = LogDirectory(name=name, path=path, root=real)
            if len(found) >= MAX_LOGS:
                return list(found.values())
    return list(found.values())


def _directories(root: Path) -> Iterator[Path]:
    waiting, seen = [(root, 0)], 0
    while waiting and seen < MAX_DIRECTORIES:
        directory, depth = waiting.pop(0)
        seen += 1
        with suppress(OSError), os.scandir(directory) as entries:
            names = sorted(entries, key=lambda entry: entry.name)
            if any(entry.name == METRICS and entry.is_file(follow_symlinks=False) for entry in names):
                yield directory
            if depth < MAX_DEPTH:
                below = [
                    e for e in names if not e.name.startswith((".", ITERATION)) and e.is_dir(follow_symlinks=False)
                ]
                waiting += [(Path(entry.path), depth + 1) for entry in below]


def printable(text: str) -> str:
    """Return a name without characters that move a cursor or cannot be encoded, and not too long."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:MAX_NAME]


def open_inside(root: Path, path: Path) -> int | None:
    """Open a regular file below a resolved root for reading; None for anything else, such as a link or a pipe."""
    if not path.parent.resolve().is_relative_to(root):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def read_bounded(root: Path, path: Path, most: int) -> bytes:
    """Return the bytes of a regular file below a root, b"" where there is none or it has more than `most`."""
    descriptor = open_inside(root, path)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return b"" if os.fstat(file.fileno()).st_size > most else file.read(most)


def read_object(root: Path, path: Path, most: int = MAX_CONFIG) -> JsonObject:
    """Return the JSON object in a file below a root, {} for anything else."""
    with suppress(ValueError, RecursionError):
        found = json.loads(read_bounded(root, path, most) or b"{}")
        if isinstance(found, dict):
            return found
    return {}


def parse_row(line: bytes) -> tuple[int | None, dict[str, float], int] | None:
    """Return the step, the finite metrics, and the number of values that were not finite; None for a broken line.

    A step beyond +-MAX_STEP counts as one that is not finite.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    metrics: dict[str, float] = {}
    bad = 0
    for name, value in row.items():
        kind = type(value)
        if (kind is not float and kind is not int) or len(metrics) >= MAX_KEYS:
            continue
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            metrics[name if len(name) <= MAX_NAME else name[:MAX_NAME]] = number
        else:
            bad += 1
    step = metrics.pop("step", None)
    if step is not None and abs(step) > MAX_STEP:
        step, bad = None, bad + 1
    if bad:
        metrics["nonfinite/values"] = bad
    return None if step is None else int(step), metrics, bad


class LogFile:
    """The metrics.jsonl of a log directory. Not thread-safe: its user holds its lock.

    Args:
        log: the directory.

    Attributes:
        columns: what was read so far.
        broken: lines that are no JSON object, or too long.
        lock: of its user.
    """

    def __init__(self, log: LogDirectory) -> None:
        self.log = log
        self.path = log.path / METRICS
        self.lock = threading.Lock()
        self.columns = Columns()
        self.broken = 0
        self._begin(None)

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        return self.columns.values

    def _begin(self, inode: int | None) -> None:
        self.columns, self.broken = Columns(), 0
        self._inode = inode
        self._offset = 0
        self._head = self._tail = self._rest = b""
        self._skipping = False
        self._rows = 0
        self._mark = 0
        self._step = 0
        self._seconds = 0.0
        self._started = self.started()

    def started(self) -> float:
        """Return about when its loop began: the cookbook writes its configuration first."""
        stamps = [file_stamp(self.log.path / CONFIG), file_stamp(self.path)]
        return min((stamp[2] / 1e9 for stamp in stamps if stamp is not None), default=math.nan)

    def update(self) -> bool:
        """Read what was written since the last time; all of it where the file was replaced, cut or written anew.

        Returns:
            Whether the file can be read. Where not, what was read before stays.
        """
        try:
            descriptor = open_inside(self.log.root, self.path)
            if descriptor is None:
                return False
            with os.fdopen(descriptor, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode or not self._is_continued(file.fileno()):
                    self._begin(inode)
                file.seek(self._offset)
                while chunk := file.read(CHUNK):
                    # Of what was read, not read again: it may be overwritten meanwhile.
                    self._head += chunk[: max(0, ENDS - self._offset)]
                    self._tail = (self._tail + chunk)[-ENDS:]
                    self._offset += len(chunk)
                    self._take(chunk)
        except OSError:
            return False
        return True

    def _is_continued(self, descriptor: int) -> bool:
        """Return whether a file still has what was read of it, at its beginning and where reading ended."""
        ends = ((self._head, 0), (self._tail, self._offset - len(self._tail)))
        return all(os.pread(descriptor, len(end), start) == end for end, start in ends)

    def _take(self, chunk: bytes) -> None:
        *lines, rest = chunk.split(b"\n")
        if lines:
            first, self._rest = self._rest + lines[0], b""
            if not self._skipping:
                self._add(first)
            self._skipping = False
            for line in lines[1:]:
                self._add(line)
        if not self._skipping:
            self._rest += rest
            if len(self._rest) > MAX_LINE:
                self._rest, self._skipping = b"", True
                self.broken += 1

    def _add(self, line: bytes) -> None:
        if not line or line.isspace():
            return
        row = parse_row(line) if len(line) <= MAX_LINE else None
        if row is None:
            self.broken += 1
            return
        step, metrics, _ = row
        self._rows += 1
        # Of all rows so far: two files have the mark of one row where they are the same up to there.
        self._mark = zlib.crc32(line, self._mark)
        self._step = self._step if step is None else step
        self._seconds += metrics.get("time/total", 0.0)
        time = self._started + self._seconds if self._seconds else math.nan
        self.columns.add(self._rows, "user", self._step, time, metrics, mark=self._mark)

    def glance(self) -> Summary:
        """Return a summary of the file; of a large one from its end and some lines on the way there."""
        summary = Summary()
        descriptor = open_inside(self.log.root, self.path)
        if descriptor is not None:
            with os.fdopen(descriptor, "rb") as file:
                _look(file.fileno(), os.fstat(file.fileno()), summary, self.started())
        return summary


def _look(descriptor: int, status: os.stat_result, summary: Summary, started: float) -> None:
    size, modified = status.st_size, status.st_mtime
    # Beginning and length of each part, and how many of its lines are wanted.
    parts: Sequence[tuple[int, int, int | None]] = [(0, size, None)]
    if size > WHOLE_BYTES:
        stride = (size - TAIL_BYTES) // CURVE
        parts = [(stride * i, SAMPLE_BYTES, 1) for i in range(CURVE)] + [(size - TAIL_BYTES, TAIL_BYTES, None)]
    step = 0
    for start, length, wanted in parts:
        lines = os.pread(descriptor, length, start).split(b"\n")
        # What stands between two ends of lines is whole.
        for line in lines[1 if start else 0 : -1][:wanted]:
            if (row := parse_row(line)) is not None:
                step = step if row[0] is None else row[0]
                summary.add_point("user", step, modified, row[1])
    if math.isfinite(started):
        summary.first = started


def saved_paths(log: LogDirectory) -> list[str]:
    """Return the tinker:// paths that its loop saved, in their order."""
    found: list[str] = []
    for line in read_bounded(log.root, log.path / CHECKPOINTS, MAX_CHECKPOINTS).split(b"\n"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                paths = (record.get(name) for name in ("state_path", "sampler_path"))
                found += [path for path in paths if isinstance(path, str)]
    return found
