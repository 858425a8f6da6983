"""What do clients notice of a disk that refuses, or of a checkpoint that expires in use or goes while it loads?"""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinker

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint.disk import clock
from jax_client.checkpoint.store import CheckpointStore
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT, logprob, step
from support.faults.fault_child import Calls
from support.faults.fault_children import Children, job, said
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the SDK's, of ways that programs use
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


@pytest.mark.parametrize(
    ("error", "calls", "advice"),
    [
        # A full disk still removes files, and lets locks be taken.
        (errno.ENOSPC, Calls.ALL & ~Calls.REMOVES, "Make room there"),
        (errno.EROFS, Calls.ALL, "cannot write to"),
    ],
    ids=["full", "read-only"],
)
def test_a_server_on_a_disk_that_refuses_everything(
    children: Children, tmp_path: Path, error: int, calls: Calls, advice: str
) -> None:
    state_dir = tmp_path / "state"
    status = children.run(job("served", state_dir, error=error, calls=int(calls)))
    (found,) = said(state_dir)
    assert status == [0] and found["hits"] > 0, found
    needs_disk = {"save", "another run"}
    for name, failed in found["failing"].items():
        assert bool(failed) == (name in needs_disk), (name, failed)
        assert name not in needs_disk or advice in failed, failed
    assert set(found["working"].values()) == {""}, found["working"]
    assert found["restarted"] == "" and found["names"][:1] != ["bad"]
    assert {"good", "after"} <= set(found["names"]) and "bad" not in found["names"]


def test_a_checkpoint_expires_while_it_is_sampled_from(
    start: Any, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = connect(start())
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    step(client)
    path = client.save_weights_for_sampler("s", ttl_seconds=3600).result(LIMIT).path
    sampler = service.create_sampling_client(path)
    before = sampler.sample(PROMPT, 1, PARAMS).result(LIMIT).sequences[0]
    loaded[0].gate.clear()
    future = sampler.sample(PROMPT, 1, PARAMS)
    begun = threading.Event()
    wait_for(lambda: len(loaded[0].requests) == 2)
    loaded[0]._device.submit(begun.set)  # behind the sample, which waits at the gate
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: replace(now, since_boot=now.since_boot + 3601, wall=now.wall + 3601))
    store = CheckpointStore(tmp_path)
    assert [record.name for record in store.list()] == ["s"] and not begun.is_set()
    store.sweep_expired()
    assert store.list() == [] and not begun.is_set()
    loaded[0].gate.set()
    for each in (future, sampler.sample(PROMPT, 1, PARAMS)):
        found = each.result(LIMIT).sequences[0]
        assert (found.tokens, found.logprobs) == (before.tokens, before.logprobs)
    with pytest.raises(tinker.NotFoundError, match="has no checkpoint sampler_weights/s"):
        service.create_sampling_client(path).sample(PROMPT, 1, PARAMS).result(LIMIT)


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_a_checkpoint_goes_while_a_client_loads_it(
    start: Any, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between its hashes and its arrays: a deletion is a deletion, an expiry waits for the reader."""
    service = connect(start())
    client, rest = service.create_lora_training_client(MODEL, 4).result(LIMIT), service.create_rest_client()
    step(client)
    path = client.save_state("s", ttl_seconds=3600).result(LIMIT).path
    saved = logprob(client)
    step(client)
    latest, now = logprob(client), clock.now()
    assert latest != saved
    original, store, done = array_files.read, CheckpointStore(tmp_path), []

    def late(directory: Path) -> Any:
        if not done:
            done.append(directory)
            if how == "deleted":
                rest.delete_checkpoint_from_tinker_path(path).result(LIMIT)
            else:
                later = replace(now, since_boot=now.since_boot + 3601, wall=now.wall + 3601)
                monkeypatch.setattr(clock, "now", lambda: later)
                store.sweep_expired()
        return original(directory)

    monkeypatch.setattr(array_files, "read", late)
    loading = client.load_state_with_optimizer(path)
    if how == "deleted":
        with pytest.raises(tinker.RequestFailedError, match="has no checkpoint weights/s"):
            loading.result(LIMIT)
        assert logprob(client) == latest, "nothing of it was loaded"
    else:
        loading.result(LIMIT)
        assert logprob(client) == saved
        store.sweep_expired()
    assert done and store.list() == []
    step(client)
    client.save_state("s").result(LIMIT)
