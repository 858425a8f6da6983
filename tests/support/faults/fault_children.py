"""How does a test run jobs in processes whose calls fail? `Children` forks them; the functions here read their logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.children import STRICT
from support.faults import fault_child
from support.faults.fault_disk import Event, read_log
from support.faults.fault_history import HISTORY, assert_kept

# A killed process loses nothing that it told the system, so that syncing would only cost time.
KILLED = {"sync": False}
# The order of the log is the order of the calls.
IN_ORDER = {"sync": False, "serial": True}


class Children:
    """A process that forks the processes of jobs; see fault_child."""

    def __init__(self, library: Path) -> None:
        environment = {
            "LD_PRELOAD": str(library),
            "OPENBLAS_NUM_THREADS": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self._process = subprocess.Popen(
            [*STRICT, fault_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        assert self._out.readline() == "ready\n"

    def run(self, *jobs: dict[str, Any]) -> list[int]:
        """Run jobs at the same time, each in its own process; return their exit statuses."""
        self._in.write(json.dumps(jobs) + "\n")
        self._in.flush()
        return json.loads(self._out.readline())

    def close(self) -> None:
        self._in.close()
        self._process.wait(30)
        self._out.close()


def job(program: str, state_dir: Path, **arguments: Any) -> dict[str, Any]:
    """The log lies beside the state directory, which is there: what happens outside of it is not counted."""
    state_dir.mkdir(exist_ok=True)
    return {"program": program, "state_dir": str(state_dir), "log": f"{state_dir}.log", **arguments}


def events_of(state_dir: Path) -> list[Event]:
    return read_log(Path(f"{state_dir}.log"))


def said(state_dir: Path) -> list[dict[str, Any]]:
    return [event.said for event in events_of(state_dir) if event.name == "said"]


def everywhere(pair: list[Children], points: Sequence[Any], work: Callable[[Children, Any], int]) -> int:
    """Do the work of each point, two at a time; return the sum of what it counted."""

    def share(number: int) -> int:
        return sum(work(pair[number], point) for point in points[number :: len(pair)])

    with ThreadPoolExecutor(len(pair)) as pool:
        shares = [pool.submit(share, number) for number in range(len(pair))]
        return sum(done.result() for done in shares)


def take_history(children: Children, state_dir: Path, steps: Sequence[Any] = HISTORY, **arguments: Any) -> list[Event]:
    """Take the steps in a child, undisturbed; return its log."""
    assert children.run(job("history", state_dir, steps=steps, **{"plan": IN_ORDER} | arguments)) == [0]
    return events_of(state_dir)


def calls_in(events: Sequence[Event]) -> int:
    return sum(event.name != "said" for event in events)


def kill(children: Children, state_dir: Path, plan: dict[str, Any]) -> list[Event] | None:
    """Take the history in a child that dies at a point; return its log, None if it came to the end before."""
    (status,) = children.run(job("history", state_dir, steps=HISTORY, plan=plan))
    assert status in (0, -signal.SIGKILL), said(state_dir)
    return events_of(state_dir) if status else None


def survives(
    children: Children, state_dir: Path, plan: dict[str, Any], then: Callable[[list[Event]], None] = lambda _: None
) -> bool:
    """Take the history in a child that dies at a point, do more to what it left, and see that all of it holds.

    Returns:
        Whether the child died: False if it came to the end before.
    """
    events = kill(children, state_dir, plan)
    if events is not None:
        then(events)
        assert_kept(state_dir, acknowledged(events))
    shutil.rmtree(state_dir, ignore_errors=True)
    return events is not None


def acknowledged(events: Sequence[Event]) -> int:
    return sum(event.name == "said" for event in events)
