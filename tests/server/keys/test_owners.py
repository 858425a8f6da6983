"""Does what a key's clients wrote stay theirs: over restarts, without keys before or after, published, and damaged?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.listings import Listings
from jax_client.server.state.request_log import RequestLog
from jax_client.values import CheckpointKey, Owner
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, FakeModels, step
from support.fake_engine import PROMPT as PROMPT_INPUT
from support.server.serving import API, Running, forward_backward_body
from support.server.two_keys import PROMPT, Team, belongings, model_of, session_of

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES: dict[str, tuple[str, ...]] = {"a": (), "b": (), "ops": ("admin",)}


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine's adapters have no form of peft's."""
    monkeypatch.setattr("jax_client.weights.write.peft.write_adapter", lambda d, *_: (d / "f").write_bytes(b"x"))
    checked = SimpleNamespace(tokens=1, difference=0.0)
    monkeypatch.setattr("jax_client.runs.lifecycle.export_check.check_export", lambda *_: checked)


@contextmanager
def team_on(state_dir: Path, *, logged: bool = False, **more: tuple[str, ...]) -> Iterator[Team]:
    names = {**NAMES, **more}
    found = Team(state_dir, names, (lambda name: RequestLog(state_dir, name, len(names))) if logged else lambda _: None)
    try:
        yield found
    finally:
        found.close()


def listed(team: Team, who: str) -> tuple[list[str], list[str]]:
    runs = team.call(who, "GET", f"{API}/training_runs").json["training_runs"]
    checkpoints = team.call(who, "GET", f"{API}/checkpoints").json["checkpoints"]
    return sorted(run["training_run_id"] for run in runs), sorted(each["tinker_path"] for each in checkpoints)


def in_process_run(state_dir: Path) -> str:
    """Train and save without keys; return the path."""
    with jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=state_dir), _models=FakeModels()) as service:
        client = service.create_lora_training_client(MODEL, rank=4).result()
        step(client)
        return client.save_state("before").result().path


def test_runs_stay_those_of_their_key_over_restarts_and_without_keys(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with team_on(state) as team:
        mine = {who: belongings(team, who, DATA) for who in "ab"}
    for _ in range(2):
        with team_on(state, c=()) as team:
            for who, its in mine.items():
                runs, paths = listed(team, who)
                assert runs == [its.model] and set(its.paths.values()) <= set(paths)
                assert all(path.startswith(f"tinker://{its.model}/") for path in paths)
            assert listed(team, "c") == listed(team, "ops") == ([], [])
    for key in (CheckpointKey.parse(path) for path in mine["a"].paths.values()):
        assert CheckpointStore(state).record(key).metadata["owner"] == "a", "the checkpoint itself says whose it is"
    # Whoever has no keys, such as the operator's own program, has everything.
    everything = Listings(Session(jax_client.EngineConfig(state_dir=state)))
    assert {run.training_run_id for run in everything.training_runs(10, 0, None).training_runs} == {
        its.model for its in mine.values()
    }


def test_what_was_written_without_keys_is_an_admins(tmp_path: Path) -> None:
    state = tmp_path / "state"
    path = in_process_run(state)
    run = CheckpointKey.parse(path).run_id
    with team_on(state) as team:
        assert listed(team, "a") == listed(team, "b") == ([], [])
        assert listed(team, "ops")[0] == [run] and path in listed(team, "ops")[1]
        session = session_of(team, "ops")
        asked = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
        assert team.done("ops", "load_weights", asked)["model_id"] == f"{session}:train:0"
        refused = team.call("a", "POST", f"{API}/weights_info", {"tinker_path": path})
        assert refused.status == 404
        # A change of it makes it no one's.
        project = {"project_id": "p"}
        assert team.call("ops", "PUT", f"{API}/sessions/{run.partition(':')[0]}/project", project).status == 204
    assert "owner" not in CheckpointStore(state).run(run) and CheckpointStore(state).run(run)["project_id"] == "p"


def test_sessions_and_answers_continue_over_a_restart_for_their_key_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with team_on(state, logged=True) as team:
        its = belongings(team, "a", DATA)
        stepped = {"model_id": its.model, "seq_id": its.number, "adam_params": {"learning_rate": 0.1}}
        team.done("a", "optim_step", stepped)  # with gradients it would not continue
        its.number += 1
        first = team.answer_of("a", f"{its.model}:1").body
    assert sorted(path.name for path in state.glob("server*.sqlite")) == [f"server.{n}.sqlite" for n in sorted(NAMES)]
    with team_on(state, logged=True) as team:
        polled = {"request_id": f"{its.model}:1"}
        assert team.call("b", "POST", f"{API}/retrieve_future", polled).status == 404
        assert team.answer_of("a", f"{its.model}:1").body == first
        refused = team.call("b", "POST", f"{API}/forward_backward", forward_backward_body(its.model, its.number, DATA))
        assert refused.status == 404
        team.done("a", "forward_backward", forward_backward_body(its.model, its.number, DATA))
        sample = {"sampling_session_id": its.sampler, "seq_id": 4, "prompt": PROMPT, "sampling_params": {}}
        assert team.call("b", "POST", f"{API}/asample", sample).status == 404
        assert team.post("a", "asample", sample)["request_id"] == f"{its.sampler}:4"


def test_a_published_checkpoint_can_be_read_by_every_key_and_changed_by_its_own(tmp_path: Path) -> None:
    with team_on(tmp_path / "state") as team:
        its = belongings(team, "a", DATA)
        place = f"{API}/training_runs/{its.model}/checkpoints/weights/a"
        copied = {"source_path": its.paths["weights"], "destination_project_id": "p"}
        assert team.call("b", "POST", f"{API}/copy_weights", copied).status == 404
        assert team.call("a", "POST", f"{place}/publish").status == 204
        session = session_of(team, "b")
        loaded = {"session_id": session, "model_seq_id": 0, "path": its.paths["weights"], "optimizer": True}
        team.done("b", "load_weights", loaded)
        copy = team.post("b", "copy_weights", copied)["tinker_path"]
        assert team.call("b", "POST", f"{API}/weights_info", {"tinker_path": its.paths["weights"]}).status == 200
        # It is not listed for others, nor is anything else of its run to be had, and no one else changes it.
        assert listed(team, "b")[1] == [copy] and copy not in listed(team, "a")[1]
        others = {"tinker_path": its.paths["sampler_weights"]}
        assert team.call("b", "POST", f"{API}/weights_info", others).status == 404
        for method, end in (("DELETE", ""), ("DELETE", "/publish"), ("PUT", "/ttl")):
            body = {"ttl_seconds": 3600} if method == "PUT" else None
            assert team.call("b", method, place + end, body).status == 404, (method, end)
        assert team.call("a", "DELETE", f"{place}/publish").status == 204
        assert team.call("b", "POST", f"{API}/copy_weights", copied).status == 404
        token = copied | {"weights_access_token": "tml-any"}
        assert "publish" in team.call("b", "POST", f"{API}/copy_weights", token).json["detail"]
        token = loaded | {"model_seq_id": 1, "weights_access_token": "tml-any"}
        assert team.call("b", "POST", f"{API}/load_weights", token).status == 400


def test_errors_of_what_others_may_read_name_nothing_else_of_its_run(tmp_path: Path) -> None:
    """A damaged checkpoint, and a link whose export is gone, tell their own key alone what else there is."""
    with team_on(tmp_path / "state") as team:
        its = belongings(team, "a", DATA)
        names = {"save_weights": "mine-alone", "save_weights_external": "mine-too"}
        for name, path in names.items():
            team.done("a", name, {"model_id": its.model, "seq_id": its.number, "path": path})
            its.number += 1
        place = f"{API}/training_runs/{its.model}/checkpoints"
        assert team.call("a", "POST", f"{place}/weights/a/publish").status == 204
        (manifest,) = (tmp_path / "state").glob("runs/*/weights/a/*/manifest.json")
        manifest.write_bytes(b"{" + manifest.read_bytes())
        asked = {"tinker_path": its.paths["weights"]}
        told = {who: team.call(who, "POST", f"{API}/weights_info", asked) for who in "ab"}
        assert "weights/mine-alone" in told["a"].json["detail"]
        assert told["b"].status == 400 and "cannot be loaded" in told["b"].json["detail"]
        assert "mine-alone" not in told["b"].json["detail"] and "Ask whoever" in told["b"].json["detail"]

        url = team.call("a", "GET", f"{place}/external_weights/a/external_weights_urls").json["urls"]["f"]
        assert team.call("a", "DELETE", f"{place}/external_weights/a").status == 204
        gone = team.call("no key", "GET", url.removeprefix("http://127.0.0.1"))
        assert gone.status == 404 and "mine-too" not in gone.json["detail"]


def test_links_to_an_export_need_no_key_and_only_its_key_gets_them(tmp_path: Path) -> None:
    with team_on(tmp_path / "state") as team:
        its = belongings(team, "a", DATA)
        make = f"{API}/training_runs/{its.model}/checkpoints/external_weights/a/external_weights_urls"
        assert team.call("b", "GET", make).status == 404
        url = team.call("a", "GET", make).json["urls"]["f"]
        link = url.removeprefix("http://127.0.0.1")
        assert team.call("no key", "GET", link).body == b"x"
        assert team.call("no key", "GET", link.replace("/a/f", "/a/g")).status == 403
        assert team.call("no key", "GET", make).status == team.call("", "GET", f"{API}/sessions").status == 401


def test_a_lost_or_damaged_record_gives_a_run_to_no_one_else(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with team_on(state) as team:
        its = belongings(team, "a", DATA)
    (record,) = state.glob("runs/*/run.json")
    stores = {who: CheckpointStore(state, owner=Owner(who, admin=who == "ops")) for who in NAMES}
    key = CheckpointKey.parse(its.paths["weights"])
    for damage in (lambda: record.write_bytes(b"{" + record.read_bytes()), record.unlink):
        damage()
        assert stores["a"].record(key).key == key and key in [each.key for each in stores["a"].list()]
        for who in ("b", "ops"):
            assert not stores[who].list() and not stores[who].list(key.run_id) and not stores[who].has_run(key.run_id)
            with pytest.raises(NotFoundError, match="it has none of this kind"):
                stores[who].record(key)
            with pytest.raises(NotFoundError, match="there is no run"):
                stores[who].run(key.run_id)


def test_memory_that_one_key_needs_is_freed_where_another_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_client.errors import DoesNotFitError
    from jax_client.server.state import eviction

    monkeypatch.setattr(eviction, "IDLE_SECONDS", 0.0)
    with team_on(tmp_path / "state") as team:
        its = {who: model_of(team, who, session_of(team, who)) for who in "ab"}
        models = {who: team.servers.by_name[who].live.models.in_memory(its[who]) for who in "ab"}

        def state() -> list[Any]:
            return [models[who].evictable.state for who in "ab"]

        left = [2]

        def make() -> str:
            if left[0]:
                left[0] -= 1
                raise DoesNotFitError("no room")
            return json.dumps(state())

        assert state() == ["live", "live"]
        assert team.servers.by_name["a"].live._eviction.make_fit(make) == '["evicted", "evicted"]'
        # It comes back when its own client asks for it.
        assert team.call("b", "POST", f"{API}/get_info", {"model_id": its["b"]}).status == 200
        assert state() == ["evicted", "live"]


def test_the_operators_models_leave_memory_that_a_key_needs(tmp_path: Path) -> None:
    from jax_client.errors import DoesNotFitError

    with team_on(tmp_path / "state") as team:
        host = team.servers.host
        host.live.own.base_model(MODEL).result(60)
        (engine,) = team.models.opened

        def make() -> str:
            if not engine.closed.is_set():
                raise DoesNotFitError("no room")
            return "fits"

        assert team.servers.by_name["b"].live._eviction.make_fit(make) == "fits"


def test_the_sdk_trains_with_its_key_and_finds_nothing_of_another(tmp_path: Path) -> None:
    with team_on(tmp_path / "state") as team:
        running = Running(team.servers.host, between=lambda _: team.app)
        try:
            services = [tinker.ServiceClient(base_url=running.url, api_key=team.secrets[who]) for who in "ab"]
            first, second = (each.create_lora_training_client(MODEL, rank=4) for each in services)
            first.forward_backward(DATA, "cross_entropy").result()
            first.optim_step(ADAM).result()
            path = first.save_state("a").result().path
            sampler = services[0].create_sampling_client(base_model=MODEL)
            assert len(sampler.sample(PROMPT_INPUT, 1, PARAMS).result().sequences) == 1
            mine, theirs = (each.create_rest_client() for each in services)
            assert [each.tinker_path for each in mine.list_user_checkpoints().result().checkpoints] == [path]
            assert not theirs.list_user_checkpoints().result().checkpoints
            with pytest.raises(tinker.NotFoundError, match="has no checkpoint"):
                theirs.get_weights_info_by_tinker_path(path).result()
            with pytest.raises(tinker.RequestFailedError, match="has no checkpoint"):
                second.load_state(path).result()
            mine.publish_checkpoint_from_tinker_path(path).result()
            assert second.load_state(path).result().path == path
            owners = {request.owner for engine in team.models.opened for request in engine.requests}
            assert owners == {"a"}
        finally:
            running.stop()
