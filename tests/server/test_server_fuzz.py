"""Does any body, however wrong, get from a server more than an answer that says what is wrong?"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.types.copy_weights_request import CopyWeightsRequest
from tinker.types.future_retrieve_request import FutureRetrieveRequest
from tinker.types.join_sampling_session_request import JoinSamplingSessionRequest
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest

import jax_client
from jax_client.server.app import build_app, routes
from jax_client.server.routes import polling
from jax_client.server.state import pending
from jax_client.server.state.server import Server
from jax_client.server.wire import bodies
from support.fake_engine import MODEL, FakeModels
from support.server import fuzz_bodies
from support.server.asgi import ask

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT, EVERY = 60, 2_000
# One thing that is asked takes no longer, on a machine with other things to do.
SECONDS = 5.0
GROWTH_BYTES = 400 * 2**20
SECRETS = re.compile(rf"Traceback|its log says why|{re.escape(str(Path(jax_client.__file__).parent))}|site-packages")
JSON_TYPES = {
    "create_model": types.CreateModelRequest,
    "load_weights": types.LoadWeightsRequest,
    "optim_step": types.OptimStepRequest,
    "save_weights": types.SaveWeightsRequest,
    "save_weights_for_sampler": types.SaveWeightsForSamplerRequest,
    "save_weights_external": types.SaveWeightsExternalRequest,
    "create_session": types.CreateSessionRequest,
    "session_heartbeat": SessionHeartbeatRequest,
    "get_info": types.GetInfoRequest,
    "create_sampling_session": types.CreateSamplingSessionRequest,
    "join_sampling_session": JoinSamplingSessionRequest,
    "cancel_future": FutureRetrieveRequest,
    "create_custom_loss": types.CreateCustomLossRequest,
    "asample": types.SampleRequest,
    "retrieve_future": FutureRetrieveRequest,
    "copy_weights": CopyWeightsRequest,
}
# Read without a type of the SDK's.
UNTYPED = {
    "client/config",
    "client/dynamic_config",
    "telemetry",
    "weights_info",
    "sessions/search",
    "sessions/{session}/finish",
}


@dataclass
class Target:
    """A server without sockets, and a session, a model and a sampler on it."""

    server: Server
    app: Any
    loop: asyncio.AbstractEventLoop
    numbers: Iterator[int]
    session_id: str = ""
    model_id: str = ""
    sampler_id: str = ""
    asked: int = 0

    def begin(self) -> None:
        """Make them anew, now and then: what a body may number does not go on for ever."""
        if self.session_id:
            self.call("POST", f"/api/v1/sessions/{self.session_id}/finish", b'{"reason": {"type": "success"}}')
        asked = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
        self.session_id = self.post("create_session", asked)["session_id"]
        made = self.post("create_model", {"session_id": self.session_id, "model_seq_id": 0, "base_model": MODEL})
        self.model_id = made["request_id"]
        self.answer_of(self.model_id)
        asked = {"session_id": self.session_id, "sampling_session_seq_id": 0, "base_model": MODEL}
        self.sampler_id = self.post("create_sampling_session", asked)["sampling_session_id"]
        self.server.sampling.sampler(self.sampler_id).result(20)

    def post(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self.call("POST", f"/api/v1/{name}", json.dumps(body).encode())
        assert status == 200, answer
        return json.loads(answer)

    def call(
        self, method: str, path: str, body: bytes = b"", headers: Any = (), query: bytes = b""
    ) -> tuple[int, bytes]:
        """Ask once, and check what every answer has to be."""
        pieces = body[: len(body) // 2], body[len(body) // 2 :]
        raw_path = quote(path, safe="/", errors="replace")
        began = time.monotonic()
        asked = ask(self.app, method, raw_path, pieces, headers, query)
        status, answer = self.loop.run_until_complete(asyncio.wait_for(asked, 30))
        seconds = time.monotonic() - began
        self.asked += 1
        shown = answer.decode("utf-8", "replace")
        assert status < 500 and not SECRETS.search(shown), (status, shown[:2_000])
        assert seconds < SECONDS and (status == 200 or len(answer) < 10_000), (seconds, len(answer), shown[:500])
        return status, answer

    def answer_of(self, request_id: str) -> bytes:
        """Await what was promised."""
        end = time.monotonic() + SECONDS
        while True:
            body = json.dumps({"request_id": request_id}).encode()
            status, answer = self.call("POST", "/api/v1/retrieve_future", body)
            if status != 408:
                assert status in (200, 410), (status, answer)
                assert not answer.startswith(b'{"error"') or b'"category": "user"' in answer, answer
                return answer
            assert time.monotonic() < end, (request_id, answer)

    def following(self) -> int:
        """The number of the model's next request."""
        found = self.server.ledger.queues.of(self.model_id).next_number
        if found > 2**30:
            self.begin()
            return 1
        return found

    def example(self, name: str) -> dict[str, Any]:
        """What the SDK would send."""
        model = {"model_id": self.model_id, "seq_id": self.following()}
        session, path = {"session_id": self.session_id}, f"tinker://{self.model_id}/weights/a"
        n = next(self.numbers)
        node = {"op": "placeholder", "name": "x", "target": "x", "args": [], "kwargs": {}}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        adam = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        return {
            "create_model": {**session, "model_seq_id": n, "base_model": MODEL, "lora_config": {"rank": 4, "seed": 1}},
            "load_weights": {**model, "path": path, "optimizer": True},
            "optim_step": {**model, "adam_params": adam},
            "save_weights": {**model, "path": f"a{n}", "ttl_seconds": 60, "overwrite": False},
            "save_weights_for_sampler": {**model, "sampling_session_seq_id": n, "kind": "snapshot"},
            "save_weights_external": {**model, "path": f"e{n}", "ttl_seconds": None},
            "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38"},
            "session_heartbeat": session,
            "get_info": {"model_id": self.model_id},
            "create_sampling_session": {**session, "sampling_session_seq_id": n, "base_model": MODEL},
            "join_sampling_session": {"sampling_session_id": self.sampler_id},
            "cancel_future": {"request_id": f"{self.sampler_id}:{n - 1}"},
            "create_custom_loss": {
                **session,
                "custom_loss_seq_id": n,
                "name": "l",
                "graph": {"nodes": [node]},
                "inputs": [{"name": "x", "rank": 1}],
            },
            "asample": {
                "sampling_session_id": self.sampler_id,
                "seq_id": n,
                "num_samples": 2,
                "prompt": prompt,
                "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop": ["a"]},
                "prompt_logprobs": True,
                "topk_prompt_logprobs": 2,
                "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]},
            },
            "retrieve_future": {"request_id": f"{self.sampler_id}:{n - 1}", "allow_metadata_only": True},
            "copy_weights": {"source_path": path, "destination_project_id": None, "ttl_seconds": 60},
            "weights_info": {"tinker_path": path},
            "telemetry": {"events": []},
        }.get(name, {"reason": {"type": "success"}, "detail": "d"})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        export = lambda directory, *_: (directory / "f").write_bytes(b"x")  # noqa: E731
        patch.setattr("jax_client.weights.write.peft.write_adapter", export)
        checked = SimpleNamespace(tokens=1, difference=0.0)
        patch.setattr("jax_client.runs.lifecycle.export_check.check_export", lambda *_: checked)
        patch.setattr(polling, "POLL_SECONDS", 0.02)
        patch.setattr(pending, "GAP_SECONDS", 0.0)
        # A frame that grows has to pass it.
        patch.setattr(bodies, "MAX_JSON_BYTES", 2**20)
        patch.setattr(bodies, "MAX_BYTES", 2**20)
        settings = jax_client.EngineConfig(state_dir=tmp_path_factory.mktemp("state"), autosave_minutes=None)
        server = Server(settings, base_models=FakeModels())
        loop = asyncio.new_event_loop()
        found = Target(server, build_app(server, hosts=["127.0.0.1"]), loop, itertools.count(1))
        found.begin()
        yield found
        server.close(30)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_all(whole: bool, target: Target, tally: Counter[str], what: str, check: Any) -> None:
    """Run a check on a few or on very many examples; the memory of the process stays where it was."""
    before, asked = peak_bytes(), target.asked

    @settings(
        max_examples=EVERY if whole else SHORT,
        deadline=None,
        database=None,
        derandomize=not whole,
        suppress_health_check=[*HealthCheck],  # type: ignore[arg-type]
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        if target.asked - run.begun > 2_000:
            target.begin()
            run.begun = target.asked
        check(data)

    run.begun = target.asked
    target.begin()
    run()
    tally[f"requests of wrong {what}, each answered without a 5xx"] += target.asked - asked
    assert peak_bytes() - before < GROWTH_BYTES


def send(target: Target, path: str, body: bytes, headers: Any) -> None:
    status, answer = target.call("POST", path, body, headers)
    if status == 200 and answer.startswith(b'{"request_id"'):
        target.answer_of(json.loads(answer)["request_id"])


def test_the_routes_are_all_there(target: Target) -> None:
    posted = {route.path.removeprefix("/api/v1/") for route in routes(target.server) if "POST" in (route.methods or ())}
    assert posted - {p for p in posted if p.endswith("/publish")} == {*JSON_TYPES, *UNTYPED, "forward_backward"}


def test_changed_requests(whole: bool, target: Target, tally: Counter[str]) -> None:
    names = st.sampled_from(sorted({*JSON_TYPES, *UNTYPED}))

    def check(data: st.DataObject) -> None:
        name = data.draw(names)
        body = fuzz_bodies.changed(data.draw, target.example(name))
        sent = fuzz_bodies.damaged(data.draw, fuzz_bodies.written(data.draw, body))
        path = name.replace("{session}", "none")
        send(target, f"/api/v1/{path}", *fuzz_bodies.wrapped(data.draw, sent))

    for _ in range(2 if whole else 1):
        check_all(whole, target, tally, "JSON", check)


def test_requests_of_the_right_form(whole: bool, target: Target, tally: Counter[str]) -> None:
    names = st.sampled_from(sorted(JSON_TYPES))

    def check(data: st.DataObject) -> None:
        name = data.draw(names)
        schema = JSON_TYPES[name].model_json_schema()
        body = data.draw(fuzz_bodies.of_schema(schema, schema.get("$defs", {})))
        ours = target.example(name)
        # Of those who are there, else hardly anything gets further than their name.
        for key in ("session_id", "model_id", "seq_id", "sampling_session_id", "base_model"):
            if key in ours and data.draw(st.integers(0, 9)):
                body[key] = ours[key]
        send(target, f"/api/v1/{name}", json.dumps(body).encode(), [])

    check_all(whole, target, tally, "values in JSON", check)


def test_changed_messages(whole: bool, target: Target, tally: Counter[str]) -> None:
    def check(data: st.DataObject) -> None:
        body = fuzz_bodies.forward_backward(data.draw, target.model_id, target.following())
        sent = fuzz_bodies.damaged(data.draw, body)
        send(target, "/api/v1/forward_backward", *fuzz_bodies.wrapped(data.draw, sent))

    check_all(whole, target, tally, "protobuf", check)


def test_any_path(whole: bool, target: Target, tally: Counter[str]) -> None:
    # The fake engine has no figures to show.
    own = [route for route in routes(target.server) if route.path not in ("/metrics", "/api/v1/metrics/engines")]
    paths = sorted((route.path, method) for route in own for method in {*(route.methods or ())} - {"POST", "HEAD"})

    def check(data: st.DataObject) -> None:
        path, method = data.draw(st.sampled_from(paths))
        ours = {"run": target.model_id, "kind": "weights", "name": "a", "session": target.session_id}
        for name in re.findall(r"{(\w+)(?::path)?}", path):
            texts = [fuzz_bodies.TEXTS, st.just(ours.get(name, target.sampler_id))]
            path = re.sub(rf"{{{name}(:path)?}}", lambda _, t=texts: data.draw(st.one_of(*t)), path, count=1)
        keys = st.sampled_from(["limit", "offset", "since", "points", "project_id", "x"])
        pairs = data.draw(
            st.lists(st.tuples(keys, st.one_of(fuzz_bodies.NUMBERS.map(str), fuzz_bodies.TEXTS)), max_size=3)
        )
        query = "&".join(f"{key}={quote(value, errors='replace')}" for key, value in pairs).encode()
        body = fuzz_bodies.written(data.draw, fuzz_bodies.changed(data.draw, {"ttl_seconds": 5, "project_id": "p"}))
        target.call(method, path, body if method == "PUT" else b"", query=query)

    check_all(whole, target, tally, "paths", check)
