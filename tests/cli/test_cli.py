"""Does the command line list, check, delete, export and import, and say in one line what went wrong?"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main, options, output
from jax_client.cli.doctor import devices, software, storage
from jax_client.values import AdapterState, CheckpointKey, LoraSpec
from support.golden_cases import CASES, base_values
from support.weight_files import write_hf

RUN, OTHER = "0b1c2d3e-aaaa:train:0", "0b1c2d3e-bbbb:train:0"
GOOD, SAMPLER, LATER = (
    f"tinker://{RUN}/weights/good",
    f"tinker://{RUN}/sampler_weights/good",
    f"tinker://{OTHER}/weights/b",
)
SPEC = LoraSpec(rank=4, seed=0, train_unembed=False)


def state(step: int, optimizer: bool) -> AdapterState:
    arrays = {"q.A": np.full((2, 4, 8), step, np.float32), "q.B": np.zeros((2, 4, 6), np.float32)}
    moments = arrays if optimizer else None
    return AdapterState(spec=SPEC, step=step, weights=arrays, mu=moments, nu=moments)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with a training and a sampler checkpoint, one with a training checkpoint."""
    home = tmp_path_factory.mktemp("filled")
    store = CheckpointStore(home)
    for run, model in ((RUN, "org/model"), (OTHER, "org/model")):
        about = {"session_id": run[:13], "base_model": model, "spec": asdict(SPEC), "created": time.time()}
        store.put_run(run, about | {"user_metadata": {"note": "first\ttry"} if run == RUN else None})
    for run, kind, name, step in (
        (RUN, "weights", "good", 3),
        (RUN, "sampler_weights", "good", 3),
        (OTHER, "weights", "b", 7),
    ):
        store.save(
            key=CheckpointKey(run, kind, name),
            state=state(step, kind == "weights"),
            metadata={
                "base_model": "org/model",
                "base_fingerprint": "f",
                "spec": asdict(SPEC),
                "step": step,
                "optimizer": {"name": "adamw"} if kind == "weights" else None,
                "user_metadata": None,
            },
        )
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the filled directory, which the commands find by the environment."""
    copy = tmp_path / "home"
    shutil.copytree(filled, copy)
    monkeypatch.setenv("JAX_CLIENT_HOME", str(copy))
    return copy


class Result:
    """What a command left: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)

    def error(self, code: int) -> str:
        """The one line that an error is; nothing is on stdout."""
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), self.err
        assert self.err.startswith("error: ")
        return self.err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


def damage(home: Path, pattern: str) -> Path:
    path = next(path for path in sorted(home.glob(pattern)) if path.is_file() and path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def python(*code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "\n".join(code)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_runs_are_listed_newest_first(cli, home):
    table = cli("runs", "list")
    header, *rows = table.out.splitlines()
    assert " ".join(header.split()) == "CREATED LAST CHECKPOINT STEPS CHECKPOINTS SIZE RANK BASE MODEL RUN"
    assert [row.split()[-1] for row in rows] == [OTHER, RUN]
    assert "(just now)" in rows[0] and "org/model" in rows[0] and table.err == ""
    newest, oldest = cli("runs", "list", "--json").json
    assert (newest["run_id"], newest["steps"], newest["checkpoints"], newest["rank"]) == (OTHER, 7, 1, 4)
    assert (oldest["run_id"], oldest["steps"], oldest["checkpoints"]) == (RUN, 3, 2)
    assert oldest["last_checkpoint"] == SAMPLER and oldest["user_metadata"] == {"note": "first\ttry"}
    assert set(newest) == {
        "run_id", "base_model", "rank", "created", "steps", "checkpoints", "size_bytes", "last_checkpoint",
        "last_saved", "user_metadata",
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
    claim = CheckpointStore(home).claim(RUN)
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


def test_verify_names_what_is_damaged(cli, home):
    done = cli("checkpoint", "verify")
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()] == ["OK"] * 3
    file = damage(home, "runs/*aaaa*/weights/good/*/arrays/**/*")
    # A listing leaves out a checkpoint whose manifest is damaged; a check must not.
    manifest = damage(home, "runs/*bbbb*/weights/b/*/manifest.json")
    done = cli("checkpoint", "verify")
    lines = {line.split()[1]: line for line in done.out.splitlines()}
    assert done.code == 1 and set(lines) == {GOOD, SAMPLER, LATER}
    assert lines[GOOD].startswith("DAMAGED") and str(file) in lines[GOOD]
    assert lines[LATER].startswith("DAMAGED") and str(manifest) in lines[LATER]
    assert lines[SAMPLER].startswith("OK")
    done = cli("checkpoint", "verify", GOOD, "--json")
    (result,) = json.loads(done.out)
    assert (done.code, result["path"], result["status"], result["size_bytes"]) == (1, GOOD, "DAMAGED", None)
    assert str(file) in result["problem"]
    assert cli("checkpoint", "verify", SAMPLER).code == 0
    assert "has no checkpoint" in cli("checkpoint", "verify", GOOD.replace("good", "nope")).error(1)


class Terminal(io.StringIO):
    """Somebody at the keyboard, who types this."""

    def isatty(self) -> bool:
        return True


def test_delete_asks_on_a_terminal(cli, home, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    done = cli("checkpoint", "delete", GOOD, SAMPLER)
    assert done.code == 1 and "Delete 2 checkpoints for good?" in done.err and "Nothing was deleted" in done.err
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert cli("checkpoint", "delete", GOOD).code == 130
    assert len(cli("checkpoint", "list", "--json").json) == 3
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    done = cli("checkpoint", "delete", GOOD, SAMPLER)
    assert (done.code, done.out) == (0, f"deleted {GOOD}\ndeleted {SAMPLER}\n")
    assert [about["path"] for about in cli("checkpoint", "list", "--json").json] == [LATER]


def test_delete_refuses_without_a_terminal(cli, home, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "give --yes" in cli("checkpoint", "delete", GOOD).error(2)
    # One that is missing keeps the others.
    assert "has no checkpoint" in cli("checkpoint", "delete", GOOD, GOOD.replace("good", "nope"), "--yes").error(1)
    assert len(cli("checkpoint", "list", "--json").json) == 3
    # Damage is no reason to keep one; named twice, it is deleted once.
    damage(home, "runs/*aaaa*/weights/good/*/manifest.json")
    assert cli("checkpoint", "delete", GOOD, GOOD, "--yes").out == f"deleted {GOOD}\n"


def test_a_time_to_live_is_set_and_taken_back(cli, home):
    assert "(in 59 min)" in cli("checkpoint", "ttl", GOOD, "3600").out
    assert cli("checkpoint", "info", GOOD, "--json").json[0]["expires_at"] is not None
    assert cli("checkpoint", "ttl", GOOD, "never").out == f"{GOOD} expires never\n"
    assert cli("checkpoint", "info", GOOD, "--json").json[0]["expires_at"] is None
    assert "from 3600 to" in cli("checkpoint", "ttl", GOOD, "60").error(2)
    assert "'never'" in cli("checkpoint", "ttl", GOOD, "1h").error(2)
    assert "has no checkpoint" in cli("checkpoint", "ttl", GOOD.replace("good", "nope"), "3600").error(1)


def test_usage_is_explained_in_a_line(cli):
    assert "No such option '--bogus'. See 'jax_client runs list --help'" in cli("runs", "list", "--bogus").error(2)
    assert "No such command" in cli("frobnicate").error(2)
    for arguments in ((), ("run",), ("runs",), ("checkpoint",)):
        done = cli(*arguments)
        assert (done.code, done.out) == (2, "") and done.err.startswith("Usage: ")
    assert cli("--version").out == f"jax_client {jax_client.__version__}\n"
    assert "--state-dir" in cli("checkpoint", "list", "-h").out


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(28, "No space left on device"), 1, "No space left"),
        (ModuleNotFoundError("No module named 'numpy'"), 3, "jax_client doctor"),
        (ValueError("a\nbug"), 1, "ValueError: a bug. This should not happen"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_errors_are_a_line_and_a_code(cli, home, monkeypatch, error, code, text):
    def fail(home: Path) -> None:
        raise error

    monkeypatch.setattr("jax_client.cli.runs.open_store", fail)
    done = cli("runs", "list")
    assert done.code == code and text in done.err and "Traceback" not in done.err
    if code != 130:
        assert "Traceback" in cli("--debug", "runs", "list").err


def test_a_terminal_gets_a_styled_table(cli, home, monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = cli("checkpoint", "list").out
    assert "\x1b[1m" in shown
    # Whole, although it is longer than any terminal: it will be copied.
    assert LATER in shown
    output.print_table(("NAME",), [("[red]x[/red]",)])
    assert "[red]x[/red]" in capsys.readouterr().out


def test_sizes_and_times_for_people():
    assert [output.human_size(size) for size in (0, 1023, 1024, 1536 * 1024, 250 * 2**20, 3 * 2**40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "250 MiB", "3.0 TiB",
    ]  # fmt: skip
    now = time.time()
    times = {
        0: "just now",
        -90: "1 min ago",
        -7200: "2 h ago",
        -86400: "1 day ago",
        -(10**8): "3 years ago",
        7300: "in 2 h",
    }
    for offset, text in times.items():
        assert output.human_time(output.iso_time(now + offset)).endswith(f"({text})")
    assert (output.human_time(None), output.iso_time(0.0)) == ("-", "1970-01-01T00:00:00Z")
    assert output.shown("\x1b[2J") == r"'\x1b[2J'"


def test_nothing_heavy_is_imported(home):
    script = (
        "import sys",
        "from jax_client.cli import main",
        "code = main({arguments})",
        "heavy = {banned} & set(sys.modules)",
        "sys.exit(str(heavy) if heavy or code else 0)",
    )
    light = {"jax", "tinker", "transformers", "orbax", "torch"}
    cases = [
        (arguments, light) for arguments in (["runs", "list"], ["checkpoint", "list", "--json"], ["runs", "info", RUN])
    ]
    commands = [
        [],
        ["run"],
        ["runs"],
        ["checkpoint"],
        ["doctor"],
        ["runs", "list"],
        *([["checkpoint", c] for c in CHECKPOINT_COMMANDS]),
    ]
    cases += [([*command, "--help"], light | {"numpy", "rich", "pydantic"}) for command in commands]
    code = ["import subprocess, sys"]
    for arguments, banned in cases:
        text = "\n".join(script).format(arguments=arguments, banned=banned)
        code.append(f"done = subprocess.run([sys.executable, '-c', {text!r}], capture_output=True, text=True)")
        code.append(f"assert done.returncode == 0, ({arguments!r}, done.stderr)")
    done = python(*code)
    assert done.returncode == 0, done.stderr


CHECKPOINT_COMMANDS = ("list", "info", "verify", "delete", "ttl", "export", "import")


def test_a_reader_that_leaves_is_no_error(home):
    code = "import sys; from jax_client.cli import main; sys.exit(main(['runs', 'list']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert (child.stderr.read(), child.wait(60)) == ("", 1)
    child.stderr.close()


def test_doctor_reports_and_repairs(cli, home, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = cli("doctor")
    assert done.code == 0, done.out
    lines = {line[6:24].strip(): line for line in done.out.splitlines()}
    for check in ("python", "jax", "jaxlib", "flax", "orbax-checkpoint", "tinker", "devices", "memory", "state dir"):
        assert lines[check].startswith(("OK ", "WARN ")), lines[check]
    assert "cpu" in lines["devices"] and "2 runs, 3 checkpoints" in lines["catalogue"]
    (home / "catalogue.sqlite").write_bytes(b"nonsense")
    monkeypatch.setattr(devices, "devices", lambda timeout: [])
    done = cli("doctor", "--repair", "--json")
    assert done.code == 0 and "3 checkpoints" in done.err
    findings = json.loads(done.out)
    assert {"check", "status", "found", "advice", "details"} == set(findings[0])
    damage(home, "runs/*bbbb*/weights/b/*/manifest.json")
    (finding,) = [f for f in storage.clock_and_catalogue(home) if f.check == "catalogue"]
    assert finding.status == "WARN" and finding.details["unreadable"] == 1


def test_doctor_does_not_wait_for_a_device(cli, home, monkeypatch, tmp_path):
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nsleep 60\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stuck))
    monkeypatch.setattr(devices, "accelerator_files", lambda: {"tpu": ["/dev/accel0"], "nvidia": []})
    monkeypatch.setattr(
        devices, "holders", lambda files: ([devices.Holder(pid=17, command="python3", files=("/dev/accel0",))], 2)
    )
    start = time.monotonic()
    done = cli("doctor", "--timeout", "0.3")
    assert done.code == 3 and time.monotonic() - start < 30
    lines = [line for line in done.out.splitlines() if "process 17" in line or "did not start" in line]
    assert [line.split()[0] for line in lines] == ["WARN", "FAIL"]
    assert "process 17 (python3)" in lines[0] and "2 processes of other users" in lines[0] and "kill 17" in lines[0]
    assert "did not start within 0.3 seconds" in lines[1] and "JAX_PLATFORMS=cpu" in lines[1]


def test_doctor_notices_a_cpu_in_place_of_a_gpu(monkeypatch):
    found = {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "memory_bytes": None}
    monkeypatch.setattr(devices, "_probe", lambda timeout: (found, ""))
    monkeypatch.setattr(devices, "accelerator_files", lambda: {"tpu": [], "nvidia": ["/dev/nvidia0"]})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (finding,) = devices.devices(1)
    assert finding.status == "FAIL" and "jax_client[cuda12]" in finding.advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (finding,) = devices.devices(1)
    assert finding.status == "OK"


def test_who_holds_a_device(tmp_path):
    for pid, target in ((os.getpid(), "/dev/nvidia0"), (7, "/dev/nvidia0"), (8, "/dev/null")):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(target)
        (tmp_path / str(pid) / "comm").write_text("train\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "9").mkdir()
    holder = devices.Holder(pid=7, command="train", files=("/dev/nvidia0",))
    assert devices.holders(["/dev/nvidia0", "/dev/nvidia1"], tmp_path) == ([holder], 0)


def test_doctor_compares_packages_with_the_requirements(monkeypatch):
    versions = {"jax_client": "1", "jax": "0.9.0", "jaxlib": "0.9.0", "tinker": "0.38.1", "libtpu": "0.0.1"}
    requirements = {
        "jax_client": ["jax>=0.10.2,<0.13", "tinker>=0.38,<0.39", "flax>=1; python_version < '3'", "rich>=13"],
        "jax": ["jaxlib==0.9.0", "libtpu==0.0.42.*; extra == 'tpu'", "jax-cuda12-plugin==1; extra == 'cuda12'"],
    }
    monkeypatch.setattr(software, "_version", versions.get)
    monkeypatch.setattr(software.metadata, "requires", requirements.get)
    found = {finding.check: finding for finding in software.packages()}
    assert {check: finding.status for check, finding in found.items()} == {
        "jax": "FAIL", "jaxlib": "OK", "tinker": "OK", "rich": "FAIL", "libtpu": "FAIL",
    }  # fmt: skip
    assert found["jax"].advice == "Run: pip install 'jax<0.13,>=0.10.2'"


def test_doctor_looks_at_places(tmp_path, monkeypatch):
    statuses = lambda home: {f.check: f.status for f in storage.state_directory(home)}  # noqa: E731
    tmp_path.chmod(0o700)
    assert statuses(tmp_path / "not" / "there")["state dir"] == "OK" and not (tmp_path / "not").exists()
    monkeypatch.setattr("jax_client.checkpoint.disk.files.network_file_system", lambda path: "nfs4")
    assert statuses(tmp_path)["state dir"] == "WARN"
    monkeypatch.setattr(storage, "_write_problem", lambda directory, is_parent: "Read-only file system")
    assert statuses(tmp_path)["state dir"] == "FAIL"
    cache = tmp_path / "jax_client" / "xla"
    cache.mkdir(parents=True)
    (cache / "program").write_bytes(b"12345")
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (finding,) = storage.compilation_cache()
    assert (finding.status, finding.details["size_bytes"], finding.details["mode"]) == ("WARN", 5, "777")


def test_doctor_notices_a_clock_that_is_behind(home, monkeypatch):
    monkeypatch.setattr(storage.time, "time", lambda: 1.0)
    clock = next(iter(storage.clock_and_catalogue(home)))
    assert (clock.check, clock.status) == ("clock", "WARN")


def test_export_and_import_with_a_real_engine(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "home"
    case = CASES["llama_untied"]
    model = write_hf(tmp_path / "model", case, base_values(case))
    config = jax_client.EngineConfig(
        dtype="float32", state_dir=home, precompile=False, compilation_cache_dir="", autosave_minutes=None
    )
    datum = jax_client.types.Datum(
        model_input=jax_client.types.ModelInput.from_ints([1, 5, 9, 3]),
        loss_fn_inputs={"target_tokens": [5, 9, 3, 7], "weights": [1.0, 1.0, 1.0, 1.0]},
    )

    def logprobs(client: Any) -> np.ndarray:
        return client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()

    with jax_client.ServiceClient(config=config) as service:
        client = service.create_lora_training_client(base_model=str(model), rank=4, seed=1).result()
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(jax_client.types.AdamParams(learning_rate=1e-2)).result()
        path = client.save_state("trained").result().path
        trained = logprobs(client)

        at = ("--state-dir", home)
        peft = cli("checkpoint", "export", path, "--format", "peft", "--output", tmp_path / "out" / "peft", *at)
        assert peft.code == 0, peft.err
        assert {p.name for p in (tmp_path / "out" / "peft").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert "differ by at most" in peft.out.splitlines()[-1]
        (tmp_path / "merged").mkdir()
        merged = cli(
            "checkpoint",
            "export",
            path,
            "--format",
            "merged",
            "--dtype",
            "float32",
            "--output",
            tmp_path / "merged",
            *at,
        )
        assert merged.code == 0, merged.err
        assert "differ by at most" in merged.out.splitlines()[-1]
        # Nothing is left beside them, and nothing is written over.
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["peft"]
        taken = cli("checkpoint", "export", path, "--format", "peft", "--output", tmp_path / "merged", *at)
        assert "is there already" in taken.error(1)

        done = cli("checkpoint", "import", tmp_path / "out" / "peft", "--base-model", model, "--name", "back", *at)
        assert (done.code, done.err) == (0, "")
        imported = done.out.splitlines()[-1]
        assert imported.startswith("tinker://") and imported.endswith(":train:0/weights/back")
        again = service.create_training_client_from_state(imported).result()
        np.testing.assert_array_equal(logprobs(again), trained)
        client.load_state(imported).result()
        with pytest.raises(ValueError, match="weights only"):
            client.load_state_with_optimizer(imported)

    (info,) = cli("runs", "info", imported.split("/")[2], "--json", *at).json
    assert (info["base_model"], info["rank"], info["checkpoints"]) == (str(model), 4, 1)
    # Other weights under the same name are noticed; so are an adapter that does not fit, and a malformed name.
    other = write_hf(tmp_path / "model", case, {k: v + 1 for k, v in base_values(case).items()})
    refused = cli("checkpoint", "export", path, "--format", "peft", "--output", tmp_path / "no", *at)
    assert "trained on other weights" in refused.error(1) and not (tmp_path / "no").exists()
    small = write_hf(
        tmp_path / "small",
        CASES["llama_tied"] | {"hidden_size": 16},
        base_values(CASES["llama_tied"] | {"hidden_size": 16}),
    )
    assert "fit" in cli("checkpoint", "import", tmp_path / "out" / "peft", "--base-model", small, *at).error(1)
    bad = cli("checkpoint", "import", tmp_path / "out" / "peft", "--base-model", other, "--name", "../x", *at)
    assert "'--name'" in bad.error(2)


def test_an_export_that_fails_leaves_nothing(cli, home, tmp_path, monkeypatch):
    monkeypatch.setattr("jax_client.runs.lifecycle.export.resolve", lambda name: 1 / 0)
    assert cli("checkpoint", "export", GOOD, "--format", "peft", "--output", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


def test_find_run():
    assert options.find_run(["a:1", "a:11"], "a:1", Path()) == "a:1"
