"""How much does the largest loss that a server takes slow other clients down, on a real engine?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from jax_client.server.routes import polling
from jax_client.server.state.server import Server
from jax_client.torch_graph.traced import compile_queue
from support.graphs.graph_nodes import LP, P_IN, call, output, ref
from support.server.served_fake import LIMIT, poll, wait_for
from support.server.serving import API, KEY, Running, config, data, forward_backward_body, write_model

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]
# With its gradient about 5,800 operations, of 6,000.
SOFTMAXES = 200


def chain() -> dict[str, Any]:
    nodes = [call(f"n{i}", "torch.softmax", ref(f"n{i - 1}") if i else LP, 0) for i in range(SOFTMAXES)]
    total = call("total", "sum", ref(f"n{SOFTMAXES - 1}"), op="call_method")
    return {"nodes": [P_IN, *nodes, total, output(ref("total"))]}


def seconds(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def test_the_largest_loss_leaves_other_clients_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.2)
    model = write_model(tmp_path)
    running = Running(Server(config(tmp_path / "state")))
    one, other = (tinker.ServiceClient(base_url=running.url, api_key=KEY) for _ in range(2))
    attacked = one.create_lora_training_client(base_model=model, rank=4).result(LIMIT).model_id
    sampler = other.create_sampling_client(base_model=model).result(LIMIT)
    prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=16, seed=1)
    sample = lambda: seconds(lambda: sampler.sample(prompt, 1, params).result(5 * LIMIT))  # noqa: E731
    sample()
    alone = statistics.median(sample() for _ in range(20))
    session, cheap, samples = attacked.partition(":")[0], [], []
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=running.url + API, headers=headers, timeout=LIMIT) as http:
        asked = {"session_id": session, "custom_loss_seq_id": 0, "name": "large", "graph": chain()}
        made = http.post("/create_custom_loss", json={**asked, "inputs": [{"name": "logprobs", "rank": 1}]})
        body = forward_backward_body(attacked, 1, data(), made.json()["request_id"])
        first = http.post("/forward_backward", content=body).json()["request_id"]
        wait_for(lambda: bool(compile_queue.shared.running()))
        begin = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
        while compile_queue.shared.running():
            cheap.append(seconds(lambda: http.post("/create_session", json=begin).raise_for_status()))
            cheap.append(seconds(lambda: http.post("/session_heartbeat", json={"session_id": session})))
            samples.append(sample())
        while poll(http, first).status_code == 408:
            pass
    running.stop()
    beside = statistics.median(samples)
    print(f"calls: at most {max(cheap):.3f} s; a sample: {alone:.3f} s alone, {beside:.3f} s beside the compile")
    assert max(cheap) < 0.5 and beside < 3 * alone
