"""Does every request reach a replica, get its own answer whatever is lost, and leave nothing behind?"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jax_client.engine.hosts.samplers import pool as pool_module
from jax_client.engine.hosts.samplers.pool import MAX_WAITING, SamplerPool
from jax_client.errors import BadRequestError, DoesNotFitError, RequestFailedError
from jax_client.values import LoraSpec
from support.samplers.fakes import FakeReplica, FakeTrainer, pool_of, request, result, snapshot, until

Open = Callable[..., SamplerPool]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens pools that are closed at the end."""
    pools: list[SamplerPool] = []

    def open_pool(*replicas: FakeReplica, **settings: Any) -> SamplerPool:
        pools.append(pool_of(*replicas, **settings))
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts and pings follow at once."""
    monkeypatch.setattr(pool_module, "PING_S", 0.01)
    monkeypatch.setattr(pool_module, "RESTART_S", (0.0, 0.0, 0.0))


def same(got: Any, wanted: Any) -> bool:
    return all((a.tokens == b.tokens).all() for a, b in zip(got.rows, wanted.rows, strict=True))


def test_requests_are_spread_by_rows_and_each_gets_its_own_answer(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    pool = opened(a, b)
    sent = [request(num_samples=n) for n in (4, 1, 1, 1, 1)]
    answers = [pool.generate(None, each) for each in sent]
    until(lambda: len(a.pending) + len(b.pending) == 5)
    assert [len(a.pending), len(b.pending)] == [1, 4]  # 4 rows each
    assert pool.rows == 8
    b.answer()
    a.answer()
    assert all(same(answer.result(5), result(each)) for answer, each in zip(answers, sent, strict=True))
    assert pool.rows == 0 and len(pool) == 0


def test_requests_before_the_first_replica_is_open_wait(opened: Open) -> None:
    a = FakeReplica("a", opens=False)
    pool = opened(a)
    pool.generate(None, request())
    until(lambda: len(pool) == 1)
    assert not a.pending and not pool.opened.done()


@pytest.mark.usefixtures("quick")
def test_requests_of_a_lost_replica_are_sent_again_with_their_seed(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    pool = opened(a, b)
    sent = [request() for _ in range(6)]
    answers = [pool.generate(None, each) for each in sent]
    until(lambda: len(a.pending) == len(b.pending) == 3)
    a.opens = False  # it stays away
    a.lose()
    until(lambda: len(b.pending) == 6)
    assert pool.members[0].state == "restarting" and a.called("kill")
    b.answer()
    assert all(same(answer.result(5), result(each)) for answer, each in zip(answers, sent, strict=True))


@pytest.mark.usefixtures("quick")
def test_a_lost_replica_is_started_again_and_bound_again_when_needed(opened: Open) -> None:
    a, version = FakeReplica("a"), snapshot()
    pool = opened(a)
    first = pool.generate(version, request())
    until(lambda: a.pending)
    a.lose()
    until(lambda: a.pending)
    a.answer()
    first.result(5)
    assert len(a.called("start")) == 2
    assert [number for number, _ in a.called("bind")] == [version.number] * 2
    assert len(vars(pool)["shared_states"]) == 1, "the weights are copied once"
    assert pool.members[0].state == "ready"
    assert pool.members[0].starts == 2


@pytest.mark.usefixtures("quick")
def test_a_replica_that_hangs_is_lost(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    pool = opened(a, b, hang_s=0.2)
    pool.opened.result(5)
    until(lambda: pool.members[0].heard and pool.members[1].heard)
    sent = [request(), request()]
    answers = [pool.generate(None, each) for each in sent]
    until(lambda: a.pending and b.pending)
    a.hangs, a.opens = True, False
    until(lambda: len(b.pending) == 2)
    late = next(iter(a.pending.values()))
    assert a.called("kill") and "has not answered" in pool.members[0].reason
    b.answer()
    [answer.result(5) for answer in answers]
    late[2].set_result(None)  # type: ignore[arg-type]  # an answer of a lost process is ignored
    assert pool.generate(None, request()) is not None


@pytest.mark.usefixtures("quick")
def test_without_any_sampler_the_trainer_serves(opened: Open) -> None:
    a, trainer = FakeReplica("a"), FakeTrainer()
    pool = opened(a, trainer=trainer)
    sent = request()
    answer = pool.generate(None, sent)
    until(lambda: a.pending)
    a.refuses = DoesNotFitError("no room")
    a.lose()
    assert same(answer.result(5), result(sent))
    assert trainer.seeds == [sent.seed] and pool.members[0].state == "lost"
    assert pool.members[0].reason == "no room"
    later = request()
    assert same(pool.generate(snapshot(), later).result(5), result(later))


@pytest.mark.usefixtures("quick")
def test_a_request_that_takes_replicas_with_it_fails(opened: Open) -> None:
    a = FakeReplica("a")
    pool = opened(a)
    answer = pool.generate(None, request())
    for _ in range(pool_module.MOST_LOSSES):
        until(lambda: a.pending)
        a.lose()
    with pytest.raises(RequestFailedError, match=r"3 samplers were lost .* sampler 0 on a.*/logs") as raised:
        answer.result(5)
    assert raised.value.category == "server"


def test_cancelling_frees_the_request_at_its_replica(opened: Open) -> None:
    a = FakeReplica("a")
    pool = opened(a)
    future = pool.generate(None, request())
    until(lambda: a.pending)
    assert future.cancel()
    until(lambda: a.called("cancel"))
    assert a.called("cancel") == [(next(iter(a.pending)),)]
    until(lambda: pool.members[0].rows == 0)
    assert pool.rows == 0
    a.answer()  # too late, for no one


def test_errors_keep_class_category_and_message(opened: Open) -> None:
    a = FakeReplica("a")
    pool = opened(a)
    for error in (RequestFailedError("too long", category="user"), BadRequestError("wrong"), ValueError("stop")):
        future = pool.generate(None, request())
        until(lambda: a.pending)
        a.fail(error)
        with pytest.raises(type(error), match=str(error)) as raised:
            future.result(5)
        assert getattr(raised.value, "category", None) == getattr(error, "category", None)
    assert pool.members[0].state == "ready"


def test_a_version_is_copied_once_bound_where_it_is_used_and_freed_with_its_snapshot(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    pool, version = opened(a, b), snapshot(2.0)
    number = version.number
    answers = [pool.generate(version, request()) for _ in range(4)]
    until(lambda: len(a.pending) == len(b.pending) == 2)
    assert len(vars(pool)["shared_states"]) == 1
    for each in (a, b):
        ((bound, weights),) = each.called("bind")
        assert bound == number
        assert weights.step == 3
        np.testing.assert_array_equal(weights.weights["w.A"], np.array([2.0], np.float32))
    del version, weights
    gc.collect()
    assert not a.called("free"), "requests in flight hold it"
    a.answer()
    b.answer()
    [answer.result(5) for answer in answers]
    until(lambda: a.called("free") and b.called("free"))
    assert a.called("free") == b.called("free") == [(number,)]
    assert answers[0].done()  # a future that is kept holds no weights


def test_another_version_does_not_wait_for_one_that_is_copied(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    a = FakeReplica("a")
    pool, slow = opened(a), snapshot()
    gate = pool_module.threading.Event()
    monkeypatch.setattr(pool._versions, "_share", lambda state: gate.wait(5))
    waits = pool.generate(slow, request())
    quick = pool.generate(None, request())
    until(lambda: a.pending)
    a.answer()
    quick.result(5)
    assert not waits.done() and not a.pending
    gate.set()
    until(lambda: a.pending)
    a.answer()
    waits.result(5)


def test_weights_that_cannot_be_copied_fail_their_requests_alone(opened: Open) -> None:
    a = FakeReplica("a")
    pool, damaged = opened(a), snapshot(float("nan"))
    with pytest.raises(RequestFailedError, match=r"w\.A"):
        pool.generate(damaged, request()).result(5)
    future = pool.generate(None, request())
    until(lambda: a.pending)
    a.answer()
    future.result(5)


def test_more_rows_than_the_limit_are_refused_in_the_call(opened: Open) -> None:
    a = FakeReplica("a")
    pool = opened(a)
    pool.generate(None, request(num_samples=MAX_WAITING))
    with pytest.raises(RequestFailedError, match="65536 samples wait already") as raised:
        pool.generate(None, request())
    assert raised.value.category == "user"


def test_a_first_start_that_fails_is_the_users_to_know(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    b.refuses = DoesNotFitError("the base model needs 9 GiB")
    pool = opened(a, b)
    with pytest.raises(DoesNotFitError, match="9 GiB"):
        pool.opened.result(5)


def test_closing_fails_what_waits_and_kills_the_replicas() -> None:
    a = FakeReplica("a")
    pool = pool_of(a)
    future = pool.generate(None, request())
    until(lambda: a.pending)
    pool.close()
    with pytest.raises(RequestFailedError, match="closed before this request"):
        future.result(0)
    assert not a.alive and a.called("wait_ended")
    with pytest.raises(RequestFailedError, match="engine is closed"):
        pool.generate(None, request())
    pool.close()


def test_warming_asks_every_replica(opened: Open) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    pool = opened(a, b)
    pool.opened.result(5)
    assert [future.result(5) for future in pool.warm(LoraSpec(rank=4, seed=0))] == [["a"], ["b"]]


@pytest.mark.usefixtures("quick")
def test_counts_never_fall(opened: Open) -> None:
    a = FakeReplica("a")
    pool = opened(a)
    for _ in range(3):
        future = pool.generate(None, request())
        until(lambda: a.pending)
        a.answer()
        future.result(5)
    member = pool.members[0]
    assert member.sampled()["sampled_tokens"] == 12
    future = pool.generate(None, request())
    until(lambda: a.pending)
    a.lose()
    until(lambda: a.pending)
    assert member.sampled()["sampled_tokens"] == 12
    a.answer()
    future.result(5)
    assert member.sampled()["sampled_tokens"] == 16


@pytest.mark.usefixtures("quick")
def test_a_pause_of_this_process_is_no_replicas_fault(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings from before it are old when it ends, though nothing is wrong."""
    a = FakeReplica("a")
    pool = opened(a, hang_s=5.0)
    pool.opened.result(5)
    until(lambda: pool.members[0].heard)
    a.hangs = True
    until(lambda: pool.members[0].asked is not None)
    now, before = time.monotonic, pool._ticked
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now() + 60)
    until(lambda: pool._ticked > before + 59.5)
    ticked = pool._ticked
    until(lambda: pool._ticked > ticked)
    assert pool.members[0].state == "ready"
