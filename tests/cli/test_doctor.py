"""Does `jax_client doctor` find what is wrong with packages, devices, disk and clock, and say what to do?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from jax_client.cli.doctor import devices, network, software, storage
from jax_client.config import default_state_dir
from jax_client.errors import BadRequestError
from support.command_line import damage, write_archive


def test_doctor_reports_and_repairs(cli, home, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = cli("doctor")
    assert done.code == 0, done.out
    lines = {line[6:24].strip(): line for line in done.out.splitlines()}
    for check in ("python", "jax", "jaxlib", "flax", "orbax-checkpoint", "tinker", "devices", "memory", "state dir"):
        assert lines[check].startswith(("OK ", "WARN ")), lines[check]
    assert "training: blockwise for every model" in lines["kernels"] and "splash: it is for TPUs" in lines["kernels"]
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


def test_doctor_names_a_part_of_a_slice_and_starts_no_jax(monkeypatch):
    monkeypatch.setattr(devices, "_probe", lambda timeout: pytest.fail("jax was started"))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1v-0,t1v-1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (finding,) = devices.devices(1.0)
    assert finding.status == "FAIL" and "one of the 2 hosts" in finding.found and "TPU_VISIBLE_CHIPS" in finding.advice


def test_doctor_notices_a_cpu_in_place_of_a_gpu(monkeypatch):
    found = {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "memory_bytes": None}
    monkeypatch.setattr(devices, "_probe", lambda timeout: (found, ""))
    monkeypatch.setattr(devices, "accelerator_files", lambda: {"tpu": [], "nvidia": ["/dev/nvidia0"]})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (finding,) = devices.devices(1)
    assert finding.status == "FAIL" and "jax_client[cuda12]" in finding.advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    finding, _ = devices.devices(1)
    assert finding.status == "OK"


def test_doctor_says_which_kernels_are_used_and_why_not_the_others(monkeypatch):
    gpu = {"platform": "gpu", "kind": "NVIDIA H100", "count": 1, "processes": 1, "memory_bytes": 2**36}
    choices = [
        {
            **{"dtype": "bfloat16", "head_width": width, "failed": width == 64, "refused": refused},
            **{"training": name, "sampling": "triton"},
        }
        for width, name, refused in (
            (128, "cudnn", {}),
            (64, "blockwise", {"cudnn": "it is off by 0.3 on a packed row"}),
        )
    ]
    monkeypatch.setattr(devices, "_probe", lambda timeout: (gpu | {"kernels": choices, "cudnn": "9.18.1"}, ""))
    _, kernels = devices.devices(1)
    assert kernels.status == "WARN" and "doctor --selftest" in kernels.advice
    assert (
        "cudnn for bfloat16 with heads of 128; blockwise for bfloat16 with heads of 64 (cuDNN 9.18.1)" in kernels.found
    )
    assert "Sampling: triton for every model. Not used: cudnn: it is off by 0.3" in kernels.found
    monkeypatch.setattr(devices, "_probe", lambda timeout: (gpu, ""))  # what was found in time
    _, kernels = devices.devices(1)
    assert kernels.status == "WARN" and "not tried within 1 seconds" in kernels.found


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
    monkeypatch.setattr("jax_client.host.disk.network_file_system", lambda path: "nfs4")
    assert statuses(tmp_path)["state dir"] == "WARN"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_problem", lambda directory, is_parent: "Read-only file system")
        assert statuses(tmp_path)["state dir"] == "FAIL"
        (finding,) = storage.compilation_cache()
        assert finding.status == "WARN" and "set XDG_CACHE_HOME" in finding.advice
    cache = tmp_path / "jax_client" / "xla"
    cache.mkdir(parents=True)
    (cache / "program").write_bytes(b"12345")
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (finding,) = storage.compilation_cache()
    assert (finding.status, finding.details["size_bytes"], finding.details["mode"]) == ("WARN", 5, "777")


def test_doctor_names_what_a_user_without_a_home_can_set(monkeypatch):
    monkeypatch.setattr("jax_client.host.places.home", lambda: None)
    for name in ("JAX_CLIENT_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadRequestError) as caught:
        default_state_dir()
    (finding,) = storage.no_state_directory(str(caught.value))
    assert (finding.status, finding.found) == ("FAIL", str(caught.value).split(". ")[0])
    assert finding.advice.startswith("Set EngineConfig.state_dir (or JAX_CLIENT_HOME, or --state-dir)")
    (finding,) = storage.compilation_cache()
    assert finding.status == "WARN" and "set XDG_CACHE_HOME" in finding.advice


def test_doctor_says_which_proxy_stands_before_this_machine(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert [finding.status for finding in network.proxies()] == ["OK"]
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "intranet")
    (finding,) = network.proxies()
    assert finding.status == "WARN" and "secret" not in finding.found + finding.advice
    assert "export no_proxy=intranet,127.0.0.1,localhost NO_PROXY=intranet,127.0.0.1,localhost" in finding.advice
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert [finding.status for finding in network.proxies()] == ["OK"]


def test_doctor_works_from_an_archive(home, tmp_path):
    program = (
        "from jax_client.cli.doctor import storage as s; from pathlib import Path; import sys; print(s.__file__)\n"
    )
    program += "print([f.status for f in s.clock_and_catalogue(Path(sys.argv[1]))])"
    archive = write_archive(tmp_path / "package.zip")
    command = [sys.executable, "-P", "-c", program, str(home)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(archive)}, capture_output=True, text=True)
    where, statuses = done.stdout.splitlines()
    assert where.startswith(str(archive)) and statuses == "['OK', 'OK']", done.stderr


def test_doctor_notices_a_clock_that_is_behind(home, monkeypatch):
    monkeypatch.setattr(storage.time, "time", lambda: 1.0)
    clock = next(iter(storage.clock_and_catalogue(home)))
    assert (clock.check, clock.status) == ("clock", "WARN")
