"""Do `runs list`, `info` and `watch` show how runs do, on a terminal and in a pipe?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli.runs import charts
from jax_client.cli.runs.watch import picture
from jax_client.metrics.store import FILE_NAME, MetricsStore, Point
from jax_client.runs.overview.notes import Note
from jax_client.runs.overview.rows import Overview
from support.command_line import GOOD, OTHER, RUN, SAMPLER


def record(home: Path, run: str, steps: range, *, spike: int = 0) -> None:
    points = [
        Point(
            run=run,
            kind="step",
            step=step,
            time=time.time(),
            metrics={"loss:sum": 90.0 if step == spike else 8.0, "tokens:sum": 4.0, "tokens_per_second:mean": 1234.0},
        )
        for step in steps
    ]
    points.append(Point(run=run, kind="user", step=steps[-1], time=time.time(), metrics={"reward/mean": 0.125}))
    MetricsStore(home / FILE_NAME).add(points)


def test_a_list_has_state_loss_reward_and_alerts(cli, home, tmp_path):
    record(home, RUN, range(1, 41), spike=40)
    claim = CheckpointStore(home).lock_run(RUN)
    shown = cli("runs", "list")
    assert " ".join(shown.out.splitlines()[0].split()) == "NAME STATE STEP LOSS REWARD TOKENS UPDATED BASE MODEL RUN"
    line = next(line for line in shown.out.splitlines() if line.endswith(RUN))
    for part in ("live", " 40 ", " 22.5 ", " 0.125 ", " 160 "):
        assert part in line
    assert "! 0b1c2d3e:train:0: The loss was 22.5 at step 40, over 3 x its median of 2." in shown.err
    listed = {run["run_id"]: run for run in cli("runs", "list", "--json").json}
    run = listed[RUN]
    assert (run["state"], run["steps"], run["tokens"], run["pid"]) == ("live", 40, 160, os.getpid())
    assert [alert["kind"] for alert in run["alerts"]] == ["loss"]
    claim.release("errored", "ValueError: \x1b[2J")
    info = cli("runs", "info", RUN).out
    assert "crashed" in info and "closed after an error: " in info and "\x1b[2J" not in info
    assert "1234 a second" in info and SAMPLER in info


def test_archived_runs_and_log_directories(cli, home, tmp_path):
    Overview(home).put_note(OTHER, Note(archived=True))
    logs = tmp_path / "logs" / "math"
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text('{"step": 3, "env/all/reward/total": 0.5}\n')
    shown = cli("runs", "list", "--logs", tmp_path / "logs")
    assert OTHER not in shown.out and RUN in shown.out and "log:math" in shown.out
    assert "1 archived runs are not shown" in shown.err
    assert OTHER in cli("runs", "list", "--archived").out
    assert cli("runs", "info", "log:math", "--logs", tmp_path / "logs", "--json").json[0]["reward"] == 0.5


def test_verifying_is_remembered(cli, home):
    assert cli("checkpoint", "verify", GOOD).code == 0
    (row,) = [row for row in Overview(home).checkpoints() if row.path == GOOD]
    assert row.verified is not None and row.verified["ok"] is True


def test_a_watched_run_is_a_line_in_a_pipe_and_ends_with_the_run(cli, home):
    record(home, RUN, range(1, 4))
    CheckpointStore(home).lock_run(RUN).release("closed")
    shown = cli("runs", "watch", RUN)
    assert shown.code == 0 and shown.out.count("\n") == 1
    assert "done  step 3  loss 2  reward 0.125  tokens 12  1234 tokens/s" in shown.out
    assert "there are no runs" in cli("runs", "watch", "--state-dir", home / "none").error(1)
    assert "there is no run 'nope'" in cli("runs", "watch", "nope").error(1)


def test_ctrl_c_ends_a_watch_in_order(home):
    claim = CheckpointStore(home).lock_run(RUN)
    record(home, RUN, range(1, 5))
    code = "import sys; from jax_client.cli import main; sys.exit(main())"
    arguments = ["runs", "watch", RUN, "--interval", "0.2", "--state-dir", str(home)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "step 4" in process.stdout.readline()
    record(home, RUN, range(5, 7))
    assert "step 6" in process.stdout.readline(), "a line for the change"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.strip()) == (0, "", "")
    claim.release()


def test_a_terminal_sees_curves_and_the_device(home):
    record(home, RUN, range(1, 101), spike=50)
    usage = {"memory_bytes/weights": 2.0**30, "memory_bytes/available": 2.0**31, "sampler/occupancy:mean": 0.5}
    MetricsStore(home / FILE_NAME).add([Point(run=RUN, kind="device", step=100, time=time.time(), metrics=usage)])
    overview = Overview(home)
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console:
        console.print(picture(overview, overview.run(RUN), 60))
    text = console.export_text()
    console.file.close()
    assert all(len(line) <= 60 for line in text.splitlines())
    for part in ("loss  2", "reward/mean  0.125", "22.5", "sampler/occupancy  50 %  ██████████", "weights 1.0 GiB"):
        assert part in text


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [2.0, 2.0, 2.0],
        [float(i % 5) for i in range(7)],
        [0.0] * 999 + [5.0],
        [1e308, -1e308, 0.0],
        [5e-324, 0.0],
    ],
)
def test_a_chart_has_its_size_and_its_extremes(values: list[float]) -> None:
    lines = charts.chart(values, width=40, height=5)
    assert len(lines) == 5 and all(len(line) <= 40 for line in lines)
    if values:
        assert lines[0].split()[0] == f"{max(values):.4g}" and lines[-1].split()[0] == f"{min(values):.4g}"


def test_a_curve_of_the_largest_numbers_is_drawn_as_one_of_small_ones() -> None:
    values = [1.0, -1.0, 0.25, -0.5] * 30
    large = [1e308 * value for value in values]
    assert charts._draw(large, -1e308, 1e308, 20, 5) == charts._draw(values, -1.0, 1.0, 20, 5)


@pytest.mark.parametrize(("speed", "said"), [(0.8, "0.8"), (1.0, "1"), (9.96, "10"), (1234.5, "1234")])
def test_a_speed_is_no_share_of_one(home, speed, said):
    metrics = {"tokens_per_second:mean": speed, "padding_waste:mean": 0.25, "loss:sum": 1.0, "tokens:sum": 1.0}
    MetricsStore(home / FILE_NAME).add([Point(run=RUN, kind="step", step=1, time=time.time(), metrics=metrics)])
    overview = Overview(home)
    text = "\n".join(str(part) for part in picture(overview, overview.run(RUN), 60).renderables)
    assert f"tokens_per_second  {said}\n" in text and "padding_waste  25 %" in text


def test_one_spike_in_many_points_is_drawn() -> None:
    values = [1.0] * 5_000
    values[3_333] = 9.0
    top = charts.chart(values, width=60, height=4)[0]
    assert any(0x2800 < ord(character) <= 0x28FF for character in top)
    assert charts.bar(0.5, 4) == "██  " and charts.bar(2, 3) == "███" and charts.bar(float("nan"), 2) == "  "


def test_listing_commands_import_neither_the_sdk_nor_jax(home):
    code = (
        "import json, sys; from jax_client.cli import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, sorted({'tinker', 'torch', 'jax', 'transformers'} & set(sys.modules))]))"
    )
    for command in (["checkpoint", "ttl", GOOD, "7200"], ["runs", "list"], ["runs", "info", RUN, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--state-dir", str(home)], capture_output=True, text=True, timeout=60
        )
        assert json.loads(done.stdout.splitlines()[-1]) == [0, []], command
