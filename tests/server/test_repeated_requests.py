"""Is a request that is sent twice carried out once?"""

from __future__ import annotations

from typing import Any

import pytest

from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.served_fake import LIMIT, connect
from support.server.serving import (
    API,
    Between,
    Running,
    body_of,
    nowhere,
    whole_body,
)

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


class Twice(Between):
    """Sends every POST twice, as a client does that lost the first answer."""

    def __init__(self) -> None:
        super().__init__(self._twice)
        self.paths: set[str] = set()

    async def _twice(self, served: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != "POST":
            await served(scope, receive, send)
            return
        self.paths.add(scope["path"].removeprefix(API + "/"))
        body = await body_of(receive)
        await served(scope, whole_body(body), nowhere)
        await served(scope, whole_body(body), send)


def use_everything(running: Running) -> tuple[list[float], list[str]]:
    service = connect(running)
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    numbers = []
    for _ in range(2):
        client.forward_backward(DATA, "cross_entropy").result(LIMIT)
        numbers.append(client.optim_step(ADAM).result(LIMIT).metrics["grad_norm:mean"])
    path = client.save_state("a").result(LIMIT).path
    client.load_state_with_optimizer(path).result(LIMIT)
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    saved = client.save_weights_for_sampler("s").result(LIMIT).path
    service.create_sampling_client(saved).sample(PROMPT, 1, PARAMS).result(LIMIT)
    resumed = service.create_training_client_from_state_with_optimizer(path).result(LIMIT)
    resumed.forward_backward(DATA, "cross_entropy").result(LIMIT)
    logprobs = resumed.forward(DATA, "cross_entropy").result(LIMIT).loss_fn_outputs[0]["logprobs"].to_numpy()
    numbers.extend(logprobs.tolist())
    return numbers, [str(record.name) for record in running.server.live.own.store.list()]


def test_what_is_sent_twice_is_done_once(start: Any, loaded: Any) -> None:
    once = use_everything(start())
    twice = Twice()
    again = use_everything(start(twice))
    assert again[0] == once[0]
    assert sorted(again[1]) == sorted(once[1] * 2), "those of the first server, and as many"
    assert loaded[0].log == 2 * loaded[0].log[: len(loaded[0].log) // 2]
    promising = {"create_model", "load_weights", "optim_step", "save_weights", "save_weights_for_sampler"}
    assert twice.paths >= promising | {"forward_backward", "asample", "retrieve_future", "create_sampling_session"}
