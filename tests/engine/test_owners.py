"""Do owners share the device, whatever number of lanes and samples each has, and does none see another's prompts?"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.dispatch import Dispatcher
from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.core.turns import RECENT_S, Lane, Turns
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.rows import Job
from jax_client.engine.sample.schedule import Schedule
from jax_client.engine.train.results import Results
from jax_client.threads import InTurn
from jax_client.values import LoraSpec


def simulate(
    turn_s: dict[Lane, float],
    until: float,
    starts: dict[Lane, float] | None = None,
    *,
    pipelined: Collection[Lane] = (),
) -> Counter[str]:
    """Return the seconds of the device that each owner has used; lanes come when they start, and stay.

    A clock without a machine: what a turn launches takes the device one after the other, and its lane is ready for the
    next turn when that has ended. A pipelined lane waits for its launch before the last one, unless owners share.
    """
    turns, used, order = Turns(), Counter[str](), itertools.count()
    unawaited: dict[Lane, list[float]] = {lane: [] for lane in pipelined}
    now = free_at = 0.0
    events = [(at, next(order), lane, "start") for lane, at in (dict.fromkeys(turn_s, 0.0) | (starts or {})).items()]
    heapq.heapify(events)
    while now < until:
        while events and events[0][0] <= now:
            _, _, lane, what = heapq.heappop(events)
            turns.enter(lane) if what == "start" else turns.charge(lane, now)
            turns.make_ready(lane, now)
        lane, hold_s = turns.take(now)
        if lane is None:
            held_until = until if hold_s is None else now + hold_s
            now = min(held_until, events[0][0]) if events else held_until
            continue
        free_at = max(now, free_at) + turn_s[lane]
        for owner, share in lane.shares.items():
            used[owner] += turn_s[lane] * share
        end = free_at
        if lane in unawaited and not turns.shared():
            unawaited[lane].append(free_at)
            end = max(now + 1e-4, unawaited[lane].pop(0) if len(unawaited[lane]) > 1 else 0.0)
        heapq.heappush(events, (end, next(order), lane, "end"))
    return used


def test_an_owner_of_twenty_lanes_gets_no_more_than_one_of_one() -> None:
    used = simulate({**{Lane("many"): 0.1 for _ in range(20)}, Lane("one"): 0.1}, until=60)
    assert used["one"] / used["many"] == pytest.approx(1, abs=0.05)
    assert used.total() >= 58, "nobody waited while the device was idle"


@pytest.mark.parametrize("turns", [(0.01, 0.5), (0.5, 0.01)])
def test_the_length_of_a_turn_gives_no_more(turns: tuple[float, float]) -> None:
    used = simulate({**{Lane("many"): turns[0] for _ in range(5)}, Lane("one"): turns[1]}, until=60)
    assert used["one"] / used["many"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sampling", [True, False])
def test_what_is_launched_without_waiting_is_paid_by_who_launched_it(sampling: bool) -> None:
    training = [Lane("many") for _ in range(8)]
    used = simulate({**dict.fromkeys(training, 1.0), Lane("one", sampling=sampling): 0.1}, 600, pipelined=training)
    assert used["one"] / used["many"] == pytest.approx(1, abs=0.05)


def test_an_owner_shares_until_a_moment_after_the_others_work_has_ended() -> None:
    turns, ours, other = Turns(), Lane("a"), Lane("b")
    turns.enter(ours)
    assert not turns.shared(), "as without keys"
    turns.enter(other)
    assert turns.shared()
    turns.leave(other)
    assert turns.shared(), "its next request may come at once"
    turns.make_ready(ours, 0.0)
    turns.take(0.0)
    turns.charge(ours, RECENT_S + 1)
    assert not turns.shared()


class Array:
    """What a program returns that runs until it is waited for."""

    def __init__(self, waited: list[Array]) -> None:
        self.waited = waited

    def block_until_ready(self) -> Array:
        self.waited.append(self)
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.zeros(1)


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_are_waited_for_within_their_turns_where_owners_share(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax_client.engine.train.packing.unpack", lambda *_: None)
    dispatcher, begun, gate = Dispatcher("test"), Future[None](), Future[None]()
    waited: list[Array] = []
    arrays = [Array(waited) for _ in range(3)]
    seen = []

    def other() -> Any:
        begun.set_result(None)
        yield gate.result

    def train() -> Any:
        results = Results([])
        for array in arrays:
            batch: Any = SimpleNamespace(plan=None)
            yield from results.add(batch, cast(Any, array), {}, running=[array])
            seen.append(list(waited))

    held = dispatcher.submit(Lane("b" if shared else "a"), other())
    begun.result(30)
    dispatcher.submit(Lane("a"), train()).result(30)
    assert seen == ([arrays[:1], arrays[:2], arrays] if shared else [[], [], []])
    gate.set_result(None)
    held.result(30)
    dispatcher.close()


def test_who_samples_does_not_pay_what_those_owe_who_sampled_before() -> None:
    turns, ahead, trains, sampling = Turns(), Lane("ahead"), Lane("trains"), Lane(sampling=True)
    for lane in (ahead, trains):
        turns.enter(lane)
        turns.make_ready(lane, 0.0)
    assert turns.take(0.0)[0] is ahead
    turns.charge(ahead, 100.0)
    turns.make_ready(ahead, 100.0)
    sampling.shares = {"ahead": 1.0}
    turns.enter(sampling)
    turns.make_ready(sampling, 100.0)
    assert turns.take(100.0)[0] is trains
    assert turns.take(100.0)[0] is None, "the sampling lane is held back with its owner"
    sampling.expect("comes")
    assert turns.follow(sampling)
    assert turns.take(100.0)[0] is sampling
    turns.charge(sampling, 101.0)
    sampling.shares, sampling.due = {"comes": 0.0, "ahead": 1.0}, ()
    turns.make_ready(sampling, 101.0)
    assert turns.take(101.0)[0] is None, "an owner whom no turn can serve does not let the others go first"


@pytest.mark.parametrize("owner", ["a", "b"])
def test_who_waits_for_a_compile_holds_no_one_back_and_saves_nothing_up(owner: str) -> None:
    turns, trains, samples, comes = Turns(), Lane("a"), Lane(owner, sampling=True), Lane("c")
    for lane in (trains, samples):
        turns.enter(lane)
        turns.make_ready(lane, 0.0)
    first, _ = turns.take(0.0)
    assert first is trains
    turns.wait_elsewhere(trains)
    for now in range(60):
        assert turns.take(now)[0] is samples, "at once"
        turns.charge(samples, now + 1.0)
        turns.make_ready(samples, now + 1.0)
        if now == 30:  # who has the lane meanwhile
            trains.shares, trains.due = {"a": 0.0, "c": 0.0}, {"c"}
            turns.follow(trains)
    turns.make_ready(trains, 60.0)
    turns.enter(comes)
    turns.make_ready(comes, 60.0)
    taken = []
    for now in range(60, 120):
        while (lane := turns.take(now)[0]) is None:
            now += 0.1
        taken.append(lane)
        turns.charge(lane, now + 1.0)
        turns.make_ready(lane, now + 1.0)
    assert taken.count(samples) >= 15, "it goes on as before"


def test_a_turn_is_chosen_as_fast_for_many_lanes_as_for_few() -> None:
    def take_s(lanes_each: int) -> float:
        turns = Turns()
        for owner in "abcdefghij":
            lanes = [Lane(owner) for _ in range(lanes_each)]
            for lane in lanes:
                turns.enter(lane)
            for lane in lanes[: len(lanes) * 2 // 3]:
                turns.make_ready(lane, 0.0)
        took = []
        for now in range(1, 20):
            began = time.thread_time()
            assert turns.take(float(now))[0] is not None
            took.append(time.thread_time() - began)
        return min(took)

    assert take_s(150) < 5 * take_s(3) + 1e-4


def test_training_and_sampling_of_one_owner_count_together() -> None:
    sampling = Lane("both", sampling=True)
    used = simulate({Lane("both"): 0.1, sampling: 0.05, Lane("trains"): 0.1}, until=60)
    assert used["trains"] / used["both"] == pytest.approx(1, abs=0.1)


def test_a_turn_of_sampling_is_paid_by_those_who_have_rows_in_it() -> None:
    sampling = Lane(sampling=True)
    sampling.shares = {"samples": 0.75, "both": 0.25, "waits": 0.0}
    used = simulate({Lane("both"): 0.1, sampling: 0.1}, until=60)
    # A turn of both costs "both" a quarter; the rest of its half goes to its training.
    assert used["both"] == pytest.approx(used["samples"], rel=0.15) and not used["waits"]


def test_no_time_is_saved_up_and_none_is_owed_for_ever() -> None:
    """One who comes late does not get all of what the others had before; nor do they, who had it alone."""
    early, late = Lane("early"), Lane("late")
    before = simulate({early: 0.1, late: 0.1}, until=100, starts={late: 99.0})
    assert before["late"] == pytest.approx(0.5, abs=0.2)
    used = simulate({early: 0.1, late: 0.1}, until=300, starts={late: 100.0})
    assert used["late"] == pytest.approx(100, abs=1)


def test_three_owners_get_a_third_each() -> None:
    lanes = {Lane(owner): 0.1 for owner, count in (("a", 1), ("b", 4), ("c", 9)) for _ in range(count)}
    used = simulate(lanes, until=90)
    assert all(used[owner] == pytest.approx(30, abs=1) for owner in "abc")


def test_the_dispatcher_tells_what_each_owner_has_used() -> None:
    dispatcher, clock = Dispatcher("test"), Future[None]()

    def task() -> Any:
        yield clock.result
        return None

    waiting = [dispatcher.submit(Lane(owner), task()) for owner in ("a", "b")]
    clock.set_result(None)
    for future in waiting:
        future.result(30)
    used = dispatcher.device_s()
    dispatcher.close()
    assert set(used) == {"a", "b"} and min(used.values()) > 0


def test_packing_of_one_owner_neither_delays_another_nor_takes_the_threads_that_wait_for_the_device() -> None:
    packers, gate, order = InTurn("test-pack", 1, ready=1), Future[None](), list[str]()
    first = packers.submit("many", gate.result)
    packed = [packers.submit("many", order.append, "many") for _ in range(100)]
    packed.append(packers.submit("one", order.append, "one"))
    dispatcher = Dispatcher("test")

    def train() -> Any:
        yield packed[-1]
        return "trained"

    def sample() -> Any:
        return (yield lambda: "sampled")

    training = [dispatcher.submit(Lane("many"), train()) for _ in range(100)]
    assert dispatcher.submit(Lane("one", sampling=True), sample()).result(30) == "sampled"
    assert not any(future.done() for future in training)
    gate.set_result(None)
    assert {future.result(30) for future in training} == {"trained"}
    for future in (first, *packed):
        future.result(30)
    assert order.index("one") <= 1
    assert not dispatcher.device_s()["many"], "who waits for packing uses no device"
    dispatcher.close()
    packers.close()


# The rows of samples, on a machine of eight rows.


def job(owner: str, *tokens: int, **fields: Any) -> Job:
    tokens_T = np.repeat(np.array(tokens or (1,), np.int32), PAGE)
    tokens_T = np.append(tokens_T, np.int32(9))
    return Job(GenerationRequest(**{"tokens_T": tokens_T, "max_tokens": 8, "owner": owner} | fields), None)


def launch_all(schedule: Schedule) -> list[str]:
    """Compute every tile; return whose they were, turn by turn."""
    order = []
    while schedule.pending_tiles():
        _, ways = schedule.next_tiles(2)
        order.append("".join({tile.row.owner for tile in ways[0]}))
        for tile in ways[0]:
            tile.launched = True
    return order


def running(schedule: Schedule) -> Counter[str]:
    return Counter(row.owner for row in schedule.placed)


def scheduled(*jobs: Job) -> Schedule:
    schedule = Schedule(ways=1, pages=100, rows=8, steps=4)
    for each in jobs:
        schedule.add(each)
    schedule.place()
    return schedule


def test_rows_are_shared_by_owners_and_not_by_requests() -> None:
    schedule = scheduled(*(job("many", n) for n in range(20)), job("one", 50, num_samples=20))
    assert running(schedule) == {"many": 4, "one": 4}
    launch_all(schedule)
    for _ in range(10):
        schedule.finish(next(row for row in schedule.placed if row.owner == "many"))
        schedule.place()
        launch_all(schedule)
        assert running(schedule) == {"many": 4, "one": 4}


def test_one_who_comes_to_a_full_device_gets_the_newest_rows_of_who_has_most() -> None:
    schedule = scheduled(job("many", 1, num_samples=30))
    assert running(schedule) == {"many": 8}
    schedule.add(job("one", 2, num_samples=2))
    schedule.place()
    assert running(schedule) == {"many": 8}, "what is not computed yet is not taken back"
    launch_all(schedule)
    oldest = schedule.placed[0]
    oldest.drawn = [3, 4]
    schedule.place()
    assert running(schedule) == {"many": 6, "one": 2} and schedule.placed[0] is oldest
    launch_all(schedule)
    schedule.add(job("third", 3, num_samples=9))
    schedule.place()
    assert running(schedule) == {"many": 3, "one": 2, "third": 3}
    # Those that were taken back are the next ones of their owner, in their order.
    again = [row.sample for row in schedule.waiting if row.owner == "many"]
    assert again == sorted(again) and len(again) == 27 and again[0] == 3


def test_equal_owners_alternate_where_only_one_row_fits() -> None:
    schedule = Schedule(ways=1, pages=100, rows=1, steps=4)
    for owner in ("a", "b"):
        schedule.add(job(owner, num_samples=3))
    order = []
    while True:
        schedule.place()
        if not schedule.placed:
            break
        launch_all(schedule)
        order.append(schedule.placed[0].owner)
        schedule.finish(schedule.placed[0])
    assert "".join(order) == "ababab"


def test_tiles_are_computed_for_the_owners_in_turn() -> None:
    schedule = scheduled(job("a", 1, 2, 3, 4, 5, 6), job("b", 7, 8, 9), job("c", 1, 2, 3, 4))
    assert launch_all(schedule)[:6] == ["a", "b", "c", "a", "b", "c"]


def test_every_owner_takes_part_in_a_block_of_few_adapters() -> None:
    """A block has four adapters at most; who samples from twenty has not all of them."""

    def adapter() -> Snapshot:
        return Snapshot(spec=LoraSpec(rank=4, seed=0), weights={"layers": {}, "unembed": {}})

    schedule = Schedule(ways=1, pages=400, rows=32, steps=4)
    for n in range(10):
        schedule.add(Job(job("many", n).request, adapter()))
    schedule.add(Job(job("one", 50).request, adapter()))
    schedule.place()
    launch_all(schedule)
    for _ in range(10):
        _, (rows,) = schedule.next_block()
        assert Counter(row.owner for row in rows) == {"many": 3, "one": 1}


def test_a_row_that_needs_a_page_takes_it_from_who_has_most() -> None:
    schedule = Schedule(ways=1, pages=14, rows=8, steps=4)
    schedule.add(job("one", 1, max_tokens=3 * PAGE))
    schedule.place()
    schedule.add(job("many", 2, num_samples=20, max_tokens=3 * PAGE))
    schedule.place()
    launch_all(schedule)
    for _ in range(3 * PAGE // 4):
        for row in schedule.next_block()[1][0]:
            row.drawn += [5] * 4
        assert running(schedule)["one"] == 1
        if schedule.placed[0].length >= 4 * PAGE:
            break
    assert running(schedule)["many"] < 6, "there were too few pages"


def test_no_owner_finds_the_prefix_of_another() -> None:
    """Else the count of cached tokens, and the time, would say which prompts others send to the base model."""
    schedule = scheduled(job("a", 1, 2, 3))
    launch_all(schedule)
    schedule.finish(schedule.placed[0])
    # The row of the others leaves its own pages behind, where its owner finds them again.
    for owner, cached in (("b", 0), ("a", 3 * PAGE), ("", 0), ("b", 3 * PAGE)):
        asked = job(owner, 1, 2, 3)
        schedule.add(asked)
        schedule.place()
        launch_all(schedule)
        assert asked.cached_tokens == cached, owner
        schedule.finish(schedule.placed[0])


def test_the_parts_of_a_turn_are_those_of_its_rows() -> None:
    schedule = scheduled(job("a", 1, num_samples=3), job("b", 2), job("c", 3, num_samples=99))
    launch_all(schedule)
    _, (rows,) = schedule.next_block()
    shares = schedule.shares(row for row in rows if row.owner != "b")
    assert sum(shares.values()) == pytest.approx(1) and shares["b"] == 0 and shares["a"] + shares["c"] == 1
