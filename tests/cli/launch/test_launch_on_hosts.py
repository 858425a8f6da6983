"""How does a program on several hosts start and end, and what becomes of it when a host goes?

Most tests start Ray two or three times, which takes half a minute: they run with --full.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray")
PYTHON = sys.executable, "-u", "-c"
SAVES = """
import os, signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(3)
    print("saved", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("PROGRAM", os.getpid(), os.environ["RAY_ADDRESS"], os.environ["JAX_CLIENT_HOSTS"], flush=True)
time.sleep(120)
"""


def program_of(text: str) -> int:
    return int(text.split("PROGRAM ")[-1].split()[0])


def test_all_hosts_are_told_to_stop_and_the_program_saves_first(launches):
    hosts = launches()
    hosts.start_all(*PYTHON, SAVES)
    hosts.wait_for(0, "PROGRAM ")
    assert f" 127.0.0.2:{hosts.port} ray" in hosts.printed(0)
    for process in hosts.processes.values():
        process.send_signal(signal.SIGTERM)
    hosts.wait_for(0, "saving")
    time.sleep(1)
    assert hosts.ray_of(1) and hosts.processes[1].poll() is None, "it stays until host 0 has ended"
    assert hosts.codes() == [5, 5], hosts.all_printed()
    assert hosts.printed(0).count("saving") == hosts.printed(0).count("saved") == 1
    assert "SIGTERM: the program on host 0 (127.0.0.2) gets it" in hosts.printed(1)
    assert "host 0 (127.0.0.2) has ended with exit code 5" in hosts.printed(1)


@pytest.mark.full
def test_a_signal_to_another_host_reaches_the_program(launches):
    hosts = launches(3)
    hosts.start_all(*PYTHON, SAVES)
    hosts.wait_for(0, "PROGRAM ")
    # Also Ray of that host gets it, as when a machine shuts down.
    for pid in (hosts.processes[2].pid, *hosts.ray_of(2)):
        os.kill(pid, signal.SIGTERM)
    hosts.wait_for(0, "saving")
    time.sleep(1)
    assert len(hosts.ray_of(2)) > 3, "it is as it was"
    assert hosts.codes() == [5, 5, 5], hosts.all_printed()


@pytest.mark.full
def test_the_program_computes_on_all_hosts(launches):
    code = """
from jax_client.engine.hosts import ray_cluster
ray = ray_cluster.connect(start=False)
found = ray_cluster.hosts(ray)
where = ray.remote(lambda: ray.util.get_node_ip_address())
print("found", ray.get([where.options(**ray_cluster.on_host(host)).remote() for host in found]))
"""
    hosts = launches(3)
    hosts.start_all(*PYTHON, code)
    assert hosts.codes() == [0, 0, 0], hosts.all_printed()
    assert "found ['127.0.0.2', '127.0.0.3', '127.0.0.4']" in hosts.printed(0)


@pytest.mark.full
def test_the_death_of_the_first_launch_ends_all(launches):
    hosts = launches()
    hosts.start_all(*PYTHON, SAVES)
    hosts.wait_for(0, "PROGRAM ")
    assert hosts.find()
    hosts.processes[0].kill()
    start = time.monotonic()
    hosts.until(lambda: hosts.processes[1].poll() is not None, "the other host ends", 30)
    assert hosts.codes() == [-9, 1], hosts.all_printed()
    assert "error: host 0 (127.0.0.2) is lost: " in hosts.printed(1)
    hosts.wait_for(0, "saved")
    hosts.until(lambda: not hosts.find(), "no process is left", 10)
    assert time.monotonic() - start < 30


@pytest.mark.full
def test_the_death_of_the_program_is_told(launches):
    hosts = launches()
    hosts.start_all(*PYTHON, SAVES)
    hosts.wait_for(0, "PROGRAM ")
    os.kill(program_of(hosts.printed(0)), signal.SIGKILL)
    assert hosts.codes(30) == [137, 137], hosts.all_printed()


@pytest.mark.full
def test_a_host_that_is_lost_comes_back_and_the_program_runs_anew(launches, tmp_path):
    # What the engine does: it notices the loss, saves, and ends with 75.
    code = f"""
import os, sys, time
from pathlib import Path
from jax_client.engine.hosts import ray_cluster
ray = ray_cluster.connect(start=False)
known = [host.address for host in ray_cluster.hosts(ray)]
print("PROGRAM", os.getpid(), known, flush=True)
tries = Path({str(tmp_path / "tries")!r})
tries.open("a").write("x")
if len(tries.read_text()) > 2:
    sys.exit(0)
while len(ray_cluster.hosts(ray)) == 2:
    time.sleep(0.5)
sys.exit(75)
"""
    hosts = launches()
    hosts.start_all(*PYTHON, code, options=("--restarts", "2"))
    hosts.wait_for(0, "PROGRAM ")
    # Ray of the other host dies: its launch starts it anew.
    raylet = next(pid for pid, command in hosts.find().items() if pid in hosts.ray_of(1) and "raylet/raylet" in command)
    os.kill(raylet, signal.SIGKILL)
    hosts.wait_for(1, "Ray has ended on this host, as it says above, and is started anew")
    hosts.until(lambda: hosts.printed(0).count("PROGRAM ") == 2, "it runs anew")
    # The whole launch dies, and a person starts it anew.
    hosts.processes[1].kill()
    hosts.until(lambda: "(0 more times)" in hosts.printed(0), "host 0 waits", 60)
    hosts.start(1, *PYTHON, code)
    assert hosts.codes(90) == [0, 0], hosts.all_printed()
    assert hosts.printed(0).count("['127.0.0.2', '127.0.0.3']") == 3


@pytest.mark.full
def test_a_host_that_stays_away_is_named(launches):
    hosts = launches(3)
    for index in (0, 1):
        hosts.start(index, *PYTHON, SAVES, options=("--timeout", "60"))
    assert hosts.codes(150) == [1, 1], hosts.all_printed()
    assert "error: after 60 s these hosts are missing: host 2 (127.0.0.4). Start the same" in hosts.printed(0)
    assert "has ended with exit code 1" in hosts.printed(1)


@pytest.mark.full
@pytest.mark.parametrize("other", ["token", "hosts"])
def test_a_stranger_does_not_join(launches, other):
    hosts = launches()
    hosts.start(0, *PYTHON, SAVES)
    if other == "token":
        hosts.start(1, *PYTHON, SAVES, RAY_AUTH_TOKEN="f" * 32)
    else:
        hosts.names = (*hosts.names, "127.0.0.9")
        hosts.start(1, *PYTHON, SAVES)
    hosts.until(lambda: hosts.processes[1].poll() is not None, "the stranger ends")
    said = {
        "token": "they have different tokens",
        "hosts": "was started for the hosts 127.0.0.2, 127.0.0.3, this one for 127.0.0.2, 127.0.0.3, 127.0.0.9",
    }
    assert said[other] in hosts.printed(1)
    hosts.processes[0].send_signal(signal.SIGTERM)
    assert hosts.codes() == [143, 1], hosts.all_printed()


def test_a_guard_ends_all_that_came_of_its_command(tmp_path):
    from jax_client.cli.launch import guard

    logs = tmp_path / "logs"
    logs.mkdir()
    # A child that ignores SIGTERM, in a session of its own, whose parent is gone.
    inner = f"trap '' TERM; echo $$ > {tmp_path}/inner; sleep 60"
    command = ["sh", "-c", f'setsid sh -c "{inner}" & sleep 0.1; exit 0']
    program = [*command[:2], f"({command[2]}); sleep 60"]
    process = subprocess.Popen([sys.executable, "-I", "-S", guard.__file__, str(logs), *program], stdin=subprocess.PIPE)
    assert process.stdin is not None
    while not (tmp_path / "inner").exists() or not (tmp_path / "inner").read_text().strip():
        time.sleep(0.02)
    inner_pid = int((tmp_path / "inner").read_text())
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None and os.path.exists(f"/proc/{inner_pid}"), "a signal is not for it"
    process.stdin.close()
    assert process.wait(10) == 0
    assert not os.path.exists(f"/proc/{inner_pid}") and not logs.exists()
    # The command's own end, and its exit code.
    logs.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(logs), "sh", "-c", "exit 9"], stdin=subprocess.PIPE
    )
    assert process.wait(10) == 9 and logs.exists()
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.full
def test_the_doctor_asks_every_host(launches):
    code = """
import subprocess, sys
command = [sys.executable, "-c", "from jax_client.cli import main; main()", "doctor"]
done = subprocess.run(command, capture_output=True, text=True)
print("\\n".join(line for line in done.stdout.splitlines() if line[6:].startswith(("ray", "hosts"))))
"""
    hosts = launches()
    hosts.start_all(*PYTHON, code)
    assert hosts.codes() == [0, 0], hosts.all_printed()
    assert "OK    ray cluster       2 hosts: " in hosts.printed(0)
    assert "127.0.0.2" in hosts.printed(0) and "127.0.0.3" in hosts.printed(0)
