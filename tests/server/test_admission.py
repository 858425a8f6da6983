"""What happens to requests beyond what may wait?"""

from __future__ import annotations

import time
from typing import Any

import pytest
from tinker import types

from jax_client.server.state import pending
from jax_client.server.wire.accounts import Account, Quota
from jax_client.server.wire.admission import SMALL_BODY
from support import fake_engine
from support.fake_engine import DATA, MODEL, PARAMS, PROMPT, datum
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, poll, raw, sample_body, sent, wait_for
from support.server.serving import (
    API,
    Between,
    forward_backward_body,
)

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


def test_a_full_queue_costs_time_and_no_request(start: Any, loaded: Any) -> None:
    between = Between()
    running = start(between)
    running.server.account = Account(Quota(sampling_requests=8))
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    asked = [sampler.sample(types.ModelInput.from_ints([1, 2, 3, i]), 1, PARAMS) for i in range(12)]
    wait_for(lambda: running.server.account.used("sampling_requests") == 8 and between.counts["asample"] > 9)
    with raw(running) as http:
        refused = http.post("/asample", json=sample_body(running, 10**6))
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert "8 sampling requests" in refused.json()["detail"]
    loaded[0].gate.set()
    assert all(each.result(LIMIT).sequences[0].tokens == [5, 2] for each in asked)
    prompts = [request.tokens_T.tolist() for request in loaded[0].requests[1:]]
    assert sorted(prompts) == [[1, 2, 3, i] for i in range(12)], "none was lost, none came twice"
    assert running.server.account.used("sampling_requests") == running.server.account.used("samples") == 0


def test_samples_count_too_and_no_request_asks_for_more_than_may_wait(start: Any, loaded: Any) -> None:
    running = start()
    running.server.account = Account(Quota(samples=100))
    connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    with raw(running) as http:
        for number, samples, status in ((1, 101, 400), (1, 100, 200), (2, 1, 429), (1, 100, 429)):
            body = sample_body(running, 10**6 + number, num_samples=samples)
            answer = http.post("/asample", json=body)
            assert answer.status_code == status
            assert samples <= 100 or "num_samples is 101" in answer.json()["detail"]
        assert running.server.account.used("samples") == 100 == loaded[0].requests[-1].num_samples
        for samples in (0, -1, 10**9):
            running.server.account = Account()
            body = sample_body(running, 10**7 + samples, num_samples=samples)
            request_id = http.post("/asample", json=body).json()["request_id"]
            assert "num_samples" in poll(http, request_id).json()["error"]


def test_bodies_wait_for_room(start: Any, loaded: Any) -> None:
    between = Between()
    running = start(between)
    body = len(forward_backward_body("x" * 44, 1, DATA))
    running.server.account = Account(Quota(bytes=4 * body))
    clients = [connect(running).create_lora_training_client(MODEL, 4).result(LIMIT) for _ in range(2)]
    loaded[0].gate.clear()
    passes = [client.forward_backward(DATA, "cross_entropy") for _ in range(3) for client in clients]
    wait_for(lambda: between.counts["forward_backward"] > 6)
    # With the two that are being refused, and polls, which are much smaller.
    assert 0 < running.server.account.used("bytes") < 7 * body
    with raw(running) as http:
        assert http.post("/forward_backward", content=forward_backward_body("x", 1, DATA * 9)).status_code == 429
        assert http.get("/healthz").status_code == 200
    loaded[0].gate.set()
    assert all(each.result(LIMIT).metrics["loss:sum"] == 1.0 for each in passes)
    assert loaded[0].log.count("train_batch") == 6
    # The last poll's own body is counted until its response is sent.
    wait_for(lambda: running.server.account.used("bytes") == 0)


def test_slow_bodies_hold_no_more_than_the_limit(start: Any) -> None:
    running = start()
    running.server.account = Account(Quota(bytes=1_000_000))
    head = f"POST {API}/forward_backward HTTP/1.1\r\nContent-Length: 5000000"
    slow = [sent(running, head, b"\r\n" + b"x" * 100_000) for _ in range(20)]
    wait_for(lambda: running.server.account.used("bytes") > 800_000)
    time.sleep(0.2)
    # Of each, what a poll may have is read however much waits.
    assert running.server.account.used("bytes") <= 1_000_000 + 20 * SMALL_BODY
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    for connection in slow[:5]:
        connection.close()
    assert sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    for connection in slow:
        connection.close()
    wait_for(lambda: running.server.account.used("bytes") == 0)


def test_what_waits_for_nothing_makes_room(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "GAP_SECONDS", 0.3)
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    body = forward_backward_body(client.model_id, 2, [datum()] * 20)
    running.server.account = Account(Quota(bytes=len(body) + 10), relieve=running.server.ledger.queues.give_up)
    with raw(running) as http:
        waiting = http.post("/forward_backward", content=body).json()["request_id"]
        third = forward_backward_body(client.model_id, 3, [datum()] * 20)
        assert http.post("/forward_backward", content=third).status_code == 429
        wait_for(lambda: http.post("/forward_backward", content=third).status_code == 200)
        assert "did not come" in poll(http, waiting).json()["error"]
