"""Does one client's loss, while it is traced and compiled, cost other clients nothing, and can it be ended?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from jax_client.server.routes import polling
from jax_client.torch_graph.program import GraphProgram
from jax_client.torch_graph.traced import compile_queue
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT
from support.graphs import graph_nodes
from support.graphs.graph_nodes import LP, P_IN, call, output, ref
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, poll, raw, wait_for
from support.server.serving import forward_backward_body

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every compile of a loss that adds up, as a large program would; `gate.set()` lets them end."""
    opened, compile_ = threading.Event(), GraphProgram._compile

    def held(program: GraphProgram, *args: Any) -> Any:
        assert program.graph.nodes[0].target != "sum" or opened.wait(LIMIT)
        return compile_(program, *args)

    monkeypatch.setattr(GraphProgram, "_compile", held)
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.1)
    yield opened
    opened.set()


def loss_body(session: str, number: int, *nodes: Any) -> dict[str, Any]:
    graph = {"nodes": [P_IN, *(nodes or (call("total", "sum", LP, op="call_method"),)), output(ref("total"))]}
    inputs = [{"name": "logprobs", "rank": 1}]
    return {"session_id": session, "custom_loss_seq_id": number, "name": "mine", "inputs": inputs, "graph": graph}


def answered(http: httpx.Client, request_id: str) -> httpx.Response:
    """Poll until the answer is there."""
    end = time.monotonic() + LIMIT
    while (answer := poll(http, request_id)).status_code == 408:
        assert time.monotonic() < end
    return answer


def created(http: httpx.Client, session: str, number: int = 0, *nodes: Any) -> str:
    made = http.post("/create_custom_loss", json=loss_body(session, number, *nodes))
    assert made.status_code == 200, made.text
    assert answered(http, made.json()["request_id"]).status_code == 200
    return f"{session}:loss:{number}"


def with_loss(http: httpx.Client, model: str, number: int, loss_id: str) -> str:
    body = forward_backward_body(model, number, DATA[:1], loss_id)
    return http.post("/forward_backward", content=body).json()["request_id"]


def seconds(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def test_other_clients_go_on_while_a_loss_is_compiled(start: Any, loaded: Any, gate: threading.Event) -> None:
    running = start()
    one, other = connect(running), connect(running)
    model = one.create_lora_training_client(MODEL, 4).result(LIMIT).model_id
    sampler = other.create_sampling_client(base_model=MODEL).result(LIMIT)
    theirs = other.create_lora_training_client(MODEL, 4).result(LIMIT)
    with raw(running) as http, ThreadPoolExecutor(64) as many:
        session = model.partition(":")[0]
        loss_id = created(http, session)
        first = with_loss(http, model, 1, loss_id)
        # More than either pool has threads.
        waiting = [many.submit(with_loss, http, model, number, loss_id) for number in range(2, 60)]
        assert [each.result(LIMIT) for each in waiting] == [f"{model}:{number}" for number in range(2, 60)]
        told = poll(http, first).json()
        assert told["queue_state_reason"] == "compiling loss 'mine' (3 tokens)"
        (shown,) = http.get("/healthz").json()["losses"]
        assert (shown["program"], shown["stage"]) == ("loss 'mine'", "compiling") and shown["seconds"] > 0
        begin = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
        assert seconds(lambda: http.post("/create_session", json=begin).raise_for_status()) < 2
        assert seconds(lambda: http.post("/session_heartbeat", json={"session_id": session}).raise_for_status()) < 2
        assert seconds(lambda: poll(http, f"{model}:30")) < 2
        sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
        theirs.forward_backward(DATA, "cross_entropy").result(LIMIT)
        assert theirs.optim_step(ADAM).result(LIMIT).metrics["grad_norm:mean"] == 1.0
        assert not gate.is_set() and loaded[0].log.count("train_batch") == 1
        gate.set()
        assert all(answered(http, f"{model}:{number}").status_code == 200 for number in (1, 59))
        assert loaded[0].log.count("train_batch") == 60


def test_what_waits_for_a_compile_is_cancelled_at_once(start: Any, loaded: Any, gate: threading.Event) -> None:
    running = start()
    model = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT).model_id
    with raw(running) as http:
        loss_id = created(http, model.partition(":")[0])
        first = with_loss(http, model, 1, loss_id)
        wait_for(lambda: len(compile_queue.shared.running()) == 1)
        http.post("/cancel_future", json={"request_id": first}).raise_for_status()
        assert b"cancelled" in answered(http, first).content.lower()
        assert "train_batch" not in loaded[0].log
        # The run goes on with its next request.
        plain = http.post("/forward_backward", content=forward_backward_body(model, 2, DATA)).json()["request_id"]
        assert answered(http, plain).status_code == 200 and loaded[0].log.count("train_batch") == 1


def test_closing_its_session_ends_a_compile_and_waits_for_none(start: Any, gate: threading.Event) -> None:
    running = start()
    model = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT).model_id
    session = model.partition(":")[0]
    with raw(running) as http:
        first = with_loss(http, model, 1, created(http, session))
        wait_for(lambda: len(compile_queue.shared.running()) == 1)
        http.post(f"/sessions/{session}/finish", json={"reason": {"type": "success"}}).raise_for_status()
        assert b"session was closed" in answered(http, first).content
        wait_for(lambda: not running.server.live.losses.items() and not running.server.live.models.items())
        assert not gate.is_set()


def test_a_server_stops_while_a_loss_is_compiled(start: Any, gate: threading.Event) -> None:
    running = start()
    model = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT).model_id
    with raw(running) as http:
        with_loss(http, model, 1, created(http, model.partition(":")[0]))
    wait_for(lambda: len(compile_queue.shared.running()) == 1)
    assert seconds(lambda: running.server.close(LIMIT)) < LIMIT / 4
    assert not gate.is_set()


def test_a_loss_of_another_session_is_compiled_meanwhile(start: Any, gate: threading.Event) -> None:
    running = start()
    with raw(running) as http:
        one, other = (connect(running).create_lora_training_client(MODEL, 4).result(LIMIT).model_id for _ in range(2))
        mine = [created(http, one.partition(":")[0], number) for number in range(4)]
        for number, loss_id in enumerate(mine):
            with_loss(http, one, number + 1, loss_id)
        wait_for(lambda: len(compile_queue.shared.running()) >= 1)
        its = created(http, other.partition(":")[0], 0, call("total", "torch.mean", LP))
        assert answered(http, with_loss(http, other, 1, its)).status_code == 200
        told = poll(http, f"{one}:1").json()["queue_state_reason"]
        assert told == "compiling loss 'mine' (3 tokens)" and not gate.is_set()


@pytest.mark.parametrize(
    ("target", "nodes", "words"),
    [
        ("torch.cumsum", 100, "scans and sorts; the limit is 64"),
        ("torch.softmax", 900, "operations; the limit is 6,000"),
    ],
)
def test_a_loss_that_is_a_large_program_is_refused_when_it_is_created(
    start: Any, target: str, nodes: int, words: str
) -> None:
    running = start()
    chain = [call(f"n{i}", target, ref(f"n{i - 1}") if i else LP, 0) for i in range(nodes)]
    session = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT).model_id.partition(":")[0]
    with raw(running) as http:
        sent = loss_body(session, 0, *chain, call("total", "sum", ref(f"n{nodes - 1}"), op="call_method"))
        made = http.post("/create_custom_loss", json=sent)
        answer = answered(http, made.json()["request_id"])
        assert words in answer.text and "forward_backward_custom" in answer.text
        refused = answered(http, with_loss(http, f"{session}:train:0", 1, f"{session}:loss:0"))
        assert words in refused.text


def test_what_a_loss_waits_for_tells_nothing_of_other_owners() -> None:
    queue, gate = compile_queue.CompileQueue(2), threading.Event()
    graph = graph_nodes.read(P_IN, call("total", "sum", LP, op="call_method"), output(ref("total")))
    program = GraphProgram(graph, "mine", queue)

    def occupy(owner: str) -> None:
        work = lambda _: gate.wait(LIMIT)  # noqa: E731
        queue.submit(compile_queue.Job(owner=owner, loss="large", shapes="", stage="compiling", work=work))

    try:
        occupy("mine")
        wait_for(lambda: len(queue.running()) == 1)
        traced = program.trace()
        alone = program.progress()
        for _ in range(7):
            occupy("another")
        assert alone == program.progress() == "loss 'mine' waits for other losses to be compiled"
    finally:
        gate.set()
    assert traced.result(LIMIT) is None
