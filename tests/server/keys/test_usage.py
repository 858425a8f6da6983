"""Is what each key uses counted by its name, limited by its own line, and shown to it and to admins alone?"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jax_client.metrics.store import FILE_NAME, Event, MetricsStore
from jax_client.runs.listings import Listings
from jax_client.runs.results import run_metrics
from support.fake_engine import DATA, MODEL
from support.server.served_fake import LIMIT, wait_for
from support.server.serving import API, Running
from support.server.two_keys import PROMPT, Belongings, Team, belongings, session_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    monkeypatch.setattr("jax_client.weights.write.peft.write_adapter", lambda d, *_: (d / "f").write_bytes(b"x"))
    checked = SimpleNamespace(tokens=1, difference=0.0)
    monkeypatch.setattr("jax_client.runs.lifecycle.export_check.check_export", lambda *_: checked)
    found = Team(tmp_path / "state", {"a": ("sessions=1",), "b": (), "ops": ("admin",)})
    yield found
    found.close()


@pytest.fixture
def figures(team: Team, monkeypatch: pytest.MonkeyPatch) -> dict[str, Belongings]:
    """What two keys have, on an engine that says what each has used."""
    found = {who: belongings(team, who, DATA) for who in "ab"}
    (engine,) = team.models.opened
    usage = {"owner_seconds": {"a": 2.5, "b": 0.5, "": 9.0}}
    monkeypatch.setattr("jax_client.server.ops.families._of_engines", lambda _: [])
    monkeypatch.setattr(engine.monitor, "usage", lambda: usage)
    return found


def values(team: Team, who: str) -> dict[str, float]:
    text = team.call(who, "GET", "/metrics").body.decode()
    found = re.findall(r"^jax_client_(key_\S+) (\S+)$", text, re.M)
    return {name: float(value) for name, value in found}


def test_each_keys_use_is_counted_by_its_name(team: Team, figures: dict[str, Belongings]) -> None:
    seen = values(team, "ops")
    for who in "ab":
        assert seen[f'key_trained_tokens_total{{key="{who}"}}'] == 3
        assert seen[f'key_samples_total{{key="{who}"}}'] == 1 and seen[f'key_sampled_tokens_total{{key="{who}"}}'] == 2
        assert seen[f'key_requests_total{{key="{who}"}}'] > 8 and seen[f'key_refused_total{{key="{who}"}}'] == 0
        assert seen[f'key_in_use{{key="{who}",kind="sessions"}}'] == 1
        assert seen[f'key_in_use{{key="{who}",kind="bytes"}}'] == 0
    page = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()
    documented = set(re.findall(r"`jax_client_(key_[a-z_]+)`", page))
    assert {name.partition("{")[0] for name in seen} == documented
    assert seen['key_limit{key="a",kind="sessions"}'] == 1 < seen['key_limit{key="b",kind="sessions"}']
    assert seen['key_device_seconds_total{key="a",model="tiny/model"}'] == 2.5
    assert not any(secret in str(seen) for secret in team.secrets.values())


def test_the_check_of_an_export_is_paid_by_its_key(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    payers = []

    def check(engine: Any, state: Any, directory: Path, owner: str) -> Any:
        payers.append(owner)
        return SimpleNamespace(tokens=1, difference=0.0)

    monkeypatch.setattr("jax_client.runs.lifecycle.export_check.check_export", check)
    for who in "ab":
        belongings(team, who, DATA)
    assert payers == ["a", "b"]


def test_a_key_sees_its_own_figures_and_an_admin_all(team: Team, figures: dict[str, Belongings]) -> None:
    assert set(values(team, "a")) == {name for name in values(team, "ops") if 'key="a"' in name}
    for who, shown in (("a", {"a"}), ("b", {"b"}), ("ops", {"a", "b"})):
        text = team.call(who, "GET", "/metrics").body.decode()
        assert {key for key in "ab" if figures[key].model in text} == shown
    assert team.call("a", "GET", "/healthz").json == {"status": "ok"}
    assert {"engines", "losses"} < team.call("ops", "GET", "/healthz").json.keys()
    assert team.call("a", "GET", f"{API}/metrics/engines").status == 403
    assert team.call("ops", "GET", f"{API}/metrics/engines").status == 200


def test_the_metrics_of_a_run_show_what_its_engine_does_to_an_admin_alone(team: Team) -> None:
    """The engine works for all keys."""
    for who, shown in (("a", False), ("ops", True)):
        its = belongings(team, who, DATA)
        step = {"model_id": its.model, "seq_id": its.number, "adam_params": {"learning_rate": 0.1}}
        team.done(who, "optim_step", step)
        run_metrics.shared.flush()
        store = MetricsStore(team.state_dir / FILE_NAME)
        assert store.add(events=[Event(run=its.model, kind="compile", step=1, time=1.0, details={"shapes": "1x8"})])
        for query in ("?", "?points=9&"):
            found = team.call(who, "GET", f"{API}/metrics/runs/{its.model}{query}").json
            kinds = {each["kind"] for each in found["points"]}, {each["kind"] for each in found["events"]}
            assert {"step"} < kinds[0] if shown else kinds[0] == {"step"}
            assert ("device" in kinds[0], "compile" in kinds[1]) == (shown, shown) and {"start", "save"} <= kinds[1]
        # Whoever follows the run page by page comes to its end all the same.
        since, seen, more = "0-0", [], True
        while more:
            page = team.call(who, "GET", f"{API}/metrics/runs/{its.model}?limit=1&since={since}").json
            seen += [each["kind"] for each in page["points"] + page["events"]]
            assert since != page["next"]
            since, more = page["next"], page["more"]
        assert sorted(seen) == sorted(each["kind"] for each in found["points"] + found["events"])


def test_an_ill_engine_is_named_to_an_admin_alone(
    team: Team, figures: dict[str, Belongings], monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = team.models.opened
    ill = {"state": "stuck", "waiting": 17, "stalled_seconds": 400.0, "compiling": []}
    monkeypatch.setattr(engine.monitor, "health", lambda: ill)
    told = {who: team.call(who, "GET", "/healthz") for who in ("a", "ops")}
    assert [each.status for each in told.values()] == [503, 503]
    assert "17 requests" in told["ops"].json["status"] and MODEL in told["ops"].json["status"]
    assert told["a"].json.keys() == {"status"} and "stuck or dead" in told["a"].json["status"]
    assert "17" not in told["a"].json["status"] and MODEL not in told["a"].json["status"]


def test_every_sample_counts_and_one_call_asks_for_no_more_than_its_key_may_have(tmp_path: Path) -> None:
    team = Team(tmp_path / "state", {f"k{i}": () for i in range(10)})
    try:
        session = session_of(team, "k0")
        asked = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = team.post("k0", "create_sampling_session", asked)["sampling_session_id"]
        body = {"sampling_session_id": sampler, "prompt": PROMPT, "sampling_params": {"max_tokens": 4}}
        refused = team.call("k0", "POST", f"{API}/asample", body | {"seq_id": 0, "num_samples": 6_001})
        assert refused.status == 400
        assert all(word in refused.json["detail"] for word in ("num_samples is 6,001", "6,000", "several times"))
        team.answer_of("k0", team.post("k0", "asample", body | {"seq_id": 1})["request_id"])
        (engine,) = team.models.opened
        engine.gate.clear()
        taken = team.post("k0", "asample", body | {"seq_id": 2, "num_samples": 6_000})
        assert len(taken["sample_sequence_ids"]) == 6_000 == team.servers.whole.used("samples")
        busy = team.call("k0", "POST", f"{API}/asample", body | {"seq_id": 3})
        assert busy.status == 429 and "6,000 samples already" in busy.json["detail"]
        engine.gate.set()
        team.answer_of("k0", taken["request_id"])
        assert [request.num_samples for request in engine.requests] == [1, 6_000]
        assert not team.servers.whole.used("samples")
    finally:
        team.models.opened[0].gate.set()
        team.close()


def test_links_and_copies_of_one_key_hold_up_no_listing_of_another(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    its, limit = belongings(team, "a", DATA), team.servers.accounts["a"].limit("file_checks")
    gate = threading.Event()
    for method in ("exported_files", "copy"):
        work = getattr(Listings, method)

        def held(*args: Any, work: Any = work) -> Any:
            assert gate.wait(LIMIT)
            return work(*args)

        monkeypatch.setattr(Listings, method, held)
    running = Running(team.servers.host, between=lambda _: team.app)
    links = f"/training_runs/{its.model}/checkpoints/external_weights/a/external_weights_urls"
    copy = {"source_path": its.paths["weights"], "destination_project_id": "p"}

    def asked(who: str, path: str, body: Any = None) -> int:
        headers, method = {"X-API-Key": team.secrets[who]}, "GET" if body is None else "POST"
        return httpx.request(method, running.url + API + path, json=body, headers=headers, timeout=20).status_code

    with ThreadPoolExecutor(40) as pool:
        try:
            sent = [pool.submit(asked, "a", *each) for each in [(links,), ("/copy_weights", copy)] * 20]
            wait_for(lambda: sum(each.done() for each in sent) == len(sent) - limit)
            assert asked("b", "/training_runs") == 200
            assert {each.result() for each in sent if each.done()} == {429}
        finally:
            gate.set()
    assert sorted({each.result() for each in sent}) == [200, 429]
    assert asked("a", links) == 200 and not team.servers.whole.used("file_checks")
    running.stop()


def test_a_limit_of_one_key_is_no_other_keys(team: Team) -> None:
    asked = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
    assert team.call("a", "POST", f"{API}/create_session", asked).status == 200
    refused = team.call("a", "POST", f"{API}/create_session", asked)
    assert refused.status == 429 and "the limit is 1" in refused.json["detail"]
    for _ in range(3):
        assert team.call("b", "POST", f"{API}/create_session", asked).status == 200
    assert team.servers.whole.used("sessions") == 4
    seen = team.servers.accounts
    assert seen["a"].totals["refused"] == 1 and not seen["b"].totals["refused"]


def test_a_wrong_key_is_let_in_nowhere(team: Team) -> None:
    assert team.call("a", "GET", f"{API}/sessions").status == 200
    for wrong in ("tml-wrong", "", team.secrets["a"][:-1], team.keys[0].digest.hex()):
        assert team.call(wrong, "GET", f"{API}/sessions").status == 401
