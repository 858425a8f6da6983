"""Can a key do anything with what is another key's? Every route of the server is tried with every kind of name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from jax_client.runs.results import run_metrics
from jax_client.server.app import routes
from support.fake_engine import DATA, MODEL
from support.server.serving import API, forward_backward_body
from support.server.two_keys import GRAPH, INPUTS, PROMPT, Belongings, Team, belongings

pytestmark = pytest.mark.filterwarnings("ignore")
ADAM = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
Body = Any


class Case(NamedTuple):
    """A request that names things of `its`, sent by the client that has `own`.

    Attributes:
        ask: `ask(its, own) -> (path, body)`; the path is below /api/v1, or whole.
        status: of the response, to a client to whom these things do not belong. With 200 the answer comes later, and
            has to be a refusal.
    """

    ask: Callable[[Belongings, Belongings], tuple[str, Body]]
    status: int = 404


def posted(name: str, body: Callable[[Belongings], Body]) -> list[Case]:
    return [Case(lambda its, _: (f"/{name}", body(its)))]


def on_model(name: str, **fields: Any) -> list[Case]:
    return posted(name, lambda its: {"model_id": its.model, "seq_id": its.number, **fields})


def on_checkpoint(end: str = "", body: Body = None, kinds: tuple[str, ...] = ("weights",)) -> list[Case]:
    def case(kind: str) -> Case:
        return Case(lambda its, _: (f"/training_runs/{its.model}/checkpoints/{kind}/a{end}", body))

    return [case(kind) for kind in kinds]


def got(path: str, body: Body = None) -> list[Case]:
    return [Case(lambda its, _: (path.format(session=its.session, run=its.model, sampler=its.sampler), body))]


LISTS: list[Case] = []  # names nothing: what it shows must not be another's
EVERY = ("weights", "sampler_weights", "external_weights")
TABLE: dict[tuple[str, str], list[Case]] = {
    ("POST", f"{API}/create_session"): LISTS,
    ("POST", f"{API}/client/config"): LISTS,
    ("POST", f"{API}/client/dynamic_config"): LISTS,
    ("POST", f"{API}/telemetry"): LISTS,
    ("POST", f"{API}/session_heartbeat"): posted("session_heartbeat", lambda its: {"session_id": its.session}),
    ("POST", f"{API}/sessions/{{session}}/finish"): got("/sessions/{session}/finish", {"reason": {"type": "errored"}}),
    ("POST", f"{API}/retrieve_future"): [
        *posted("retrieve_future", lambda its: {"request_id": its.future}),
        *posted("retrieve_future", lambda its: {"request_id": its.model}),
        *posted("retrieve_future", lambda its: {"request_id": f"{its.model}:1"}),
        *posted("retrieve_future", lambda its: {"request_id": its.loss}),
    ],
    ("POST", f"{API}/cancel_future"): posted("cancel_future", lambda its: {"request_id": its.future}),
    ("POST", f"{API}/create_model"): posted(
        "create_model", lambda its: {"session_id": its.session, "model_seq_id": 5, "base_model": MODEL}
    ),
    ("POST", f"{API}/create_sampling_session"): [
        *posted(
            "create_sampling_session",
            lambda its: {"session_id": its.session, "sampling_session_seq_id": 7, "base_model": MODEL},
        ),
        Case(
            lambda its, own: (
                "/create_sampling_session",
                {
                    "session_id": own.session,
                    "sampling_session_seq_id": 8,
                    "model_path": its.paths["sampler_weights"],
                },
            )
        ),
    ],
    ("POST", f"{API}/join_sampling_session"): posted(
        "join_sampling_session", lambda its: {"sampling_session_id": its.sampler}
    ),
    ("GET", f"{API}/samplers/{{sampler:path}}"): got("/samplers/{sampler}"),
    ("POST", f"{API}/asample"): posted(
        "asample",
        lambda its: {"sampling_session_id": its.sampler, "seq_id": 9, "prompt": PROMPT, "sampling_params": {}},
    ),
    ("POST", f"{API}/get_info"): posted("get_info", lambda its: {"model_id": its.model}),
    ("POST", f"{API}/create_custom_loss"): posted(
        "create_custom_loss",
        lambda its: {
            "session_id": its.session,
            "custom_loss_seq_id": 1,
            "name": "l",
            "graph": GRAPH,
            "inputs": INPUTS,
        },
    ),
    ("POST", f"{API}/forward_backward"): [
        Case(lambda its, _: ("/forward_backward", forward_backward_body(its.model, its.number, DATA))),
        Case(
            lambda its, own: (
                "/forward_backward",
                forward_backward_body(own.model, own.number, DATA, loss_id=its.loss),
            ),
            status=200,
        ),
    ],
    ("POST", f"{API}/optim_step"): on_model("optim_step", adam_params=ADAM),
    ("POST", f"{API}/save_weights"): on_model("save_weights", path="b"),
    ("POST", f"{API}/save_weights_for_sampler"): on_model("save_weights_for_sampler", path="b"),
    ("POST", f"{API}/save_weights_external"): on_model("save_weights_external", path="b"),
    ("POST", f"{API}/load_weights"): [
        Case(
            lambda its, own: (
                "/load_weights",
                {"model_id": its.model, "seq_id": its.number, "path": own.paths["weights"], "optimizer": False},
            )
        ),
        Case(
            lambda its, own: (
                "/load_weights",
                {"session_id": its.session, "model_seq_id": 6, "path": own.paths["weights"], "optimizer": True},
            )
        ),
        Case(
            lambda its, own: (
                "/load_weights",
                {"model_id": own.model, "seq_id": own.number, "path": its.paths["weights"], "optimizer": True},
            ),
            status=200,
        ),
        Case(
            lambda its, own: (
                "/load_weights",
                {"session_id": own.session, "model_seq_id": own.number, "path": its.paths["weights"]}
                | {"optimizer": True},
            ),
            status=200,
        ),
    ],
    ("GET", f"{API}/get_server_capabilities"): LISTS,
    ("GET", f"{API}/training_runs"): LISTS,
    ("GET", f"{API}/training_runs/{{run}}"): got("/training_runs/{run}"),
    ("GET", f"{API}/training_runs/{{run}}/checkpoints"): got("/training_runs/{run}/checkpoints"),
    ("GET", f"{API}/checkpoints"): LISTS,
    ("POST", f"{API}/weights_info"): [
        Case(lambda its, _, kind=kind: ("/weights_info", {"tinker_path": its.paths[kind]})) for kind in EVERY
    ],
    ("POST", f"{API}/copy_weights"): posted(
        "copy_weights", lambda its: {"source_path": its.paths["weights"], "destination_project_id": "p"}
    ),
    ("PUT", f"{API}/training_runs/{{run}}/checkpoints/{{kind}}/{{name}}/ttl"): on_checkpoint(
        "/ttl", {"ttl_seconds": 99_999}, EVERY
    ),
    ("POST", f"{API}/training_runs/{{run}}/checkpoints/{{kind}}/{{name}}/publish"): on_checkpoint("/publish"),
    ("DELETE", f"{API}/training_runs/{{run}}/checkpoints/{{kind}}/{{name}}/publish"): on_checkpoint("/publish"),
    ("GET", f"{API}/training_runs/{{run}}/checkpoints/{{kind}}/{{name}}/external_weights_urls"): on_checkpoint(
        "/external_weights_urls", kinds=("external_weights",)
    ),
    ("DELETE", f"{API}/training_runs/{{run}}/checkpoints/{{kind}}/{{name}}"): on_checkpoint(kinds=EVERY),
    # A link carries a signature in place of a key, and without one it opens nothing, whoever asks.
    ("GET", f"{API}/downloads/{{run}}/{{name}}/{{file:path}}"): [
        Case(lambda its, _: (f"/downloads/{its.model}/a/f?expires=9&signature=9", None), status=403)
    ],
    ("GET", f"{API}/sessions"): LISTS,
    ("GET", f"{API}/sessions/{{session}}"): got("/sessions/{session}"),
    ("PUT", f"{API}/sessions/{{session}}/project"): got("/sessions/{session}/project", {"project_id": "p"}),
    ("GET", f"{API}/metrics/runs"): LISTS,
    ("GET", f"{API}/metrics/runs/{{run}}"): [
        *got("/metrics/runs/{run}"),
        *got("/metrics/runs/{run}?points=9"),
        *got("/metrics/runs/{run}?since=1-1"),
    ],
    ("GET", f"{API}/metrics/engines"): LISTS,
    ("GET", f"{API}/healthz"): LISTS,
    ("GET", "/healthz"): LISTS,
    ("GET", "/metrics"): LISTS,
    # Of a hosted service only: refused whatever they name.
    ("GET", f"{API}/sessions/{{session}}/trace_export"): LISTS,
    ("POST", f"{API}/sessions/search"): LISTS,
    ("GET", f"{API}/audit"): LISTS,
    ("GET", f"{API}/billing/usage/events"): LISTS,
    ("GET", f"{API}/billing/usage/checkpoints/current"): LISTS,
}
LIST_BODIES: dict[str, Body] = {
    f"{API}/create_session": {"tags": [], "user_metadata": None, "sdk_version": "0.38"},
    f"{API}/telemetry": {"events": []},
}


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    with pytest.MonkeyPatch.context() as patch:
        export = lambda directory, *_: (directory / "f").write_bytes(b"x")  # noqa: E731
        patch.setattr("jax_client.weights.write.peft.write_adapter", export)
        checked = SimpleNamespace(tokens=1, difference=0.0)
        patch.setattr("jax_client.runs.lifecycle.export_check.check_export", lambda *_: checked)
        found = Team(tmp_path / "state", {"a": (), "b": (), "ops": ("admin",)})
        yield found
        found.close()


def memory_of(team: Team, who: str) -> Any:
    """What a key's server knows and counts."""
    server = team.servers.by_name[who]
    live, ledger, account = server.live, server.ledger, server.account
    tables = (live.sessions, live.models, live.samplers, live.losses)
    return {
        "tables": [[key for key, _ in table.items()] for table in tables],
        "open": [not session.closed for session in live.sessions.values()],
        "info": [session.info for session in live.sessions.values()],
        "answered": [(key, request.answer.result()) for key, request in ledger._answered.items()],
        "unanswered": [request.request_id for request in ledger.unanswered()],
        "next": {model: ledger.queues.of(model).next_number for model, _ in live.models.items()},
        "records": live._records._memory,
        "used": [account.used(kind) for kind in account._quota],
        "totals": account.totals,
        "device": [[engine.log for engine in team.models.opened]],
    }


def disk(place: Path, session: str) -> dict[str, tuple[int, int, int]]:
    """Every file of a session's runs, with its inode, size and time."""
    found = {}
    for parent, _, names in os.walk(place):
        for path in (os.path.join(parent, name) for name in names):
            if session in path:
                status = os.stat(path)
                found[path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def asked(team: Team, who: str, method: str, case: Case, its: Belongings, own: Belongings) -> tuple[int, bytes, bytes]:
    """Send a request; return the status, the body, and what the answer says that comes later."""
    path, body = case.ask(its, own)
    answer = team.call(who, method, API + path, body)
    if answer.status != 200 or b'"request_id"' not in answer.body:
        return answer.status, answer.body, b""
    own.number += case.status == 200
    return answer.status, b"", team.answer_of(who, answer.json["request_id"]).body


def test_every_route_has_its_entry(team: Team) -> None:
    known = {(method, route.path) for route in routes(team.servers.host) for method in {*(route.methods or ())}}
    assert {each for each in known if each[0] != "HEAD"} == set(TABLE)


def test_another_key_gets_what_an_unknown_name_gets_and_changes_nothing(team: Team) -> None:
    theirs = belongings(team, "a", DATA)
    own = {who: belongings(team, who, DATA) for who in ("b", "ops")}
    unknown = theirs.renamed(str(uuid.uuid4()))
    run_metrics.shared.flush()
    before, files = repr(memory_of(team, "a")), disk(team.state_dir, theirs.session)
    for (method, path), cases in TABLE.items():
        for who in own:
            if not cases:
                shown = team.call(who, method, path, LIST_BODIES.get(path, {} if method == "POST" else None))
                assert theirs.session.encode() not in shown.body, (who, method, path)
            for i, case in enumerate(cases):
                status, body, late = asked(team, who, method, case, theirs, own[who])
                assert status == case.status and (status != 200 or b'"error"' in late), (who, method, path, i, body)
                same = asked(team, who, method, case, unknown, own[who])
                names = theirs.session.encode(), unknown.session.encode()
                assert same == (status, body.replace(*names), late.replace(*names)), (who, method, path, i)
        assert repr(memory_of(team, "a")) == before, (method, path)
        assert disk(team.state_dir, theirs.session) == files, (method, path)
    assert files
    the_owner_itself_is_not_refused(team, theirs)


def the_owner_itself_is_not_refused(team: Team, theirs: Belongings) -> None:
    """The same requests as the owner sends them: else a wrong body would look like isolation."""
    last = ("POST", f"{API}/sessions/{{session}}/finish")
    deletes = [each for each in TABLE if each[0] == "DELETE"]
    for each in [*(key for key in TABLE if key != last and key not in deletes), *deletes, last]:
        for case in TABLE[each]:
            status, body, late = asked(team, "a", each[0], case, theirs, theirs)
            assert (status in (200, 204) and b'"error"' not in late) or case.status == 403, (each, status, body, late)
            theirs.number = team.servers.by_name["a"].ledger.queues.of(theirs.model).next_number
