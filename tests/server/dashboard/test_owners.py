"""Do several keys see their own runs on the page, by key and by cookie, and nothing of the others?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from jax_client.runs.results import run_metrics
from jax_client.server.app import build_keyed_app
from jax_client.server.dashboard.made import board_of
from jax_client.server.dashboard.watching import Watcher
from support.fake_engine import DATA, MODEL
from support.server.pages import Page
from support.server.two_keys import Belongings, Team, belongings

pytestmark = pytest.mark.filterwarnings("ignore")
API = "/dashboard/api"
NAMES = {"alice": (), "bob": (), "root": ("admin",)}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with pytest.MonkeyPatch.context() as patch:
        # The fake engine's adapters have no form of peft's.
        export = lambda directory, *_: (directory / "f").write_bytes(b"x")  # noqa: E731
        patch.setattr("jax_client.weights.write.peft.write_adapter", export)
        checked = SimpleNamespace(tokens=1, difference=0.0)
        patch.setattr("jax_client.runs.lifecycle.export_check.check_export", lambda *_: checked)
        team = Team(tmp_path_factory.mktemp("home"), NAMES)
        team.app = build_keyed_app(team.servers, hosts=["127.0.0.1"], page=True)
        yield team
        team.close()


@pytest.fixture(scope="module")
def alices(team: Team) -> Belongings:
    found = belongings(team, "alice", DATA)
    run_metrics.shared.flush()
    return found


def runs(team: Team, who: str) -> set[str]:
    return {row["run"] for row in team.call(who, "GET", f"{API}/runs").json["runs"]}


def test_each_key_has_its_own_runs(team: Team, alices: Belongings) -> None:
    bobs = belongings(team, "bob", DATA)
    assert (runs(team, "alice"), runs(team, "bob")) == ({alices.model}, {bobs.model})
    assert runs(team, "root") == set(), "an admin has what was made without keys"
    for who, own in (("alice", alices), ("bob", bobs)):
        paths = {row["path"] for row in team.call(who, "GET", f"{API}/checkpoints").json["checkpoints"]}
        assert paths and set(own.paths.values()) >= paths
        tables = team.call(who, "GET", "/dashboard/tables").body.decode()
        assert own.model in tables and ({alices.model, bobs.model} - {own.model}).pop() not in tables


def test_log_directories_are_for_admins(
    team: Team, alices: Belongings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    app = build_keyed_app(team.servers, hosts=["127.0.0.1"], page=True, logs=[tmp_path])
    monkeypatch.setattr(team, "app", app)
    sees = {who: team.call(who, "GET", f"{API}/state").json["logs"] for who in NAMES}
    assert sees == {"alice": False, "bob": False, "root": True}
    (log,) = runs(team, "root")
    assert "loop" in log and log not in runs(team, "alice")
    series = f"{API}/runs/{quote(log, safe='')}/series"
    assert {who: team.call(who, "GET", series).status for who in NAMES} == {"alice": 404, "bob": 404, "root": 200}


def test_another_keys_names_mean_nothing(team: Team, alices: Belongings) -> None:
    run, path = quote(alices.model, safe=""), alices.paths["weights"]
    asked: list[tuple[str, str, Any]] = [
        *[("GET", f"{API}/runs/{run}{end}", None) for end in ("", "/series", "/series.csv", "/rollouts")],
        ("GET", f"{API}/checkpoints?run={run}", None),
        ("GET", f"{API}/checkpoints/download?path={quote(path)}", None),
        ("GET", f"{API}/compare?runs={run}&runs=x", None),
        ("POST", f"{API}/runs/{run}/note", {"note": "mine"}),
        *[("POST", f"{API}/checkpoints/{action}", {"path": path}) for action in ("verify", "delete", "undelete")],
        ("POST", f"{API}/checkpoints/lifetime", {"path": path, "seconds": None}),
        ("POST", f"{API}/checkpoints/export", {"path": path, "format": "peft"}),
        ("POST", f"{API}/playground/sample", {"path": path, "prompt_ids": [1]}),
        ("POST", f"{API}/playground/score", {"path": path, "prompt_ids": [1], "ids": [1]}),
    ]
    json_type = [(b"content-type", b"application/json")]
    for method, where, body in asked:
        status, answer = ask_as(team, "bob", method, where, body, json_type)
        assert status == 404, (where, answer)
        status, answer = ask_as(team, "alice", method, where, body, json_type)
        assert status != 401 and (status < 400 or b"undelete" in where.encode() or status in (400, 404)), (
            where,
            answer,
        )
    tried = {route.path for route in board_of(team.servers.by_name["bob"], Watcher()).routes()}
    named = {f"{API}/runs/{{run:path}}{end}" for end in ("", "/series", "/series.csv", "/rollouts", "/note")}
    named |= {f"{API}/checkpoints/{end}" for end in ("verify", "delete", "undelete", "lifetime", "export", "download")}
    named |= {f"{API}/playground/{end}" for end in ("sample", "score")} | {f"{API}/compare", f"{API}/checkpoints"}
    nameless = {f"{API}/{end}" for end in ("state", "device", "runs", "stream")}
    nameless |= {"/", "/dashboard/static/{name:path}", "/dashboard/tables", "/dashboard/{rest:path}"}
    assert tried == named | nameless, "a new route names something, and is tried above, or names nothing"


def ask_as(team: Team, who: str, method: str, path: str, body: Any, headers: Any) -> tuple[int, bytes]:
    from support.server.asgi import ask

    path, _, query = path.partition("?")
    sent = b"" if body is None else json.dumps(body).encode()
    key = (b"x-api-key", team.secrets[who].encode())
    asked = ask(team.app, method, path, [sent], [key, *headers], query.encode())
    return team.loop.run_until_complete(asyncio.wait_for(asked, 60))


def test_the_engines_are_the_operators_to_see(team: Team, alices: Belongings) -> None:
    for who, sees in (("alice", False), ("root", True)):
        found = team.call(who, "GET", f"{API}/device").json
        assert bool(found["engines"]) is bool(found["engines"] or found["compiles"]) is sees
        assert team.call(who, "GET", f"{API}/state").json["playground"]["models"] == [MODEL]


def test_a_cookie_is_its_keys(team: Team, alices: Belongings) -> None:
    guard = team.app
    shown: list[str] = []
    guard.announce_page(shown.append)
    assert shown == [""], "there is no address that logs in as nobody"
    page = Page(guard)
    try:
        for who, sees in (("alice", True), ("bob", False), ("root", False)):
            with page.client(key=None) as client:
                assert client.get("/").status_code == 401
                assert client.post("/dashboard/login", data={"key": team.secrets[who]}).status_code == 303
                found = {row["run"] for row in client.get(f"{API}/runs").json()["runs"]}
                assert (alices.model in found) is sees, who
                with client.stream("GET", f"{API}/stream") as answer:
                    sent = ""
                    for piece in answer.iter_raw():
                        sent += piece.decode()
                        if "event: device" in sent:  # after the runs
                            break
                assert (alices.model in sent) is sees
        with page.client(key=None) as client:
            assert client.post("/dashboard/login", data={"key": ""}).status_code == 401
            assert client.post("/dashboard/login", data={"key": "tml-none"}).status_code == 401
    finally:
        page.stop()
