"""What becomes of training over two hosts, each with a Ray of its own, when one hangs or all are told to end?"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from support.launch.launches import Launches

pytest.importorskip("ray")
pytestmark = pytest.mark.full
TRAINS = str(Path(__file__).parents[2] / "support" / "launch" / "trains.py")
STARTS = 300.0  # seconds in which a program has imported, compiled and taken its first steps, on a busy machine


def _acknowledged(printed: str) -> list[int]:
    """Return the steps that the program has said were done, in order."""
    return [int(step) for step in re.findall(r"^acknowledged (\d+)$", printed, re.MULTILINE)]


def _takes_steps(hosts: Launches) -> None:
    """Wait until the program has said that two steps were done."""
    hosts.until(
        lambda: len(_acknowledged(hosts.printed(0))) > 1 or hosts.processes[0].poll() is not None, "steps", STARTS
    )
    assert hosts.processes[0].poll() is None, hosts.all_printed()


def _continues(hosts: Launches) -> None:
    """Check that the program continues, and ends well, and that no step was lost that it had said was done."""
    assert hosts.codes(STARTS) == [0, 0], hosts.all_printed()
    before, _, after = hosts.printed(0).partition(" continues tinker://")
    assert _acknowledged(after)[0] > _acknowledged(before)[-1], hosts.printed(0)


def test_a_host_that_hangs_is_lost_and_training_continues(launches, tmp_path):
    hosts = launches()
    hosts.start_all(sys.executable, "-u", TRAINS, str(tmp_path), options=("--restarts", "1"))
    _takes_steps(hosts)
    (follower,) = (pid for pid in hosts.ray_of(1) if "ray::Follower" in hosts.find().get(pid, ""))
    os.kill(follower, signal.SIGSTOP)
    start = time.monotonic()
    hosts.wait_for(0, "(0 more times)", 45)
    assert time.monotonic() - start < 40, "20 s without an answer, then ten to save and end"
    assert "cannot continue with fewer" in hosts.printed(0)
    _continues(hosts)


def test_all_are_told_to_end_and_training_continues(launches, tmp_path):
    hosts = launches()
    hosts.start_all(sys.executable, "-u", TRAINS, str(tmp_path))
    _takes_steps(hosts)
    for process in hosts.processes.values():
        process.send_signal(signal.SIGTERM)
    assert hosts.codes(60) == [143, 143], hosts.all_printed()
    (saved,) = map(int, re.findall(r"saved step (\d+) of run", hosts.printed(0)))
    assert saved - _acknowledged(hosts.printed(0))[-1] in (0, 1), "a step may be done and not told yet"
    hosts.start_all(sys.executable, "-u", TRAINS, str(tmp_path))
    _continues(hosts)
