"""How does a server start: what does it load, what does it show meanwhile, and who has the state directory?"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from typing import Any

import pytest

from jax_client.checkpoint.disk import run_lock
from jax_client.cli import stages
from jax_client.cli.program.child import Child
from jax_client.cli.serve import private_files
from jax_client.config import EngineConfig
from jax_client.engine import monitor
from jax_client.runs.lifecycle import base_models
from jax_client.runs.lifecycle.futures import background
from jax_client.weights.read import hub
from jax_client.weights.read.progress import Counter, Progress, observed
from support.command_line import stages_of

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_state_directory_has_one_server(cli, tmp_path):
    claim = run_lock.acquire(tmp_path)
    try:
        for arguments, advice in (
            (["serve", "--port", "0"], "stop that one, or give another --state-dir."),
            (["run", "--", sys.executable], "start it without 'jax_client run'"),
        ):
            error = cli("--state-dir", tmp_path, *arguments).error(1)
            assert f"{tmp_path} is served by process {os.getpid()} on " in error and advice in error
    finally:
        claim.release()


def test_a_state_directory_is_closed_to_others_or_refused(cli, tmp_path):
    home = tmp_path / "home"
    (home / "runs" / "r").mkdir(parents=True)
    (home / "runs" / "r" / "run.json").write_text("{}")
    (home / "runs" / "r" / "program").touch(0o755)
    (home / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").touch(0o644)
    for path in (home, home / "runs", home / "runs" / "r"):
        path.chmod(0o755)
    arguments = ("--state-dir", home, "serve", "--port", "0")
    error = cli(*arguments).error(1)
    assert "mode 0755" in error and "'link'" in error and f"chmod 700 {home}" in error
    assert stat.S_IMODE(home.stat().st_mode) == 0o755, "nothing was changed"
    (home / "link").rename(home / "runs" / "link")
    claim = run_lock.acquire(home)
    try:
        assert "had mode 0755; now it and its files are this user's only" in cli(*arguments).err
    finally:
        claim.release()
    modes = {path.relative_to(home).as_posix(): stat.S_IMODE(path.lstat().st_mode) for path in home.rglob("*")}
    assert {modes[name] for name in ("runs", "runs/r", "runs/r/program")} == {0o700} and modes[
        "runs/r/run.json"
    ] == 0o600
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o644, "a link is not followed"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_server_makes_files_for_its_user_only_and_its_program_does_not(tmp_path):
    before = os.umask(0o022)
    try:
        with private_files() as umask:
            (tmp_path / "state").touch()
            Child(umask).run(["touch", str(tmp_path / "program's")], dict(os.environ))
        (tmp_path / "after").touch()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"state": 0o600, "program's": 0o644, "after": 0o644}


def test_names_of_one_model_share_one_copy(model, tmp_path):
    from tinker import types

    from jax_client.server.model_names import ModelNames
    from jax_client.server.state.server import Server

    opened = []
    loader = base_models.Loader(open_engine=lambda *args: opened.append(args) or base_models.open_engine(*args))
    link = tmp_path / "link"
    link.symlink_to(model)
    config = EngineConfig(
        dtype="float32", state_dir=tmp_path / "home", precompile=False, compilation_cache_dir="", record_metrics=False
    )
    server = Server(config, ModelNames({"Some/Model": model}), base_models=base_models.BaseModels(loader))
    try:
        for number, name in enumerate(("Some/Model", model, str(link), os.path.relpath(model))):
            about = types.CreateSessionRequest(tags=[], user_metadata=None, sdk_version="0.38")
            session = server.create_session(about).session_id
            request = types.CreateModelRequest(
                session_id=session, model_seq_id=0, base_model=name, lora_config=types.LoraConfig(rank=4)
            )
            server.training.create_model(request, bytes([number])).answer.result(60)
            assert server.training.run(f"{session}:train:0").result().model_ref.model.engine is not None
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
    models = base_models.BaseModels()
    assert models.progress(model, config) is None
    loading = background(lambda: models.acquire(model, config), "test")
    assert half.wait(30)
    text, progress = models.progress(model, config), models.loading(model, config)
    assert text is not None and text.startswith("loading ") and text.endswith(" kB")
    assert progress is not None and progress.total / 2 < progress.done < progress.total
    go_on.set()
    lease = loading.result(60)
    try:
        assert seen[-1].done == seen[-1].total == lease.model.engine.monitor.describe()["memory_bytes"]["weights"]
        assert [each.done for each in seen] == sorted(each.done for each in seen)
        assert models.progress(model, config) is None and models.loading(model, config) is None
        why = {"program": "forward", "shapes": "8x512", "kind": "train", "cause": "first use", "seconds": 1.0}
        unasked = {"program": "decode", "shapes": "8 rows", "kind": "sample", "cause": "background", "seconds": 9.0}
        monkeypatch.setattr(monitor, "compiling", lambda log: [unasked, why])
        for kind in (None, "train"):
            assert models.progress(model, config, kind) == "compiling forward (8x512)"
        assert models.progress(model, config, "sample") is None, "its requests wait for no compile"
    finally:
        lease.release()
    assert models.progress(model, config) is None and not models._named
    with pytest.raises(Exception, match="no such file"):
        models.acquire("./none", config)
    assert not models._named


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
    monkeypatch.setattr(hub, "_check_config", lambda name, near: None)
    seen: list[str] = []
    with observed(lambda progress: seen.append(str(progress))):
        assert hub.download("a/b", []) == tmp_path
    assert seen == ["downloading", *(f"downloading {x} GB" for x in ("1.5/3.0", "3.0/3.0", "3.5/4.0", "4.0/4.0"))]
    # Without an observer no call is made.
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


def test_a_server_starts_without_torch_and_compiles(start, model, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = start("serve", "--port", "0", "--model", model, "--warmup", "16", "--warmup-rank", "4")
    assert server.stderr is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("ready: "):
        lines.append(server.stderr.readline())
        assert lines[-1], lines
    stages = ["state", "loading", "loaded", "compiling", "compiled", "dashboard:", "HTTP_PROXY", "ready:"]
    assert stages_of(lines) == stages
    assert "need no_proxy=127.0.0.1 NO_PROXY=127.0.0.1" in lines[-2]
    assert " programs, " in lines[-4] and not lines[-4].startswith(f"compiled {model}: 0 ")
    # The terminal goes: it saves and ends as on SIGTERM.
    server.send_signal(signal.SIGHUP)
    assert "stopping: " in server.communicate(timeout=120)[1]
    assert server.returncode == 128 + signal.SIGHUP
