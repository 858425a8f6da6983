"""Does an account count all that its clients make the server keep, and stay within its quota without failing them?"""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import Future
from typing import Any

import pytest
import tinker
import zstandard
from starlette.requests import Request

from jax_client.errors import BadRequestError
from jax_client.server import session_use
from jax_client.server.routes import polling
from jax_client.server.state import live_objects
from jax_client.server.wire import admission, bodies
from jax_client.server.wire.accounts import Account, BusyError, Quota
from jax_client.server.wire.connections import WHOLE_BODY
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, poll, raw, received, sample_body, sent, wait_for
from support.server.serving import API

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start

SESSION: dict[str, Any] = {"tags": [], "user_metadata": None, "sdk_version": "0"}


def with_account(running: Any, **quota: int) -> Account:
    """The server with other quotas, also for its sessions."""
    running.server.account = running.server.live._use._account = Account(Quota(**quota))
    return running.server.account


def test_an_account_takes_all_or_nothing_and_belongs_to_a_whole() -> None:
    whole = Account(Quota(sessions=3, records=10))
    first, second = Account(Quota(sessions=2), whole), Account(Quota(sessions=2), whole)
    first.take(sessions=2, records=5)
    with pytest.raises(BusyError, match="2 sessions already, the limit is 2"):
        first.take(sessions=1, records=1)
    second.take(sessions=1, records=5)
    for refused in ({"sessions": 1}, {"records": 1}):
        with pytest.raises(BusyError, match="the clients of all keys together are at a limit") as told:
            second.take(**refused)
        assert "3" not in str(told.value) and "10" not in str(told.value), "what others have is theirs to know"
    assert (second.used("sessions"), second.used("records")) == (1, 5) and whole.used("records") == 10
    first.give(sessions=2)
    second.take(sessions=1)
    assert whole.used("sessions") == 2
    answer: Future[Any] = Future()
    assert second.count_until("id", answer, {"sessions": 1})
    assert not second.count_until("id", answer, {"sessions": 1}), "a repetition counts once"
    answer.set_result(None)
    assert second.used("sessions") == 1 == whole.used("sessions")


@pytest.mark.parametrize("whole", [True, False])
def test_a_body_that_has_arrived_is_bounded_and_counted_like_one_that_arrives(whole: bool) -> None:
    account = Account(Quota(arriving_bytes=100))

    def read(message: dict[str, Any]) -> bytes:
        async def receive() -> dict[str, Any]:
            return message

        scope = {"type": "http", "headers": [], WHOLE_BODY: whole}
        with admission.Load(account) as load:
            load.attach(scope)
            body = asyncio.run(bodies.read_body(Request(scope, receive), 200))
            assert (account.used("bytes"), account.used("arriving_bytes")) == (len(body), 0)
            return body

    def sent_at_once(size: int) -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(size), "more_body": False}

    assert read(sent_at_once(80)) == bytes(80) and read(sent_at_once(0)) == b""
    for message, error, words in (
        (sent_at_once(201), bodies.TooLargeError, "more than 200 bytes"),
        (sent_at_once(150), BusyError, "arriving data"),
        ({"type": "http.disconnect"}, BadRequestError, "cut short"),
    ):
        with pytest.raises(error, match=words):
            read(message)
    assert (account.used("bytes"), account.used("arriving_bytes"), account.arriving) == (0, 0, set())


def test_a_request_for_many_samples_fits_nowhere_beyond_the_limit() -> None:
    whole = Account(Quota(samples=100))
    keys = [Account(Quota(samples=80), whole) for _ in range(2)]
    keys[0].take(samples=80)
    with pytest.raises(BusyError, match="all keys together"):
        keys[1].take(samples=21)
    keys[1].take(samples=20)
    with pytest.raises(BusyError, match="20 samples already, the limit is 80"):
        keys[1].take(samples=80)
    assert whole.used("samples") == 100


@pytest.mark.parametrize(
    "path", ["retrieve_future", "create_session", "telemetry", "copy_weights", "asample", "optim_step"]
)
def test_the_bodies_of_every_route_count(start: Any, path: str) -> None:
    running = start()
    head = f"POST {API}/{path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100000"
    held = [sent(running, head, b"\r\n" + b" " * 60_000) for _ in range(5)]
    wait_for(lambda: running.server.account.used("bytes") >= 5 * 60_000)
    for connection in held:
        connection.close()
    wait_for(lambda: running.server.account.used("bytes") == running.server.account.used("arriving_bytes") == 0)


def test_an_unfinished_compressed_body_holds_what_was_sent_of_it(start: Any) -> None:
    running = start()
    compressor = zstandard.ZstdCompressor().compressobj()
    bomb = compressor.compress(b" " * (30 << 20)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    head = f"POST {API}/asample HTTP/1.1\r\nContent-Encoding: zstd\r\nContent-Length: 10000000"
    held = [sent(running, head, b"\r\n" + bomb) for _ in range(20)]
    wait_for(lambda: running.server.account.used("bytes") == 20 * len(bomb))
    for connection in held:
        connection.close()


@pytest.mark.parametrize("claims", [True, False])
@pytest.mark.parametrize("path", ["telemetry", "retrieve_future", "asample", "forward_backward"])
def test_a_frame_that_grows_beyond_the_limit_is_refused(
    start: Any, path: str, claims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_BYTES", 33 * 2**20)
    running = start()
    frame = zstandard.ZstdCompressor(write_content_size=claims).compress(b" " * (34 << 20))
    with raw(running) as http:
        answer = http.post(f"/{path}", content=frame, headers={"Content-Encoding": "zstd"})
        assert answer.status_code == 413 and "more than" in answer.json()["detail"] and "send less" in answer.text
        answer = http.post(f"/{path}", content=frame[:-9], headers={"Content-Encoding": "zstd, zstd"})
        assert answer.status_code == 415
    assert running.server.account.used("bytes") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [' + "[]," * 200_000 + "[]]}", "arrays and objects, the limit is 131,072"),
        ('{"a": [' + "1," * 3_000_000 + "1]}", "values, the limit is 2,097,152"),
    ],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(start: Any, text: str, said: str) -> None:
    with raw(start()) as http:
        answer = http.post("/asample", content=text.encode())
        assert answer.status_code == 400 and said in answer.json()["detail"]


def test_slow_bodies_make_room_for_one_that_arrives(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LATE_SECONDS", 0.2)
    running = start()
    account = with_account(running, arriving_bytes=1_000_000)
    head = f"POST {API}/forward_backward HTTP/1.1\r\nContent-Length: 5000000"
    slow = [sent(running, head, b"\r\n" + b"x" * 100_000) for _ in range(8)]
    wait_for(lambda: account.used("arriving_bytes") > 600_000)
    time.sleep(0.5)
    with raw(running) as http:
        assert http.post("/create_session", json=SESSION).status_code == 200, "small ones have room of their own"
        wait_for(lambda: http.post("/forward_backward", content=b"x" * 500_000).status_code == 400)
    assert any(received(connection).startswith(b"HTTP/1.1 408 ") for connection in slow), "the SDK sends these again"
    wait_for(lambda: account.used("bytes") == 0)


def test_sessions_beyond_the_quota_end_the_longest_silent(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_objects, "IDLE_SECONDS", 0.3)
    running = start()
    account = with_account(running, sessions=20)
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    with raw(running) as http:
        made = [http.post("/create_session", json=SESSION).json()["session_id"] for _ in range(19)]
        busy = http.post("/create_session", json=SESSION)
        assert busy.status_code == 429 and "20 sessions" in busy.json()["detail"] and "Close" in busy.json()["detail"]
        time.sleep(0.5)
        assert http.post("/session_heartbeat", json={"session_id": made[0]}).status_code == 200
        for _ in range(12):
            assert http.post("/create_session", json=SESSION).status_code == 200
        assert http.post("/session_heartbeat", json={"session_id": made[0]}).status_code == 200
        gone = http.post("/session_heartbeat", json={"session_id": made[1]})
        assert gone.status_code == 410 and "others had no room" in gone.json()["detail"]
    assert account.used("sessions") == 20 and client.get_info().model_name == MODEL, "one with a model stays"


def test_ended_sessions_are_not_kept_for_ever(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_use, "MAX_ENDED", 5)
    running = start()
    with raw(running) as http:
        body = SESSION | {"user_metadata": {"a": "x" * 10_000}}
        made = [http.post("/create_session", json=body).json()["session_id"] for _ in range(12)]
        assert running.server.account.used("record_bytes") > 120_000
        for session_id in made:
            assert http.post(f"/sessions/{session_id}/finish", json={"detail": "x" * 10_000}).status_code == 200
        answers = [http.post("/session_heartbeat", json={"session_id": each}) for each in made]
        assert [each.status_code for each in answers] == [404] * 7 + [410] * 5
        assert all(len(each.text) < 2_000 for each in answers)
    live = running.server.live
    assert len(live.sessions) == 5 and running.server.account.used("record_bytes") == 0 == len(live._use._signs)


@pytest.mark.parametrize(
    "body",
    [
        {"display_name": "y" * 1_001},
        {"project_id": "y" * 1_001},
        {"user_metadata": {"a": "x" * 70_000}},
        {"tags": ["t"] * 101},
        {"tags": ["t" * 1_001]},
        {"sdk_version": "0" * 1_001},
        {"display_name": "\udc80"},
    ],
)
def test_what_a_client_says_of_a_session_is_bounded(start: Any, body: dict[str, Any]) -> None:
    running = start()
    (field,) = body
    with raw(running) as http:
        answer = http.post("/create_session", content=json.dumps(SESSION | body))
        assert answer.status_code == 400 and field in answer.json()["detail"], answer.text
        assert running.server.account.used("sessions") == 0
        assert http.post("/create_session", json=SESSION | {"display_name": "é" * 1_000}).status_code == 200
    if field in ("display_name", "project_id"):
        import jax_client

        with pytest.raises(tinker.BadRequestError, match=field):
            jax_client.ServiceClient(**body)


def test_polls_and_signs_of_life_are_answered_while_no_more_work_fits(start: Any, loaded: Any) -> None:
    running = start()
    connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    with raw(running) as http:
        session_id = http.post("/create_session", json=SESSION).json()["session_id"]
        first = http.post("/asample", json=sample_body(running, 10**6)).json()["request_id"]
        account = running.server.account
        account._quota["bytes"] = account.used("bytes")
        assert http.post("/asample", json=sample_body(running, 10**6 + 1)).status_code == 429
        assert http.post("/session_heartbeat", json={"session_id": session_id}).status_code == 200
        loaded[0].gate.set()
        assert poll(http, first).status_code == 200
        assert http.post("/asample", json=sample_body(running, 10**6 + 1)).status_code == 200, "there is room again"


def test_unknown_names_leave_nothing_behind(start: Any) -> None:
    running = start()
    live, before = running.server.live, None
    with raw(running) as http:
        for i in range(30):
            long = f"{i}" + "x" * 500_000
            for path, body in (
                ("retrieve_future", {"request_id": long}),
                ("retrieve_future", {"request_id": f"{long}:1"}),
                ("cancel_future", {"request_id": long}),
                ("session_heartbeat", {"session_id": long}),
                ("join_sampling_session", {"sampling_session_id": long}),
                ("get_info", {"model_id": long}),
                ("optim_step", {"model_id": long, "seq_id": 1, "adam_params": {}, "type": "optim_step"}),
                ("create_sampling_session", {"session_id": long, "sampling_session_seq_id": 0, "base_model": MODEL}),
            ):
                answer = http.post(f"/{path}", json=body)
                assert answer.status_code in (400, 404) and len(answer.text) < 1_000, (path, answer.text[:300])
            assert http.get(f"/samplers/{i}{'y' * 5_000}").status_code == 404
            state = (len(live.sessions), len(live.models), len(live.samplers), len(live._use._signs))
            assert state == (before or state) and not running.server.ledger.unanswered()
            before = state
        session_id = http.post("/create_session", json=SESSION).json()["session_id"]
        body = {"session_id": session_id, "model_seq_id": 10**300, "base_model": MODEL}
        answer = http.post("/create_model", json=body)
        assert answer.status_code == 400 and "an id of" in answer.json()["detail"], answer.text


def test_samplers_in_memory_are_bounded_and_come_back(start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_objects, "MAX_SAMPLERS", 16)
    running = start()
    service = connect(running)
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    path = client.save_weights_for_sampler("s").result(LIMIT).path
    samplers = [service.create_sampling_client(path) for _ in range(40)]
    assert len(running.server.live.samplers) <= 17
    assert all(each.sample(PROMPT, 1, PARAMS).result(LIMIT).sequences[0].tokens == [5, 2] for each in samplers)


def test_records_beyond_the_quota_are_refused(start: Any) -> None:
    running = start()
    with_account(running, records=5)
    with raw(running) as http:
        session_id = http.post("/create_session", json=SESSION).json()["session_id"]
        body = {"session_id": session_id, "base_model": MODEL}
        codes = [http.post("/create_sampling_session", json=body | {"sampling_session_seq_id": i}) for i in range(6)]
        assert [each.status_code for each in codes] == [200] * 5 + [429] and "fewer" in codes[-1].json()["detail"]
        again = http.post("/create_sampling_session", json=body | {"sampling_session_seq_id": 0})
        assert again.status_code == 200, "one that is there is there"
        model = {"session_id": session_id, "model_seq_id": 0, "base_model": MODEL}
        assert http.post("/create_model", json=model).status_code == 429
        http.post(f"/sessions/{session_id}/finish", json={})
        wait_for(lambda: running.server.account.used("records") == 0)
        assert http.post("/create_session", json=SESSION).status_code == 200
    assert not running.server.ledger.unanswered(), "what was refused does not wait"


def test_training_requests_wait_up_to_the_quota(start: Any) -> None:
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    account = with_account(running, training_requests=3)
    step = {"model_id": client.model_id, "adam_params": {}, "type": "optim_step"}
    with raw(running) as http:
        codes = [http.post("/optim_step", json=step | {"seq_id": number}).status_code for number in range(5, 10)]
        assert codes == [200, 200, 200, 429, 429]
        assert http.post("/optim_step", json=step | {"seq_id": 1}).status_code == 429
        for number in (5, 6, 7):
            http.post("/cancel_future", json={"request_id": f"{client.model_id}:{number}"})
        wait_for(lambda: account.used("training_requests") == 0)


def test_polls_beyond_the_bounds_hear_early_that_the_request_waits(
    start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MAX_POLLS_OF_REQUEST", 4)
    running = start()
    connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
    account = with_account(running, polls=6)
    loaded[0].gate.clear()
    with raw(running) as http:
        ids = [http.post("/asample", json=sample_body(running, 10**6 + i)).json()["request_id"] for i in range(2)]
        polls = []
        for request_id in [ids[0]] * 7 + [ids[1]] * 4:
            body = json.dumps({"request_id": request_id}).encode()
            head = f"POST {API}/retrieve_future HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}"
            polls.append(sent(running, head, b"\r\n" + body))
            time.sleep(0.05)
        early = [received(connection) for connection in polls[:5]]
        assert all(each.startswith(b"HTTP/1.1 408 ") and b"queue_state" in each for each in early)
        wait_for(lambda: account.used("polls") == 6)
        loaded[0].gate.set()
        assert all(received(connection).startswith(b"HTTP/1.1 200 ") for connection in polls[5:])
        assert poll(http, ids[0]).status_code == 200 and account.used("polls") == 0


def test_pages_of_listings_are_bounded(start: Any) -> None:
    with raw(start()) as http:
        for path in ("training_runs", "checkpoints", "sessions"):
            assert http.get(f"/{path}?limit=10000").status_code == 200
            answer = http.get(f"/{path}?limit=10001")
            assert answer.status_code == 400 and "offset" in answer.json()["detail"]
