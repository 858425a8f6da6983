"""What does `launch` refuse before anything starts, and what does it do on one host? No test here starts Ray."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from jax_client.cli.launch import tied, tokens
from jax_client.cli.program import child as child_module
from support.command_line import python

TWO = "--hosts", "127.0.0.2,127.0.0.3", "--host-index", "0"


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path, clean_environment):
    """No variables of Ray or of a cluster, and a home directory without a token."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "SLURM_", "TPU_", "JOB_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))


def test_wrong_usage_is_refused_by_name(cli, monkeypatch):
    assert cli("launch").err.startswith("Usage: jax_client launch [OPTIONS] -- PROGRAM [ARGUMENT]...\n")
    assert "there is no program; give it after --" in cli("launch", *TWO).error(2)
    assert "as in 'launch -- python'" in cli("launch", "python", "x.py").error(2)
    assert "No such option" in cli("launch", "--bogus", "--", "true").error(2)
    assert "this is host 2, but there are 2" in cli("launch", *TWO[:3], "2", "--", "true").error(2)
    assert "name each host once" in cli("launch", "--hosts", "a,a", "--host-index", "0", "--", "true").error(2)
    assert "--host-index is given without --hosts" in cli("launch", "--host-index", "0", "--", "true").error(2)
    assert "there is no such program" in cli("launch", *TWO, "--", "no-such-program-here").error(127)
    assert "10002 to 19999" in cli("launch", *TWO, "--port", "12000", "--", "true").error(2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "without launch, once, with JAX_CLIENT_HOSTS=ray" in cli("launch", *TWO, "--", "true").error(2)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'jax_client[cluster]' on every host" in cli("launch", *TWO, "--", "true").error(3)


def test_a_secret_is_asked_for(cli, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    error = cli("launch", *TWO, "--", "true").error(2)
    assert "RAY_AUTH_TOKEN is not set, and ~/.ray/auth_token cannot be read or is empty" in error
    assert "> ~/.ray/auth_token; for host in 127.0.0.3; do ssh $host 'umask 077; mkdir -p ~/.ray; cat >" in error
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "RAY_AUTH_TOKEN_PATH is" in cli("launch", *TWO, "--", "true").error(2)


def test_where_the_secret_is_found(tmp_path, monkeypatch, capsys):
    on = {"RAY_AUTH_MODE": "token"}
    assert tokens.authentication({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled"}, ()) == on
    path = tmp_path / "user" / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("\n")
    with pytest.raises(tokens.BadRequestError, match="cannot be read or is empty"):
        tokens.authentication({}, ("b",))
    path.write_text("Xyzzy\n")
    path.chmod(0o600)
    assert tokens.authentication({}, ()) == on and capsys.readouterr().err == ""
    path.chmod(0o644)
    assert tokens.authentication({"RAY_AUTH_TOKEN_PATH": str(path)}, ()) == on
    warning = capsys.readouterr().err
    assert warning == f"warning: other users of this host may read {path} (mode 0644); chmod 600 {path}\n"
    assert "Xyzzy" not in warning
    assert tokens.shown_token({}) == str(path) and tokens.shown_token({"RAY_AUTH_TOKEN": "x"}) == "RAY_AUTH_TOKEN"


def test_without_a_secret_on_a_private_network_only():
    assert tokens.no_authentication("10.0.0.5") == {"RAY_AUTH_MODE": "disabled"}
    with pytest.raises(tokens.BadRequestError, match=r"8\.8\.8\.8 is not of a private network"):
        tokens.no_authentication("8.8.8.8")


def test_the_command_that_makes_a_secret_works(tmp_path, monkeypatch):
    import shlex
    import subprocess

    # In place of ssh: a program that runs the command in the home directory of the other host.
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nexport HOME={shlex.quote(str(tmp_path))}/$1; shift; mkdir -p "$HOME"; exec sh -c "$1"\n'
    )
    ssh.chmod(0o755)
    command = tokens._MAKE.format(others="b c")
    subprocess.run(["sh", "-c", command], check=True, env=os.environ | {"PATH": f"{ssh.parent}:{os.environ['PATH']}"})
    made = [tmp_path / name / ".ray" / "auth_token" for name in ("user", "b", "c")]
    assert len({path.read_text() for path in made}) == 1 and len(made[0].read_text().strip()) == 64
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}


@pytest.mark.parametrize(("options", "code"), [((), 7), (("--hosts", "only"), 7), (("--restarts", "3"), 75)])
def test_one_host_just_runs_the_program_and_needs_no_ray(options, code):
    program = f"import os, sys; sys.exit({code} if 'RAY_ADDRESS' not in os.environ else 1)"
    arguments = ["launch", *options, "--", sys.executable, "-c", program]
    done = python(
        "import sys; sys.modules['ray'] = None",
        "from jax_client.cli import main",
        f"code = main({arguments!r})",
        "heavy = {'ray._raylet', 'jax', 'tinker', 'numpy'} & set(sys.modules)",
        "sys.exit(str(heavy) if heavy else code)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_help_imports_no_ray():
    for arguments in (["--help"], ["launch", "--help"]):
        done = python(
            "import sys",
            "from jax_client.cli import main",
            f"main({arguments!r})",
            "sys.exit(any(name.partition('.')[0] in ('ray', 'jax', 'numpy') for name in sys.modules))",
        )
        assert done.returncode == 0, done.stderr


def test_a_signal_of_several_hosts_reaches_the_program_once(tmp_path):
    import threading

    child = child_module.Child()
    count = tmp_path / "count"
    program = (
        "import signal, sys, time; from pathlib import Path; n = []; signal.signal(15, lambda *_: n.append(1)); "
        f"Path({str(count)!r}).write_text('ready'); time.sleep(2); sys.exit(len(n))"
    )

    def send() -> None:
        while not count.exists():
            time.sleep(0.01)
        child.relay(signal.SIGTERM)
        time.sleep(0.2)
        child.relay(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert child.run([sys.executable, "-c", program], os.environ) == 1
    thread.join()
    assert child.received == [signal.SIGTERM] and child.hurried


def test_a_signal_before_the_program_starts_is_for_it_too():
    child = child_module.Child()
    with child.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.received == [signal.SIGTERM]
        assert child.run(["sleep", "60"], os.environ) == 143


def test_a_program_ends_with_its_launch(tmp_path):
    """The launch is killed; the program gets SIGTERM, and may save."""
    import subprocess

    ended = tmp_path / "ended"
    program = f"trap 'echo saved > {ended}; exit' TERM; echo started; while :; do sleep 0.1; done"
    launch = (
        "import os, subprocess, sys",
        f"command = [sys.executable, '-I', '-S', {tied.__file__!r}, str(os.getpid()), 'sh', '-c', {program!r}]",
        "subprocess.run(command)",
    )
    process = subprocess.Popen([sys.executable, "-c", "\n".join(launch)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.kill()
    process.stdout.read()  # until the program has closed it
    process.wait()
    process.stdout.close()
    assert ended.read_text() == "saved\n"
    # The parent is gone already; and a program that cannot be executed.
    run = lambda *arguments: subprocess.run([sys.executable, tied.__file__, *arguments], capture_output=True, text=True)  # noqa: E731
    assert run("1", "echo", "it runs").returncode == 143
    (tmp_path / "text").touch()
    done = run(str(os.getpid()), str(tmp_path / "text"))
    assert done.returncode == 126 and "Permission denied" in done.stderr


def test_a_reader_that_has_left_ends_no_host():
    done = python(
        "import os, sys",
        "from jax_client.cli.launch.messages import say",
        "read, write = os.pipe()",
        "os.dup2(write, 2)",
        "os.close(read)",
        "say('one')",
        "say('two')",
        "print('still there')",
    )
    assert (done.returncode, done.stdout) == (0, "still there\n")
