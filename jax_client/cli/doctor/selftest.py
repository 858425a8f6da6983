"""Does the package compute right on these devices? A child process runs `jax_client.selftest`; its rows are shown here.

A device can end that process or stop it for good. The row that then fails has the name of the group of checks that ran.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from jax_client.cli.output import shown

# Without a line from the child. A group of checks takes half a minute, most of it for compiling.
SECONDS = 600.0
_KILL_SECONDS = 5.0
MODULE = "jax_client.selftest.run"


@dataclass(slots=True)
class Report:
    """What a self-test found, as far as it came.

    Attributes:
        environment: devices and versions.
        rows: as `jax_client.selftest.row.Row` has them, in the order in which they were known.
        seconds: that it took.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [row["check"] for row in self.rows if row["verdict"] == "FAIL"]


def run_selftest(show: Callable[[dict[str, Any]], None], seconds: float = SECONDS, module: str = MODULE) -> Report:
    """Run the self-test in a child process.

    Args:
        show: called with each row as it is known.
        seconds: without a row, after which the child is ended.
        module: that it runs.
    """
    report, begun, start, ended = Report(), "the start of jax", time.monotonic(), False
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            for line in _lines(child, seconds):
                match line:
                    case {"environment": found}:
                        report.environment = found
                    case {"begins": name}:
                        begun = name
                    case {"row": row}:
                        report.rows.append(row)
                        show(row)
                    case {"seconds": took}:
                        report.seconds, ended = took, True
            late = child.poll() is None and not ended
        finally:
            _end(child)
        if not ended:
            report.seconds = round(time.monotonic() - start, 1)
            row = _broken_off(begun, child.returncode, errors, seconds if late else None)
            report.rows.append(row)
            show(row)
    return report


def _lines(child: subprocess.Popen[bytes], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the objects that a child prints, until it ends or is silent for so long; other lines are passed over."""
    stdout, rest = child.stdout, b""
    if stdout is None:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while selector.select(seconds):
            if not (read := os.read(stdout.fileno(), 2**16)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_KILL_SECONDS)
                return
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                if line.startswith(b'{"'):
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be about to end by itself
            child.wait(0.5)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_SECONDS)
    if child.stdout is not None:
        child.stdout.close()


def _broken_off(begun: str, code: int | None, errors: BinaryIO, late: float | None) -> dict[str, Any]:
    """Return the row of the group of checks that a child did not come back from."""
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    if late is not None:
        measured = f"it was silent for {late:g} seconds"
    elif code is not None and code < 0:
        measured = f"the process ended with signal {-code}"
    else:
        measured = f"the process ended with code {code}"
    meaning = (
        "the device does not come back from this part of the package, or this machine is very busy. Report this table."
    )
    if begun == "the start of jax":
        meaning = "jax does not start on this device: see that no other process uses it."
    last = f" It last said: {shown(said[-1])[:300]}" if said else ""
    return {"check": begun, "verdict": "FAIL", "measured": measured, "bar": "", "meaning": meaning + last, "values": {}}
