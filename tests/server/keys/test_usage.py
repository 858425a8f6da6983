"""Is what each key uses counted by its name, limited by its own line, and shown to it and to admins alone?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.fake_engine import DATA
from support.server.serving import API
from support.server.two_keys import Belongings, Team, belongings

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


def test_a_key_sees_its_own_figures_and_an_admin_all(team: Team, figures: dict[str, Belongings]) -> None:
    assert set(values(team, "a")) == {name for name in values(team, "ops") if 'key="a"' in name}
    for who, shown in (("a", {"a"}), ("b", {"b"}), ("ops", {"a", "b"})):
        text = team.call(who, "GET", "/metrics").body.decode()
        assert {key for key in "ab" if figures[key].model in text} == shown
    assert team.call("a", "GET", "/healthz").json == {"status": "ok"}
    assert {"engines", "losses"} < team.call("ops", "GET", "/healthz").json.keys()
    assert team.call("a", "GET", f"{API}/metrics/engines").status == 403
    assert team.call("ops", "GET", f"{API}/metrics/engines").status == 200


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
