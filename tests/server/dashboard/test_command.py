"""Does `jax_client dashboard` show a directory that others have open, quickly, and without a device?"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from jax_client.checkpoint.disk import run_lock
from jax_client.cli import main
from jax_client.cli.dashboard import command
from jax_client.cli.dashboard.command import Accelerator
from jax_client.cli.serve import page_url
from jax_client.server import LOOPBACK
from jax_client.server.app import application
from jax_client.server.dashboard.made import page_alone
from support.command_line import GOOD, RUN, fill, python
from support.server.pages import KEY, Page

PROGRAM = "import sys; from jax_client.cli import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "dashboard", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    kill = threading.Timer(60, process.kill)
    kill.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.match(r"dashboard: (\S+)", line):
                yield process, found[1]
                return
        raise AssertionError("no address was printed")
    finally:
        kill.cancel()
        process.kill()
        with process:  # which closes the pipe, and waits
            pass


def test_it_shows_a_directory_that_is_locked(tmp_path: Path) -> None:
    home = fill(tmp_path / "home")
    claim = run_lock.acquire(home)
    try:
        with started("--state-dir", home, "--port", "0") as (process, address), httpx.Client(timeout=30) as client:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
            base = address.partition("?")[0]
            assert client.get(base).status_code == 401
            assert client.get(address, follow_redirects=True).status_code == 200
            found = client.get(f"{base}dashboard/api/runs").json()
            assert RUN in {row["run"] for row in found["runs"]}
            assert GOOD in {row["path"] for row in client.get(f"{base}dashboard/api/checkpoints").json()["checkpoints"]}
            assert not client.get(f"{base}dashboard/api/state").json()["serving"]
            assert process.stderr is not None and process.stderr.readline() != f"dashboard: {address}\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert "Traceback" not in process.stderr.read()
    finally:
        claim.release()


def test_nothing_heavy_is_imported_before_a_sample() -> None:
    done = python(
        "import sys, pathlib",
        "from jax_client.server.dashboard.made import page_alone",
        "import jax_client.cli.dashboard.command",
        "page_alone(pathlib.Path('/nonexistent/home'), api_key='tml-a', hosts=['localhost'])",
        "heavy = {'jax', 'tinker', 'torch', 'transformers', 'orbax', 'flax', 'ray'} & set(sys.modules)",
        "sys.exit(str(heavy) if heavy else 0)",
    )
    assert done.returncode == 0, done.stderr


def test_an_empty_place_is_a_page_too(tmp_path: Path) -> None:
    page = Page(page_alone(tmp_path / "none", api_key=KEY, hosts=LOOPBACK))
    try:
        with page.client() as client:
            assert client.get("/dashboard/api/runs").json()["runs"] == []
            assert client.get("/dashboard/api/checkpoints").json()["checkpoints"] == []
            assert client.get("/dashboard/api/device").json()["engines"] == []
            assert client.get("/dashboard/tables").status_code == 200
            answer = client.post("/dashboard/api/playground/sample", json={"model": "any/model", "prompt": "a"})
            assert answer.status_code == 400 and "--model" in answer.json()["detail"]
    finally:
        page.stop()
    assert not (tmp_path / "none").exists(), "looking makes nothing"


def test_notes_and_checks_are_kept_in_the_directory(tmp_path: Path) -> None:
    home = fill(tmp_path / "home")
    page = Page(page_alone(home, api_key=KEY, hosts=LOOPBACK))
    try:
        with page.client() as client:
            run = f"/dashboard/api/runs/{RUN}"
            client.post(f"{run}/note", json={"note": "look", "tags": ["a"]})
            row = client.post(f"{run}/note", json={"archived": True}).json()["row"]
            assert (row["note"], row["tags"], row["archived"]) == ("look", ["a"], True), "what is not sent stays"
            assert RUN not in {row["run"] for row in client.get("/dashboard/api/runs").json()["runs"]}
            assert client.post(f"{run}/note", json={"note": "a" * 10**5}).status_code == 400
            verified = client.post("/dashboard/api/checkpoints/verify", json={"path": GOOD}).json()["verified"]
            assert verified["ok"] and verified["error"] is None
            rows = {row["path"]: row for row in client.get("/dashboard/api/checkpoints").json()["checkpoints"]}
            assert rows[GOOD]["verified"] == verified
    finally:
        page.stop()


def test_other_machines_need_a_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["dashboard", "--state-dir", str(tmp_path), "--port", "0", "--host", "0.0.0.0"]
    assert main(arguments) == 2
    assert "--api-key" in capsys.readouterr().err
    assert page_url("0.0.0.0", 5).endswith(":5/") and "0.0.0.0" not in page_url("0.0.0.0", 5)
    assert page_url("::1", 5) == "http://[::1]:5/"


def test_the_printed_address_is_the_public_one(tmp_path: Path) -> None:
    arguments = ("--state-dir", tmp_path, "--port", "0", "--public-url", "https://Train.example.org:8443")
    with started(*arguments) as (_, address):
        assert re.fullmatch(r"https://train\.example\.org:8443/\?token=[\w-]{43}", address)


def test_a_taken_port_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with command._listening("127.0.0.1", 0) as taken:
        monkeypatch.setattr(command, "PORT", taken.getsockname()[1])
        taken.listen()
        with command._listening("127.0.0.1", None) as other:
            assert other.getsockname()[1] != taken.getsockname()[1]


def test_a_tpu_of_another_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_client.cli.doctor import devices

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    found = [SimpleNamespace(pid=41, command="python")]
    monkeypatch.setattr(devices, "accelerator_files", lambda: {"tpu": ["/dev/accel0"], "nvidia": []})
    monkeypatch.setattr(devices, "holders", lambda files: (found, 0))
    now = [0.0]
    accelerator = Accelerator(lambda: now[0])
    assert "in use by process 41 (python)" in (accelerator.refusal() or "")
    found.clear()
    assert accelerator.refusal(), "it is not looked for at every request"
    now[0] = 60.0
    assert accelerator.refusal() is None


def test_the_sdks_routes_keep_their_short_way() -> None:
    """What posts to a path without parameters is found in one look-up, however many routes the page adds."""
    from starlette.responses import PlainTextResponse

    from jax_client.server.dashboard.answers import page_route

    async def handler(request: object) -> PlainTextResponse:
        return PlainTextResponse("short")

    app = application([page_route("POST", "/api/v1/asample", handler), page_route("GET", "/{rest:path}", handler)])
    posts = next(cell.cell_contents for cell in app.__closure__ or () if isinstance(cell.cell_contents, dict))  # type: ignore[attr-defined]
    assert set(posts) == {"/api/v1/asample"}
