"""Are the samples of a client that is gone cancelled, and those of one that lives left alone?"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from typing import Any

import pytest

from jax_client.server.state import orphans
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.served_fake import connect, poll, raw, sample_body, sent, wait_for
from support.server.serving import API

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


def held(start: Any, loaded: Any) -> Any:
    """A server whose device is held, and whose sampler is loaded."""
    running = start()
    with raw(running) as http:
        session_id = http.post("/create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}).json()[
            "session_id"
        ]
        body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": MODEL}
        assert http.post("/create_sampling_session", json=body).is_success
        wait_for(lambda: loaded)
        loaded[0].gate.clear()
    return running


def asked(running: Any, number: int) -> str:
    with raw(running) as http:
        return http.post("/asample", json=sample_body(running, number)).json()["request_id"]


def polling(running: Any, request_id: str) -> socket.socket:
    body = json.dumps({"request_id": request_id}).encode()
    connection = sent(running, f"POST {API}/retrieve_future HTTP/1.1\r\nContent-Length: {len(body)}", b"\r\n" + body)
    request = running.server.ledger.in_memory(request_id)
    wait_for(lambda: request.polls_waiting > 0)
    return connection


def test_a_closed_connection_cancels_what_it_waited_for(start: Any, loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(orphans, "GRACE_SECONDS", 0.05)
    running = held(start, loaded)
    requests = [asked(running, number) for number in range(20)]
    connections = [polling(running, request_id) for request_id in requests]
    for connection in connections[1:]:
        connection.close()
    wait_for(lambda: [each.request_id for each in running.server.ledger.unanswered()] == requests[:1])
    loaded[0].gate.set()
    assert connections[0].recv(15) == b"HTTP/1.1 200 OK"
    wait_for(lambda: not running.server.ledger.unanswered())
    assert loaded[0].log.count("generate") == 1, "those that waited never begin"
    with raw(running) as http:
        assert poll(http, requests[1]).status_code == 410, "a client that lives after all sends it again"
    assert running.server.account.used("samples") == 0


def test_a_client_that_polls_again_loses_nothing(start: Any, loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(orphans, "GRACE_SECONDS", 0.3)
    running = held(start, loaded)
    request_id = asked(running, 0)
    polling(running, request_id).close()
    request = running.server.ledger.in_memory(request_id)
    wait_for(lambda: not request.polls_waiting)
    with polling(running, request_id) as connection:
        time.sleep(0.6)
        assert running.server.ledger.unanswered() == [request]
        loaded[0].gate.set()
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_a_silent_client_is_not_sampled_for(start: Any, loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(orphans, "CHECK_SECONDS", 0.05)
    running = held(start, loaded)
    request_id = asked(running, 0)
    session_id = request_id.partition(":")[0]
    monkeypatch.setattr(orphans, "SILENT_SECONDS", 0.5)
    with raw(running) as http:
        for _ in range(8):
            assert http.post("/session_heartbeat", json={"session_id": session_id}).is_success
            time.sleep(0.1)
        assert running.server.ledger.unanswered(), "a heartbeat is a sign of life"
        wait_for(lambda: not running.server.ledger.unanswered())
        answer = poll(http, request_id)
        assert answer.status_code == 410 and "silent" in answer.text
        loaded[0].gate.set()
        assert "generate" not in loaded[0].log


def test_training_goes_on_without_its_client(start: Any, loaded: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(orphans, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(orphans, "CHECK_SECONDS", 0.05)
    running = start()
    client = connect(running).create_lora_training_client(MODEL, rank=8).result()
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(PROMPT, 1, PARAMS).result()
    loaded[0].gate.clear()
    training = client.forward_backward(fake_engine.DATA, "cross_entropy")
    sampling = sampler.sample(PROMPT, 1, PARAMS)
    wait_for(lambda: len(running.server.ledger.unanswered()) == 2)
    monkeypatch.setattr(orphans, "SILENT_SECONDS", -1.0)
    wait_for(lambda: [each.kind for each in running.server.ledger.unanswered()] == ["train"])
    monkeypatch.setattr(orphans, "SILENT_SECONDS", 60.0)
    loaded[0].gate.set()
    assert training.result(60).metrics and sampling.result(60).sequences, "the SDK sends the sample again"


def test_polls_that_ended_leave_nothing_at_their_request(start: Any, loaded: Any, monkeypatch: Any) -> None:
    """A request may wait for hours, and its client asks again every half minute."""
    monkeypatch.setattr("jax_client.server.routes.polling.POLL_SECONDS", 0.01)
    running = held(start, loaded)
    request_id = asked(running, 0)

    def events() -> int:
        gc.collect()
        return sum(type(each) is asyncio.Event for each in gc.get_objects())

    with raw(running) as http:
        assert poll(http, request_id).status_code == 408
        before = events()
        for _ in range(50):
            assert poll(http, request_id).status_code == 408
        assert events() < before + 25
        loaded[0].gate.set()
        monkeypatch.setattr("jax_client.server.routes.polling.POLL_SECONDS", 20)
        assert poll(http, request_id).status_code == 200
