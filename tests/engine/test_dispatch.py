"""Do training and sampling share the device's time, and can neither keep the other from it?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from jax_client.engine.core.dispatch import Dispatcher, Lane


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    dispatcher = Dispatcher("test")
    yield dispatcher
    dispatcher.close()


class Device:
    """One thing at a time: `turn` takes it for a while, as a program that was launched does."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.used: dict[str, float] = {}

    def turns(self, name: str, seconds: float, until: float) -> Any:
        while time.perf_counter() < until:
            start = max(time.perf_counter(), self.free_at)
            self.free_at = start + seconds
            self.used[name] = self.used.get(name, 0.0) + seconds
            yield partial(time.sleep, self.free_at - time.perf_counter())


def test_each_kind_gets_half_of_the_time(dispatcher: Dispatcher) -> None:
    """Training has two clients and turns ten times as long."""
    device, until = Device(), time.perf_counter() + 3
    futures = [
        dispatcher.submit(Lane(), device.turns("training", 0.1, until)),
        dispatcher.submit(Lane(), device.turns("training", 0.1, until)),
        dispatcher.submit(Lane(sampling=True), device.turns("sampling", 0.01, until)),
    ]
    for future in futures:
        future.result()
    assert 0.6 <= device.used["sampling"] / device.used["training"] <= 1.6
    assert sum(device.used.values()) >= 2.4  # nobody waited while the device was idle


def test_one_kind_alone_waits_for_nobody(dispatcher: Dispatcher) -> None:
    device, until = Device(), time.perf_counter() + 0.5
    dispatcher.submit(Lane(), device.turns("training", 0.01, until)).result()
    assert device.used["training"] >= 0.35


def test_a_task_may_wait_for_one_of_the_other_kind(dispatcher: Dispatcher) -> None:
    """Such as a custom loss that samples: the sampling lane is ahead, and must not be held back for ever."""

    def sampling() -> Any:
        yield partial(time.sleep, 0.2)
        return "sampled"

    def training() -> Any:
        answer: Future[str] = dispatcher.submit(Lane(sampling=True), sampling())
        return (yield answer.result)

    dispatcher.submit(Lane(sampling=True), sampling()).result()
    assert dispatcher.submit(Lane(), training()).result(timeout=10) == "sampled"
