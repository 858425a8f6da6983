"""Does the command line list and show runs and checkpoints, from the right state directory?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import options
from support.command_line import GOOD, LATER, OTHER, RUN, SAMPLER, damage


def test_runs_are_listed_newest_first(cli, home):
    table = cli("runs", "list")
    header, *rows = table.out.splitlines()
    assert " ".join(header.split()) == "NAME STATE STEP LOSS TOKENS UPDATED BASE MODEL RUN"
    assert [row.split()[-1] for row in rows] == [OTHER, RUN]
    assert "(just now)" in rows[0] and "org/model" in rows[0] and table.err == ""
    newest, oldest = cli("runs", "list", "--json").json
    assert (newest["run_id"], newest["steps"], newest["checkpoints"], newest["rank"]) == (OTHER, 7, 1, 4)
    assert (oldest["run_id"], oldest["steps"], oldest["checkpoints"]) == (RUN, 3, 2)
    assert oldest["last_checkpoint"] == SAMPLER and oldest["user_metadata"] == {"note": "first\ttry"}
    assert set(newest) == {
        "run_id", "base_model", "rank", "created", "steps", "checkpoints", "size_bytes", "last_checkpoint",
        "last_saved", "user_metadata", "key", "source", "name", "script", "state", "reason", "updated", "ended", "loss",
        "reward", "tokens", "tokens_per_second", "wall_seconds", "resumed_from", "parent", "children", "pid", "host",
        "alerts", "note", "tags", "archived",
    }  # fmt: skip
    assert cli("runs", "list", "--limit", "1", "--json").json == [newest]
    assert "1 of 2 runs" in cli("runs", "list", "--limit", "1").err


def test_one_run_is_shown(cli, home):
    shown = cli("runs", "info", RUN).out
    for part in ("org/model", "rank", "2, ", SAMPLER, "no process", "'first\\ttry'"):
        assert part in shown
    # Its own beginning is enough; one that two runs share is not.
    (about,) = cli("runs", "info", "0b1c2d3e-a", "--json").json
    assert about["run_id"] == RUN and about["owner"] is None
    assert "2 runs begin with '0b1c2d3e'" in cli("runs", "info", "0b1c2d3e").error(1)
    assert "there is no run 'nope'" in cli("runs", "info", "nope").error(1)


def test_the_owner_of_an_open_run_is_shown(cli, home):
    claim = CheckpointStore(home).lock_run(RUN)
    try:
        assert f"process {os.getpid()} on " in cli("runs", "info", RUN).out
        assert cli("runs", "info", RUN, "--json").json[0]["owner"]["pid"] == os.getpid()
    finally:
        claim.release()


def test_a_lost_run_file_hides_nothing(cli, home):
    damage(home, f"runs/{RUN.replace(':', '%3A')}/run.json")
    done = cli("runs", "list", "--json")
    assert {run["run_id"] for run in json.loads(done.out)} == {RUN, OTHER}
    assert done.err.startswith("warning: ") and "run.json is damaged" in done.err


def test_checkpoints_are_listed_newest_first(cli, home):
    header, *rows = cli("checkpoint", "list").out.splitlines()
    assert " ".join(header.split()) == "SAVED EXPIRES STEP SIZE BASE MODEL PATH"
    assert [row.split()[-1] for row in rows] == [LATER, SAMPLER, GOOD]
    listed = cli("checkpoint", "list", "--json").json
    assert [about["path"] for about in listed] == [LATER, SAMPLER, GOOD]
    assert [about["optimizer"] for about in listed] == [True, False, True]
    assert set(listed[0]) == {
        "path", "run_id", "kind", "name", "created", "expires_at", "public", "size_bytes", "step", "optimizer",
        "base_model", "rank", "train_attn", "train_mlp", "train_unembed", "user_metadata",
    }  # fmt: skip
    assert [about["path"] for about in cli("checkpoint", "list", RUN, "--json").json] == [SAMPLER, GOOD]
    assert "there is no run" in cli("checkpoint", "list", "nope").error(1)


def test_one_checkpoint_is_shown(cli, home):
    shown = cli("checkpoint", "info", GOOD).out
    for part in (GOOD, "attn, mlp", "with Adam's moments", "never", "bytes)"):
        assert part in shown
    assert "weights only" in cli("checkpoint", "info", SAMPLER).out
    assert cli("checkpoint", "info", GOOD, "--json").json[0]["step"] == 3
    assert "has no checkpoint weights/nope" in cli("checkpoint", "info", GOOD.replace("good", "nope")).error(1)


def test_an_empty_directory(cli, tmp_path):
    for place in (tmp_path, tmp_path / "not-there"):
        for command in (("runs", "list"), ("checkpoint", "list"), ("checkpoint", "verify")):
            assert cli(*command, "--json", "--state-dir", place).json == []
            done = cli(*command, "--state-dir", place)
            assert (done.code, done.out) == (0, "") and str(place) in done.err
    assert list(tmp_path.iterdir()) == []


def test_where_the_state_is(cli, home, tmp_path):
    empty = str(tmp_path / "empty")
    assert len(cli("runs", "list", "--json").json) == 2
    assert cli("--state-dir", empty, "runs", "list", "--json").json == []
    assert len(cli("--state-dir", empty, "runs", "list", "--json", "--state-dir", home).json) == 2
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in cli("runs", "list", "--state-dir", file).error(2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory_is_listed(cli, home):
    places = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o500)
    try:
        assert len(cli("checkpoint", "list", "--json").json) == 3
    finally:
        for place in places:
            place.chmod(0o700)


@pytest.mark.parametrize("path", ["good", "tinker://run/weights", "tinker://run/nonsense/x", "tinker://../weights/x"])
def test_malformed_paths_are_wrong_usage(cli, home, path):
    assert "expected tinker://RUN/KIND/NAME" in cli("checkpoint", "info", path).error(2)


def test_find_run():
    assert options.find_run(["a:1", "a:11"], "a:1", Path()) == "a:1"
