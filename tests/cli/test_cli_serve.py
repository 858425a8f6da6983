"""Where do a server's settings come from, how does it start, and how does a program run on a server of its own?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jax_client.checkpoint.disk import run_lock
from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main, run_command, stages
from jax_client.cli.settings import SHARED
from jax_client.config import EngineConfig
from jax_client.runs.lifecycle import base_models
from jax_client.runs.lifecycle.futures import background
from jax_client.weights.read import hub
from jax_client.weights.read.progress import Counter, Progress, observed
from support.serving import write_model

KEY = "tml-not-to-be-seen"
# As an installation without torch: importing it fails.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from jax_client.cli import main; sys.exit(main())"
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


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("JAX_CLIENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


class Shown:
    """What a command printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def settings(self) -> dict[str, tuple[str, str]]:
        """The value and the source of each setting."""
        assert self.code == 0, self.err
        header, *rows = self.out.splitlines()
        at = [header.index(name) for name in ("SETTING", "VALUE", "SOURCE")]
        return {row[: at[1]].strip(): (row[at[1] : at[2]].strip(), row[at[2] :]) for row in rows}

    def error(self, code: int) -> str:
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), (self.code, self.out, self.err)
        return self.err


@pytest.fixture
def cli(capfd: Any) -> Any:
    def run(*arguments: object) -> Shown:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Shown(code, *capfd.readouterr())

    return run


def test_a_flag_goes_before_the_environment_the_file_and_the_default(cli, tmp_path, monkeypatch):
    file = tmp_path / "server.toml"
    file.write_text(
        'port = 1\nhost = "::1"\nremat = "full"\nmodel = ["a/b", "c/d"]\nprecompile = false\n'
        'autosave-minutes = "never"\nmax_tokens_per_micro_batch = 512\n[alias]\n"x/y" = "a/b"\n[mesh]\nfsdp = 2\n'
    )
    monkeypatch.setenv("JAX_CLIENT_PORT", "2")
    monkeypatch.setenv("JAX_CLIENT_HOST", "localhost")
    monkeypatch.setenv("JAX_CLIENT_DTYPE", "")  # as if it were not set
    monkeypatch.setenv("JAX_CLIENT_WARMUP", "16, 32\t64")
    shown = cli("serve", "--show-config", "--config", file, "--port", 3)
    assert shown.err == ""
    from_file, found = f"file {file}", shown.settings
    assert found["port"] == ("3", "flag")
    assert found["host"] == ("localhost", "environment JAX_CLIENT_HOST")
    assert found["warmup"] == ("16, 32, 64", "environment JAX_CLIENT_WARMUP")
    assert found["remat"] == ("full", from_file)
    assert found["model"] == ("a/b, c/d", from_file)
    assert found["alias"] == ("x/y=a/b", from_file)
    assert found["mesh"] == ("fsdp=2", from_file)
    assert found["precompile"] == ("false", from_file)
    assert found["autosave_minutes"] == ("never", from_file)
    assert found["max_tokens_per_micro_batch"] == ("512", from_file)
    assert found["dtype"] == ("auto", "default") and found["memory_fraction"] == ("0.9", "default")
    # The same file by the environment, and what the environment says goes before it.
    monkeypatch.setenv("JAX_CLIENT_CONFIG", str(file))
    monkeypatch.setenv("JAX_CLIENT_MODEL", "e/f,g/h i/j")
    monkeypatch.setenv("JAX_CLIENT_PRECOMPILE", "1")
    found = cli("serve", "--show-config").settings
    assert found["port"] == ("2", "environment JAX_CLIENT_PORT")
    assert found["model"] == ("e/f, g/h, i/j", "environment JAX_CLIENT_MODEL")
    assert found["precompile"] == ("true", "environment JAX_CLIENT_PRECOMPILE")
    assert found["remat"] == ("full", from_file)
    # One file does for `run`, whose server is private.
    found = cli("run", "--show-config").settings
    assert found["remat"] == ("full", from_file) and not {"host", "port", "api_key"} & set(found)


def test_every_setting_of_the_engine_can_be_said():
    options = {option.name: option for option in SHARED}
    for each in fields(EngineConfig):
        assert each.name in options, f"EngineConfig.{each.name} has no flag"


def test_where_the_state_directory_is_said(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text('state_dir = "/from/file"')
    said = lambda *more, before=(): cli(*before, "serve", "--show-config", *more).settings["state_dir"]  # noqa: E731
    assert said()[1] == "default"
    assert said("--config", file) == ("/from/file", f"file {file}")
    monkeypatch.setenv("JAX_CLIENT_HOME", "/from/home")
    assert said("--config", file) == ("/from/home", "environment JAX_CLIENT_HOME")
    monkeypatch.setenv("JAX_CLIENT_STATE_DIR", "/from/variable")
    assert said("--config", file) == ("/from/variable", "environment JAX_CLIENT_STATE_DIR")
    assert "No runs under /from/variable." in cli("runs", "list").err
    assert said(before=("--state-dir", "/before")) == ("/before", "flag")
    assert said("--state-dir", "/after", before=("--state-dir", "/before")) == ("/after", "flag")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "'prot' is no setting. Did you mean 'port'?"),
        ("xyzzy = 1", "'xyzzy' is no setting. There are "),
        ("port = 70000", "port: 70000 is not in the range"),
        ("port = true", "port: it is a bool"),
        ("port = 1.5", "port: '1.5' is not a valid integer"),
        ('precompile = "yes"', "precompile: it is neither true nor false"),
        ('mesh = "wide"', "mesh: 'wide' is no mesh"),
        ('alias = "a"', "alias: 'a' is no alias"),
        ("dtype = 'int8'", "dtype: 'int8' is not one of"),
        ("host = ['a']", "host: it is a list"),
        ("memory-fraction = 1\nmemory_fraction = 1", "'memory_fraction' is there twice"),
        ("port 1", "Expected '='"),
    ],
)
def test_a_wrong_file_is_explained(cli, tmp_path, text, said):
    file = tmp_path / "c.toml"
    file.write_text(text)
    error = cli("serve", "--show-config", "--config", file).error(2)
    assert f"error: {file}: " in error and said in error


def test_wrong_settings_are_wrong_usage(cli, tmp_path, monkeypatch):
    assert "does not exist" in cli("serve", "--config", tmp_path / "none").error(2)
    assert "stands for 'b' and 'c'" in cli("serve", "--alias", "a=b", "--alias", "a=c").error(2)
    assert "has an axis 'wide'" in cli("serve", "--mesh", "wide=2").error(2)
    assert "object store" in cli("serve", "--state-dir", "gs://bucket/x").error(2)
    assert "mirror is 'not-a-url'" in cli("serve", "--mirror", "not-a-url").error(2)
    monkeypatch.setenv("JAX_CLIENT_PORT", "many")
    assert "JAX_CLIENT_PORT" in cli("serve").error(2)
    monkeypatch.delenv("JAX_CLIENT_PORT")
    monkeypatch.setenv("JAX_CLIENT_MODELS", "a/b")
    warning = cli("serve", "--show-config").err
    assert warning == "warning: the environment's JAX_CLIENT_MODELS is no setting; did you mean JAX_CLIENT_MODEL?\n"


def test_the_key_is_never_shown(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text(f'api_key = "{KEY}"')
    shown = cli("serve", "--show-config", "--config", file)
    assert shown.settings["api_key"] == ("(set)", f"file {file}")
    outputs = [shown, cli("serve", "--show-config", "--api-key", KEY)]
    for bad in (KEY[4:], KEY + " x"):
        file.write_text(f'api_key = "{bad}"')
        outputs.append(cli("serve", "--config", file))
        outputs.append(cli("serve", "--api-key", bad))
    file.write_text(f'api_key = ["{KEY}"]')
    outputs.append(cli("serve", "--config", file))
    monkeypatch.setenv("JAX_CLIENT_API_KEY", KEY)
    outputs.append(cli("serve", "--show-config"))
    assert [each.code for each in outputs] == [0, 0, 2, 2, 2, 2, 2, 0]
    for each in outputs:
        assert KEY[4:] not in each.out + each.err


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


def test_a_state_directory_has_one_server(cli, tmp_path):
    claim = run_lock.claim(tmp_path)
    try:
        for arguments, advice in (
            (["serve", "--port", "0"], "stop that one, or give another --state-dir."),
            (["run", "--", sys.executable], "start it without 'jax_client run'"),
        ):
            error = cli("--state-dir", tmp_path, *arguments).error(1)
            assert f"{tmp_path} is served by process {os.getpid()} on " in error and advice in error
    finally:
        claim.release()


def test_names_of_one_model_share_one_copy(model, tmp_path, monkeypatch):
    from tinker import types

    from jax_client.server.state.server import Server

    opened = []
    original = base_models.open_engine
    monkeypatch.setattr(base_models, "open_engine", lambda *args: opened.append(args) or original(*args))
    link = tmp_path / "link"
    link.symlink_to(model)
    config = EngineConfig(
        dtype="float32", state_dir=tmp_path / "home", precompile=False, compilation_cache_dir="", record_metrics=False
    )
    server = Server(config, {"Some/Model": model})
    try:
        for number, name in enumerate(("Some/Model", model, str(link), os.path.relpath(model))):
            about = types.CreateSessionRequest(tags=[], user_metadata=None, sdk_version="0.38")
            session = server.create_session(about).session_id
            request = types.CreateModelRequest(
                session_id=session, model_seq_id=0, base_model=name, lora_config=types.LoraConfig(rank=4)
            )
            server.training.create_model(request, bytes([number])).answer.result(60)
            assert server.training.run(f"{session}:train:0").model_ref.model.engine is not None
        assert len(opened) == 1
    finally:
        server.close(30)


def test_progress_of_a_load_is_told(model, tmp_path, monkeypatch):
    config = EngineConfig(
        dtype="float32", state_dir=tmp_path, precompile=False, compilation_cache_dir="", record_metrics=False
    )
    seen: list[Progress] = []
    half, go_on = threading.Event(), threading.Event()
    tell = base_models._Entry.set_progress

    def set_progress(entry: Any, progress: Progress) -> None:
        tell(entry, progress)
        seen.append(progress)
        if progress.done > progress.total / 2 and not half.is_set():
            half.set()
            go_on.wait(30)

    monkeypatch.setattr(base_models._Entry, "set_progress", set_progress)
    assert base_models.progress(model, config) is None
    loading = background(lambda: base_models.acquire(model, config), "test")
    assert half.wait(30)
    text, progress = base_models.progress(model, config), base_models.loading(model, config)
    assert text is not None and text.startswith("loading ") and text.endswith(" kB")
    assert progress is not None and progress.total / 2 < progress.done < progress.total
    go_on.set()
    lease = loading.result(60)
    try:
        assert seen[-1].done == seen[-1].total == lease.model.engine.describe()["memory_bytes"]["weights"]
        assert [each.done for each in seen] == sorted(each.done for each in seen)
        assert base_models.progress(model, config) is None and base_models.loading(model, config) is None
        compiling = [{"program": "forward", "shapes": "8x512", "seconds": 1.0}]
        monkeypatch.setattr(lease.model.engine, "health", lambda: {"state": "compiling", "compiling": compiling})
        assert base_models.progress(model, config) == "compiling forward (8x512)"
    finally:
        base_models.release(lease)
    assert base_models.progress(model, config) is None and not base_models._named
    with pytest.raises(Exception, match="no such file"):
        base_models.acquire("./none", config)
    assert not base_models._named


@pytest.mark.parametrize("hidden", [False, True])
def test_progress_of_a_download_is_told(tmp_path, monkeypatch, hidden):
    def snapshot_download(name: str, *, tqdm_class: Any, **_: Any) -> str:
        files = tqdm_class(total=2, desc="Fetching 2 files", disable=hidden)
        body = tqdm_class(desc="bytes", total=0, initial=0, unit="B", unit_scale=True, disable=hidden)
        for size in (3_000_000_000, 1_000_000_000):
            body.total += size
            body.update(size // 2)
            body.update(size // 2)
            files.update(1)
        for bar in (files, body):
            bar.close()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    seen: list[str] = []
    with observed(lambda progress: seen.append(str(progress))):
        assert hub.download("a/b", []) == tmp_path
    assert seen == ["downloading", *(f"downloading {x} GB" for x in ("1.5/3.0", "3.0/3.0", "3.5/4.0", "4.0/4.0"))]
    # Nobody asked: nobody is told.
    hub.download("a/b", [])
    Counter("loading", 10).add(5)
    assert len(seen) == 5


def test_a_wait_is_shown_as_lines_or_alive(capsys, monkeypatch):
    texts = iter(["downloading m", "downloading m 1/2 GB", "loading m", "loading m 1/2 GB"])
    last = ["-"]

    def about() -> str:
        last.append(next(texts, last[-1]))
        return last[-1]

    assert stages.wait(background(lambda: time.sleep(1) or 7, "test"), about) == 7
    assert capsys.readouterr().err.splitlines() == ["downloading m", "loading m"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert stages.wait(background(lambda: time.sleep(0.5) or 8, "test"), lambda: "loading [red]m") == 8
    shown = capsys.readouterr().err
    assert "loading [red]m" in shown and shown.count("\n") <= 2


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
    monkeypatch.setattr(run_command, "_in_foreground", lambda: False)
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
    child = run_command._Child()
    program = ["sh", "-c", f"exec {sys.executable} -c '{code}' > {ready}"]
    assert child.run(program, dict(os.environ)) == expected
    assert child.hurried == bool({signal.SIGTERM, signal.SIGHUP} & set(sent))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_ctrl_c_of_the_terminal_reaches_a_program_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_command, "_in_foreground", lambda: True)
    child = run_command._Child()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    # The terminal is not there to send it: were it passed on, the program would end with 130.
    assert child.run([sys.executable, "-c", "import time; time.sleep(1.5)"], dict(os.environ)) == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start the command line in a process of its own, without torch."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        home = tmp_path / "home"
        own = {"HOME": home, "DTYPE": "float32", "PRECOMPILE": "0", "COMPILATION_CACHE_DIR": home / "cache"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {f"JAX_CLIENT_{name}": str(own[name]) for name in own}
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def stages_of(lines: list[str]) -> list[str]:
    """What the lines begin with; one that takes long is said again."""
    return list(dict.fromkeys(line.split()[0] for line in lines))


def test_a_program_trains_and_is_interrupted(start, model, tmp_path):
    program = sys.executable, "-c", TRAIN
    run = start("run", "--model", model, "--alias", f"Some/Model={model}", "--", *program)
    assert run.stdout is not None
    assert run.stdout.readline() == "stepped\n", run.communicate()[1]
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (130, ""), err
    own = ["state", "loading", "loaded", "ready:", "stopping:"]
    assert [word for word in stages_of(err.splitlines()) if word in own] == own
    assert "create_training_client_from_state_with_optimizer(" in err and "/weights/autosave-0" in err
    assert [record.step for record in CheckpointStore(tmp_path / "home").list()] == [1]
    assert run_lock.owner(tmp_path / "home") is None


def test_a_server_starts_without_torch_and_compiles(start, model):
    server = start("serve", "--port", "0", "--model", model, "--warmup", "16", "--warmup-rank", "4")
    assert server.stderr is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("ready: "):
        lines.append(server.stderr.readline())
        assert lines[-1], lines
    assert stages_of(lines) == ["state", "loading", "loaded", "compiling", "compiled", "ready:"]
    assert " programs, " in lines[-2] and not lines[-2].startswith(f"compiled {model}: 0 ")
    # The terminal goes: it saves and ends as on SIGTERM.
    server.send_signal(signal.SIGHUP)
    assert "stopping: " in server.communicate(timeout=120)[1]
    assert server.returncode == 128 + signal.SIGHUP
