"""Is the state of a run right, however its program goes on or ends?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_client.checkpoint.disk.run_lock import LockRecord
from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main
from jax_client.metrics.summary import Summary
from jax_client.runs.overview.records import RunRow
from jax_client.runs.overview.rows import Overview
from jax_client.runs.overview.states import LIVE_SECONDS, condition
from support.exits import PRELUDE, write_model

TRAINED = "client = trainer()\nstep(client)\nstep(client)\n"
HELD = TRAINED + "print('ready', flush=True)\ntime.sleep(60)\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a cache of compiled programs that all programs share."""
    return write_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("cache")


def start(program: str, places: tuple[Path, Path], folder: Path) -> subprocess.Popen[str]:
    model, cache = places
    arguments = [str(model), str(folder / "state"), str(cache), str(folder / "clock")]
    file = folder / "train.py"
    file.write_text((PRELUDE + program).replace("sys.argv[1:5]", repr(arguments)))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "JAX_COMPILATION"))}
    return subprocess.Popen(
        [sys.executable, str(file)],
        env=env | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def row(folder: Path) -> RunRow:
    (found,) = Overview(folder / "state").runs()
    return found


def seen(program: str, places: tuple[Path, Path], folder: Path) -> RunRow:
    """Run a program to its end; return what the overview says of its run."""
    process = start(program, places, folder)
    process.communicate(timeout=120)
    return row(folder)


def test_a_run_is_live_while_it_trains_and_crashed_once_it_is_killed(places: tuple[Path, Path], tmp_path: Path) -> None:
    process = start(HELD, places, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 5
    while row(tmp_path).step != 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    found = row(tmp_path)
    assert (found.state, found.step, found.pid, found.ended) == ("live", 2, process.pid, None)
    assert found.script == "train.py" and found.name.startswith("train.py ") and found.loss is not None
    assert found.tokens == 8 and found.rank == 4 and found.spark_name == "loss" and len(found.spark) == 2
    process.kill()
    process.communicate()
    found = row(tmp_path)
    assert found.state == "crashed" and found.reason is not None
    assert f"process {process.pid}" in found.reason and "killed" in found.reason


@pytest.mark.full
def test_sigterm_is_the_reason(places: tuple[Path, Path], tmp_path: Path) -> None:
    process = start(HELD, places, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    found = row(tmp_path)
    assert (found.state, found.reason) == ("crashed", "the process was ended by a signal: SIGTERM")
    assert found.checkpoints == 1, "its steps were saved"


@pytest.mark.parametrize(
    ("program", "state", "reason"),
    [
        ("raise ValueError('no data\\nat all')\n", "crashed", "the program ended by an exception: ValueError: no data"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("service.close('success').result()\n", "done", None),
                ("", "done", "the program ended without closing it"),
                ("with service:\n    1 / 0\n", "crashed", "closed after an error: ZeroDivisionError: division by zero"),
                ("raise KeyboardInterrupt\n", "done", "interrupted: Ctrl-C"),
                ("os._exit(3)\n", "crashed", "killed"),
            )
        ),
    ],
    ids=["exception", "closed", "forgot to close", "exception in with", "interrupted", "_exit"],
)
def test_each_end_is_told(
    program: str, state: str, reason: str | None, places: tuple[Path, Path], tmp_path: Path
) -> None:
    found = seen(TRAINED + program, places, tmp_path)
    assert found.state == state, found
    assert (found.reason is None) if reason is None else (reason in (found.reason or "")), found.reason
    assert found.pid is not None and found.wall_seconds is not None and found.wall_seconds > 0


def test_an_unloaded_run_says_so_and_keeps_its_beginning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.put_run("r:train:0", {"created": 100.0, "base_model": "m", "spec": {"rank": 2}})
    claim = store.lock_run("r:train:0")
    (found,) = Overview(tmp_path).runs()
    assert found.state == "live", "a process has just opened it"
    claim.release("unloaded")
    (found,) = Overview(tmp_path).runs()
    assert found.state == "unloaded" and found.reason == "its next request loads it again"
    assert found.created == 100.0 and found.ended is not None


def test_idle_is_open_without_a_sign_for_a_minute() -> None:
    held = LockRecord(held=True, pid=1, host="h", since=0.0, tells=True)
    summary = Summary()
    summary.add_point("step", 1, 1000.0, {})
    assert condition(held, summary, 1000.0 + LIVE_SECONDS).state == "live"
    assert condition(held, summary, 1001.0 + LIVE_SECONDS).state == "idle"
    summary.add_sign(1100.0, "backward")
    compiling = condition(held, summary, 1110.0)
    assert (compiling.state, compiling.reason) == ("live", "compiles backward")


def test_a_clock_that_was_put_right_keeps_no_run_alive() -> None:
    held, ahead = LockRecord(held=True, pid=1, host="h", since=0.0, tells=True), 3 * 3600.0
    summary = Summary()
    summary.add_point("step", 1, 1000.0 + ahead, {})
    for compiling in ("", "backward"):
        summary.compiling = compiling
        assert condition(held, summary, 1000.0 + 300).state == "idle", "it hangs"
    assert condition(LockRecord(held=True, since=1000.0 + ahead), None, 1000.0).state == "idle"
    # Its next sign is the newest, though the clock says less.
    summary.add_point("step", 2, 1300.0, {})
    assert summary.active == 1300.0 and condition(held, summary, 1310.0).state == "live"
    summary.add_point("device", 2, 1295.0, {})
    assert summary.active == 1300.0, "threads write in any order"
    # Of a host whose clock is a little ahead.
    assert condition(held, summary, 1292.0).state == "live"


def test_a_run_of_an_earlier_version_is_unknown_or_as_its_metrics_say() -> None:
    silent = LockRecord(held=False, pid=1, host="h", since=0.0)
    assert condition(silent, None, 10.0).state == "unknown" and condition(None, None, 10.0).state == "unknown"
    summary = Summary()
    summary.add_event("end", 1, 5.0, {})
    ended = condition(silent, summary, 10.0)
    assert (ended.state, ended.ended, ended.reason) == ("done", 5.0, None)
    assert condition(LockRecord(held=False, tells=True), None, 10.0).state == "crashed"


@pytest.mark.parametrize("when", ["1e300", "-5", "NaN", "1e400", "true", "9" * 400, '"x"'])
def test_a_lock_file_with_odd_times_hides_nothing(when: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.put_run("r", {"created": 1.0})
    store.put_run("s", {"created": 1e300})
    path = tmp_path / "runs" / "r" / ".owner"
    path.write_text(f'{{"pid": 1, "since": {when}, "ended": {when}, "how": "closed", "tells": true}}')
    found = Overview(tmp_path).run("r")
    assert (found.state, found.pid, found.ended, found.updated) == ("done", 1, None, 1.0)
    path.write_text(f'{{"pid": 1, "since": {when}, "ended": {when}, "tells": true}}')
    rows = {row.run: row for row in Overview(tmp_path).runs()}
    assert (rows["r"].state, rows["r"].ended) == ("crashed", None) and rows["s"].created is None
    assert main(["runs", "list", "--state-dir", str(tmp_path)]) == 0


def test_a_torn_lock_file_hides_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.put_run("r", {"created": 1.0})
    for text in ("", "{", "[1]", '{"pid": "x", "host": 3, "since": null, "how": []}', "\xff" * 9):
        (tmp_path / "runs" / "r" / ".owner").write_text(text)
        (found,) = Overview(tmp_path).runs()
        assert (found.state, found.pid) == ("unknown", None)
