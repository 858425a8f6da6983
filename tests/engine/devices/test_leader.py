"""What does a leading host tell the others, in which order, and when is one of them lost?"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client import process
from jax_client.engine.devices import leader as leaders
from jax_client.engine.devices.leader import Leader
from jax_client.engine.devices.verbs import Call, Done, Free, Hello, LaunchLog, Verb
from jax_client.errors import RequestFailedError


class FakeChannel:
    """A host that answers when it is told to; it runs out of memory at the launches in `too_large`."""

    name = "other"
    hello = Hello({}, 1, 1, "cpu", 1, 1000)

    def __init__(self) -> None:
        self.sent: list[Verb] = []
        self.log = LaunchLog()
        self.too_large: set[int] = set()
        self.prompt = True
        self.pings: list[Future[int]] = []
        self._unanswered: list[tuple[Future[Done], Done]] = []

    def send(self, verbs: tuple[Verb, ...]) -> Future[Done]:
        self.sent += verbs
        failed = {}
        for verb in verbs:
            if isinstance(verb, Call):
                self.log.add(verb)
                if verb.number in self.too_large:
                    failed[verb.number] = "RESOURCE_EXHAUSTED"
        future: Future[Done] = Future()
        self._unanswered.append((future, Done(500, self.log.digest, failed)))
        if self.prompt:
            self.answer()
        return future

    def answer(self) -> None:
        unanswered, self._unanswered = self._unanswered, []
        for future, done in unanswered:
            future.set_result(done)

    def ping(self) -> Future[int]:
        self.pings.append(Future())
        if self.prompt:
            self.pings[-1].set_result(900)
        return self.pings[-1]

    def load(self, load: Any) -> Future[str]:
        raise NotImplementedError

    compile = load

    def leave(self) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def stop(self) -> None:
        self.sent.clear()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(process, "end_now", codes.append)
    monkeypatch.setattr(process, "save_after_loss", lambda: ["Run r: tinker://r/weights/w."])
    monkeypatch.setattr(leaders, "GRACE_S", 0.0)
    return codes


@pytest.fixture
def channel() -> FakeChannel:
    return FakeChannel()


@pytest.fixture
def leader(channel: FakeChannel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leader]:
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    made = Leader([channel])
    yield made
    if made.health()[0]["state"] == "ready":
        made.close()


def _add(leader: Leader, *arrays: jax.Array, run: Callable[..., Any] = jnp.add) -> Any:
    return leader.call(1, "add", run, arrays, {})


def _known(leader: Leader, value: float) -> jax.Array:
    array = jnp.full(2, value)
    with leader._order:
        leader._note([array], leader._take_numbers(1))
    return array


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def _too_large(*_: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")


def test_a_call_names_its_arrays_and_results_by_number(leader: Leader, channel: FakeChannel) -> None:
    a, b = _known(leader, 1), _known(leader, 2)
    c = _add(leader, a, b)
    d = _add(leader, c, c)
    np.testing.assert_array_equal(d, [6, 6])
    first, second = channel.sent
    assert isinstance(first, Call)
    assert isinstance(second, Call)
    assert (first.number, second.number) == (1, 2)
    assert second.arguments == (first.first, first.first)
    assert leader.launches == channel.log.digest
    assert leader.free_bytes() == 500


def test_an_array_that_is_gone_is_freed_before_the_next_launch(leader: Leader, channel: FakeChannel) -> None:
    a, b = _known(leader, 1), _known(leader, 2)
    c = _add(leader, a, b)
    number = channel.sent[-1].first  # type: ignore[union-attr]
    del c
    gc.collect()
    _add(leader, a, b)
    freed, call = channel.sent[-2:]
    assert freed == Free((number,))
    assert isinstance(call, Call)


def test_an_argument_that_is_returned_keeps_its_number(leader: Leader, channel: FakeChannel) -> None:
    a = _known(leader, 1)
    assert leader.call(1, "same", lambda x: x, (a,), {}) is a
    b = _add(leader, a, a)
    freed, call = channel.sent[-2:]
    assert isinstance(freed, Free)
    assert isinstance(call, Call)
    assert call.arguments[0] not in freed.arrays
    assert b is not None


def test_an_array_of_this_host_alone_is_a_bug(leader: Leader, channel: FakeChannel) -> None:
    with pytest.raises(RuntimeError, match="this host alone"):
        _add(leader, jnp.ones(2), jnp.ones(2))
    assert channel.sent == []


def test_memory_that_lacks_on_every_host_loses_none(leader: Leader, channel: FakeChannel, ended: list[int]) -> None:
    a, channel.too_large = _known(leader, 1), {1}
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        _add(leader, a, a, run=_too_large)
    np.testing.assert_array_equal(_add(leader, a, a), [2, 2])
    assert not ended


def test_memory_that_lacks_here_alone_loses_the_other(leader: Leader, channel: FakeChannel, ended: list[int]) -> None:
    a = _known(leader, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        _add(leader, a, a, run=_too_large)
    _until(lambda: ended)
    with pytest.raises(RequestFailedError, match=r"had the memory for launch 1.*tinker://r/weights/w") as raised:
        _add(leader, a, a)
    assert raised.value.category == "server"


@pytest.mark.parametrize("prompt", [True, False])
def test_memory_that_lacks_there_alone_loses_the_other(
    prompt: bool, leader: Leader, channel: FakeChannel, ended: list[int]
) -> None:
    a, channel.too_large, channel.prompt = _known(leader, 1), {1}, prompt
    _add(leader, a, a)
    channel.prompt = True
    channel.answer()
    _until(lambda: ended)
    with pytest.raises(RequestFailedError, match="host other ran out of memory at launch 1"):
        _add(leader, a, a)


def test_another_launch_loses_the_host(leader: Leader, channel: FakeChannel, ended: list[int]) -> None:
    a = _known(leader, 1)
    channel.log.digest = "other"
    _add(leader, a, a)
    _until(lambda: ended)
    with pytest.raises(RequestFailedError, match="launched something else"):
        _add(leader, a, a)
    assert leader.health()[0]["state"] == "lost"


def test_a_host_that_is_far_behind_is_waited_for(
    leader: Leader, channel: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaders, "MAX_BEHIND", 2)
    a, channel.prompt = _known(leader, 1), False
    _add(leader, a, a)
    _add(leader, a, a)
    third: Future[Any] = Future()
    leaders.start_thread("third", lambda: third.set_result(_add(leader, a, a)))
    time.sleep(0.2)
    assert not third.done()
    assert sum(isinstance(verb, Call) for verb in channel.sent) == 2
    channel.prompt = True
    channel.answer()
    np.testing.assert_array_equal(third.result(5), [2, 2])


def test_a_silent_host_is_lost(
    channel: FakeChannel, ended: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leaders, "SILENCE_S", 0.5)
    channel.prompt = False
    leader = Leader([channel])
    told: list[RequestFailedError] = []

    class Engine:
        def hosts_lost(self, error: RequestFailedError) -> None:
            told.append(error)

    engine = Engine()
    leader.call_when_lost(engine)
    _until(lambda: ended)
    assert ended == [75]
    assert "has not answered" in told[0].message
    assert "tinker://r/weights/w" in told[0].message
    assert "jax_client: host other has not answered" in capsys.readouterr().err
