"""Do training and sampling share the device's time, and can neither keep the other from it?"""

from __future__ import annotations

import heapq
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from jax_client.engine.core.accounting import Work
from jax_client.engine.core.dispatch import Dispatcher
from jax_client.engine.core.turns import Lane, Turns


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    dispatcher = Dispatcher("test")
    yield dispatcher
    dispatcher.close()


def simulate(turn_s: dict[Lane, float], until: float) -> Counter[str]:
    """Return the seconds of the device that each kind has used. A clock without a machine: what a turn launches takes
    the device one after the other, and its lane is ready for the next turn when that has ended."""
    turns, used, order = Turns(), Counter[str](), itertools.count()
    now = free_at = 0.0
    ends: list[tuple[float, int, Lane]] = []
    for lane in turn_s:
        turns.enter(lane)
        turns.make_ready(lane, now)
    while now < until:
        lane, hold_s = turns.take(now)
        if lane is not None:
            free_at = max(now, free_at) + turn_s[lane]
            used["sampling" if lane.sampling else "training"] += turn_s[lane]
            heapq.heappush(ends, (free_at, next(order), lane))
            continue
        held_until = until if hold_s is None else now + hold_s
        now = min(held_until, ends[0][0]) if ends else held_until
        while ends and ends[0][0] <= now:
            _, _, ended = heapq.heappop(ends)
            turns.charge(ended, now)
            turns.make_ready(ended, now)
    return used


def test_each_kind_gets_half_of_the_time() -> None:
    """Training has two clients and turns ten times as long."""
    used = simulate({Lane(): 0.1, Lane(): 0.1, Lane(sampling=True): 0.01}, until=30)
    assert 0.9 <= used["sampling"] / used["training"] <= 1.1
    assert sum(used.values()) >= 28  # nobody waited while the device was idle


def test_one_kind_alone_waits_for_nobody() -> None:
    assert simulate({Lane(): 0.01}, until=0.5)["training"] >= 0.49


def test_the_dispatcher_gives_the_turns_in_that_order(dispatcher: Dispatcher) -> None:
    """Two lanes that are ready at the same time go round robin."""
    begun, order = Future[None](), list[str]()

    def first() -> Any:
        begun.result(30)
        yield None

    def turns(name: str) -> Any:
        for _ in range(3):
            order.append(name)
            yield None

    lanes = [Lane() for _ in range(3)]
    futures = [dispatcher.submit(lanes[0], first())]
    futures += [dispatcher.submit(lane, turns(name)) for lane, name in zip(lanes[1:], "ab", strict=True)]
    begun.set_result(None)
    for future in futures:
        future.result(30)
    assert order == ["a", "b"] * 3


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


def test_liveness_counts_from_when_work_came() -> None:
    dispatcher = Dispatcher("test")
    time.sleep(0.05)
    assert dispatcher.liveness().stalled_s == 0.0, "nothing to do is no standstill"
    gate: Future[None] = Future()

    def task() -> Any:
        yield gate.result

    future = dispatcher.submit(Lane(), task())
    found = dispatcher.liveness()
    assert found.alive and found.waiting == 1 and found.stalled_s < 0.05
    time.sleep(0.06)
    assert dispatcher.liveness().stalled_s >= 0.05
    gate.set_result(None)
    future.result(30)
    assert dispatcher.liveness().waiting == 0
    dispatcher.close()
    assert not dispatcher.liveness().alive


def test_work_has_a_queue() -> None:
    work = Work(tokens=1, computed=2, device_s=1.0, queue_s=0.5)
    work.add(Work(queue_s=0.25))
    assert work.rates(1.0)["queue_seconds"] == 0.75
    assert json.dumps(work.rates(1.0))
