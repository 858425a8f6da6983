"""How do tests run a program on several hosts of this machine, and end one of them?"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")


def command(directory: Path, hosts: int, devices: int, case: str, mesh: dict[str, int], what: str) -> list[str]:
    """Return the command of a child; its directory is made."""
    directory.mkdir()
    return [sys.executable, str(CHILD), str(hosts), str(devices), json.dumps(mesh), case, str(directory), what]


def run_numbers(directory: Path, hosts: int, devices: int, case: str, mesh: dict[str, int]) -> dict[str, str]:
    """Return the hashes of all that a case computes on hosts with some devices each."""
    return run_json(directory, hosts, devices, case, mesh, "numbers")


def run_json(directory: Path, hosts: int, devices: int, case: str, mesh: dict[str, int], what: str) -> dict[str, Any]:
    """Return what a child prints at its end."""
    arguments = command(directory, hosts, devices, case, mesh, what)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Loop:
    """A child that trains and samples until it is ended."""

    process: subprocess.Popen[str]
    followers: list[int]
    directory: Path
    acknowledged: int = 0
    seen: list[str] = field(default_factory=list)
    lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def wait_for(self, line: str, count: int) -> None:
        """Read until a line has come `count` times, in all."""
        while self.seen.count(line) < count:
            read = self.lines.get()
            assert read, self.errors()
            self._note(read)

    def end(self, timeout: float) -> tuple[int, float]:
        """Wait for the child's end; return its exit code, and after how many seconds."""
        start = time.monotonic()
        code = self.process.wait(timeout)
        seconds = time.monotonic() - start
        # Of the pipe's end a follower, which has it too, may be late.
        with contextlib.suppress(queue.Empty):
            while read := self.lines.get(timeout=1):
                self._note(read)
        return code, seconds

    def errors(self) -> str:
        """Return what the child has written to stderr, but for the lines of gloo and jax."""
        lines = (self.directory / "errors").read_text().splitlines()
        return "\n".join(line for line in lines if "[Gloo]" not in line and "coordination_service.cc" not in line)

    def left(self) -> list[int]:
        """Return the followers that still run."""
        return [pid for pid in self.followers if _runs(pid)]

    def _note(self, line: str) -> None:
        word, *rest = line.split() or [""]
        self.seen.append(word)
        if word == "acknowledged":
            self.acknowledged = int(rest[0])


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextmanager
def loop(directory: Path, case: str, mesh: dict[str, int], hosts: int = 2, devices: int = 1) -> Iterator[Loop]:
    """Start a child that trains and samples; end whatever is left of it."""
    arguments = command(directory, hosts, devices, case, mesh, "loop")
    with (
        (directory / "errors").open("w") as errors,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        child = Loop(process, [int(pid) for pid in process.stdout.readline().split()[1:]], directory)
        try:
            yield child
        finally:
            for pid in [process.pid, *child.followers]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            child.reader.join(10)  # before its pipe is closed
