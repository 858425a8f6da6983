"""Is an honest client served while all attacks run together, and does the server hold nothing of them afterwards?"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from jax_client.server.state import live_objects
from jax_client.server.wire import connections
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.attacks import Attack
from support.server.served_fake import LIMIT, connect, wait_for
from support.server.serving import KEY

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


def test_an_honest_client_beside_every_attack(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of `scripts/probes/soak.py`, which measures the memory of a real server."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    monkeypatch.setattr(live_objects, "IDLE_SECONDS", 2.0)
    running = start()
    attack = Attack(running.port, KEY, MODEL, scale=0.02)
    attack.start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    end, rounds = time.monotonic() + 3, 0
    while time.monotonic() < end or not rounds:
        passed, stepped = client.forward_backward(DATA, "cross_entropy"), client.optim_step(ADAM)
        assert passed.result(LIMIT).metrics["loss:sum"] == 1.0 and stepped.result(LIMIT)
        sampler = client.save_weights_and_get_sampling_client()
        assert sampler.sample(PROMPT, 1, PARAMS).result(LIMIT).sequences[0].tokens == [5, 2]
        assert connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
        rounds += 1
    attack.stop()
    account = running.server.account
    wait_for(lambda: account.used("arriving_bytes") == account.used("polls") == 0, LIMIT)
    # The request that waits for one that never comes.
    assert account.used("training_requests") <= 3 and account.used("bytes") < 1_000
    gc.collect()
    assert account.used("loads") == 0 and account.used("sampling_requests") == 0
    assert attack.counts["names"] or attack.counts["headers"], attack.counts
