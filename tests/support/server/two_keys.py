"""How do the tests get servers of several keys without sockets, and what does each of their clients have?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax_client
from jax_client.server.app import build_keyed_app
from jax_client.server.keyed import KeyedServers
from jax_client.server.state.server import Server
from jax_client.server.wire import keys
from jax_client.server.wire.keys import Key
from support.fake_engine import MODEL, FakeModels
from support.graphs.graph_nodes import OUT, P_IN, TOTAL
from support.server.asgi import ask
from support.server.serving import API, forward_backward_body

LIMIT = 60
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
GRAPH, INPUTS = {"nodes": [P_IN, TOTAL, OUT]}, [{"name": "logprobs", "rank": 1}]


@dataclass
class Answer:
    """What came back for a request."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


def write_keys(path: Path, options: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Write a file of keys, each with its options; return the keys by their names."""
    made = {name: keys.new_key() for name in options}
    path.write_text("".join(keys.line_of(name, made[name], options[name]) + "\n" for name in options))
    return made


class Team:
    """The servers of several keys, called by the key's name as a client would call them.

    Args:
        state_dir: theirs.
        options: of each key, by its name.
        open_log: as `KeyedServers` takes it.
    """

    def __init__(self, state_dir: Path, options: Mapping[str, tuple[str, ...]], open_log: Any = lambda _: None) -> None:
        self.state_dir = state_dir
        file = state_dir.parent / f"{state_dir.name}.keys"
        self.secrets = write_keys(file, options)
        self.keys: list[Key] = keys.read_keys(file)
        settings = jax_client.EngineConfig(state_dir=state_dir, autosave_minutes=None)
        self.models = FakeModels()
        self.servers = KeyedServers(Server(settings, base_models=self.models), self.keys, open_log)
        self.app = build_keyed_app(self.servers, hosts=["127.0.0.1"])
        self.loop = asyncio.new_event_loop()

    def close(self) -> None:
        self.servers.close(30)
        self.loop.close()

    def call(self, who: str, method: str, path: str, body: Any = None) -> Answer:
        """Ask as the client of a key; a body that is no bytes is sent as JSON."""
        path, _, query = path.partition("?")
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        key = (b"x-api-key", self.secrets.get(who, who).encode())
        asked = ask(self.app, method, path, [data], [key], query.encode())
        return Answer(*self.loop.run_until_complete(asyncio.wait_for(asked, LIMIT)))

    def post(self, who: str, name: str, body: Any) -> Any:
        answer = self.call(who, "POST", f"{API}/{name}", body)
        assert answer.status == 200, answer
        return answer.json

    def answer_of(self, who: str, request_id: str) -> Answer:
        """Await the answer of an accepted request."""
        end = time.monotonic() + LIMIT
        while (answer := self.call(who, "POST", f"{API}/retrieve_future", {"request_id": request_id})).status == 408:
            assert time.monotonic() < end
        return answer

    def done(self, who: str, name: str, body: Any) -> Any:
        """Send a request, await its answer, and return it."""
        answer = self.answer_of(who, self.post(who, name, body)["request_id"])
        assert answer.status == 200 and b'"error"' not in answer.body, answer
        return answer.json if answer.body[:1] == b"{" else answer.body


@dataclass
class Belongings:
    """What one client has: of each kind of thing that a client can name, one."""

    session: str
    model: str
    sampler: str
    future: str
    loss: str
    paths: dict[str, str] = field(default_factory=dict)
    number: int = 1

    def renamed(self, session: str) -> Belongings:
        """The same names in another session."""
        text = json.dumps(asdict(self)).replace(self.session, session)
        return Belongings(**json.loads(text))


def session_of(team: Team, who: str) -> str:
    asked = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
    return team.post(who, "create_session", asked)["session_id"]


def model_of(team: Team, who: str, session: str, number: int = 0) -> str:
    asked = {"session_id": session, "model_seq_id": number, "base_model": MODEL, "lora_config": {"rank": 4}}
    return team.done(who, "create_model", asked)["model_id"]


def belongings(team: Team, who: str, data: Any) -> Belongings:
    """Make one of everything for a client; `data` is a list of Datum."""
    session = session_of(team, who)
    model = model_of(team, who, session)
    asked = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = team.post(who, "create_sampling_session", asked)["sampling_session_id"]
    sampling = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 4}}
    future = team.post(who, "asample", sampling)["request_id"]
    team.answer_of(who, future)
    uploaded = {"session_id": session, "custom_loss_seq_id": 0, "name": "l", "graph": GRAPH, "inputs": INPUTS}
    loss = team.done(who, "create_custom_loss", uploaded)["loss_id"]
    team.done(who, "forward_backward", forward_backward_body(model, 1, data))
    found = Belongings(session, model, sampler, future, loss, number=2)
    for kind, name in (("weights", "save_weights"), ("sampler_weights", "save_weights_for_sampler")):
        body = {"model_id": model, "seq_id": found.number, "path": "a"}
        found.paths[kind] = team.done(who, name, body)["path"]
        found.number += 1
    export = {"model_id": model, "seq_id": found.number, "path": "a"}
    found.paths["external_weights"] = team.done(who, "save_weights_external", export)["path"]
    found.number += 1
    return found
