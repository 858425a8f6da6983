"""How does a program run on a server of its own, and what happens when either is stopped?"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from jax_client.checkpoint.disk import run_lock
from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli.program import child as child_module
from support.command_line import stages_of

pytestmark = pytest.mark.usefixtures("clean_environment")
TRAIN = """
import os, sys, time, tinker
from tinker import types
assert os.environ["TINKER_TELEMETRY"] == "0" and os.environ["TINKER_API_KEY"].startswith("tml-")
client = tinker.ServiceClient().create_lora_training_client(base_model="Some/Model", rank=4).result()
inputs = {"target_tokens": [5, 9, 3], "weights": [1.0, 1.0, 1.0]}
datum = types.Datum(model_input=types.ModelInput.from_ints([1, 5, 9]), loss_fn_inputs=inputs)
client.forward_backward([datum], "cross_entropy")
client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
print("stepped", flush=True)
time.sleep(60)
"""


def test_run_takes_a_program_and_runs_lists(cli, tmp_path, monkeypatch):
    started = []
    run_program = "jax_client.cli.run_command.run_program"
    monkeypatch.setattr(run_program, lambda ctx, program: started.append((ctx.params, program)))
    for arguments, program in (
        (["--", "list"], ["list"]),
        (["--", "python", "-c", "x", "--", "--model"], ["python", "-c", "x", "--", "--model"]),
        (["--model", "list", "--alias", "a=b", "--", "p", "--help"], ["p", "--help"]),
        (["--model", "a"], []),
    ):
        assert cli("run", *arguments).code == 0
        assert started.pop()[1] == program
    # The listings read none of these settings.
    monkeypatch.setenv("JAX_CLIENT_WARMUP", "many")
    assert "No runs under" in cli("runs", "list", "--state-dir", tmp_path).err
    assert "there is no run '--'" in cli("runs", "info", "--state-dir", tmp_path, "--", "--").error(1)
    monkeypatch.delenv("JAX_CLIENT_WARMUP")
    assert "as in 'run -- python'" in cli("run", "python", "x.py").error(2)
    assert "as in 'run -- python'" in cli("run", "--model", "a", "python", "--", "x").error(2)
    assert "No such option" in cli("run", "--port", "1", "--", "python").error(2)
    # The names that the listings had.
    for arguments in (["list"], ["list", "--json"], ["info", "RUN"]):
        error = cli("run", *arguments).error(2)
        assert f"'jax_client run {arguments[0]}' is called 'jax_client runs {arguments[0]}'." in error
    assert not started
    for shown in (cli("run", "--help").out, cli("run").err):
        assert "run [OPTIONS] -- PROGRAM [ARGUMENT]...\n" in shown and "--alias" in shown
    for shown in (cli("runs", "--help").out, cli("runs").err):
        assert "  list " in shown and "  info " in shown and "Show one run" in shown
    assert "--alias" not in cli("runs", "list", "--help").out


def test_a_program_that_is_not_there(cli, tmp_path):
    home = tmp_path / "home"
    error = cli("run", "--state-dir", home, "--model", "no/such", "--", "no-such-program-here").error(127)
    assert error == "error: no-such-program-here: there is no such program, or it is not executable.\n"
    assert not home.exists(), "before anything is loaded"
    assert "give it after --" in cli("run", "--model", "a").error(2)


@pytest.mark.parametrize(
    ("code", "sent", "expected"),
    [
        ("import sys; sys.exit(5)", [], 5),
        ("import os; os.kill(os.getpid(), 9)", [], 137),
        ("import time; print(1, flush=True); time.sleep(60)", [signal.SIGTERM], 143),
        ("import time; print(1, flush=True); time.sleep(60)", [signal.SIGHUP], 129),
        (
            "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(6)); print(1, flush=True); time.sleep(60)",
            [signal.SIGINT],
            6,
        ),
        (
            "import signal, time; signal.signal(2, lambda *_: None); print(1, flush=True); time.sleep(60)",
            [signal.SIGINT, signal.SIGINT],
            137,
        ),
    ],
)
def test_signals_go_to_the_program(code, sent, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(child_module, "_in_foreground", lambda: False)
    ready = tmp_path / "ready"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def send() -> None:
        while not (ready.exists() and ready.stat().st_size):
            time.sleep(0.01)
        for number in sent:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    if sent:
        threading.Thread(target=send, daemon=True).start()
    child = child_module.Child()
    program = ["sh", "-c", f"exec {sys.executable} -c '{code}' > {ready}"]
    assert child.run(program, dict(os.environ)) == expected
    assert child.hurried == bool({signal.SIGTERM, signal.SIGHUP} & set(sent))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_ctrl_c_of_the_terminal_reaches_a_program_once(tmp_path, monkeypatch):
    monkeypatch.setattr(child_module, "_in_foreground", lambda: True)
    child = child_module.Child()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    # The terminal is not there to send it: were it passed on, the program would end with 130.
    assert child.run([sys.executable, "-c", "import time; time.sleep(1.5)"], dict(os.environ)) == 0


def test_a_program_trains_behind_a_dead_proxy_and_is_interrupted(start, model, tmp_path, monkeypatch):
    # Nothing listens there. The program would never reach the server by it.
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet")
    program = sys.executable, "-c", TRAIN
    run = start("run", "--model", model, "--alias", f"Some/Model={model}", "--", *program)
    assert run.stdout is not None
    assert run.stdout.readline() == "stepped\n", run.communicate()[1]
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (130, ""), err
    own = ["state", "loading", "loaded", "dashboard:", "ready:", "stopping:"]
    assert [word for word in stages_of(err.splitlines()) if word in own] == own
    assert "create_training_client_from_state_with_optimizer(" in err and "/weights/autosave-0" in err
    store = CheckpointStore(tmp_path / "home")
    assert [record.step for record in store.list()] == [1]
    assert [fields["script"] for _, fields in store.runs()] == ["python -c"]
    assert run_lock.lock_holder(tmp_path / "home") is None
