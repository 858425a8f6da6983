"""How do the other hosts launch what this one launches? It tells them each launch, by number, in its own order.

This process runs the user's program and decides everything; the others follow. A launch is told and then done here,
under one lock, so that all devices see the same order. Nothing is sent back but that a host has followed so far: what
the program reads is on this host's devices too.

A host that dies, or is silent for `SILENCE_S`, is lost, and with it the engines on this mesh: XLA cannot continue
without its devices. What this host has whole is then copied from its devices and saved, all requests fail, and the
process ends with the exit code `LOST`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import NoReturn, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

from jax_client import process
from jax_client.engine.devices.channel import Channel, Follower
from jax_client.engine.devices.device_errors import is_out_of_memory
from jax_client.engine.devices.local import gathered, local_zeros
from jax_client.engine.devices.specs import described, from_parts, parts_by_process, spec_of
from jax_client.engine.devices.verbs import (
    Call,
    Close,
    Compile,
    Done,
    Free,
    Gather,
    LaunchLog,
    Load,
    Programs,
    Put,
    Verb,
    Zeros,
)
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.threads import start_thread

logger = logging.getLogger(__name__)
R = TypeVar("R")
# Batches of verbs that a host may be behind.
MAX_BEHIND = 64
SILENCE_S = 20.0
PING_S = 5.0
SAVE_S = 25.0  # most that a call waits for what is saved after a loss
# Between the errors of the requests and the end of the process: what the user's program does with them.
GRACE_S = 10.0
LOST = os.EX_TEMPFAIL  # the program can be started again
LEAVE_S = 10.0


class Listener(Protocol):
    """Asked to be told when a host is lost."""

    def hosts_lost(self, error: RequestFailedError) -> None:
        """Fail all requests with this error, and do no more work."""
        ...


class Leader:
    """Tells other hosts what this one launches. Thread-safe.

    Args:
        channels: to the other hosts.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._followers = [
            Follower(each, number, free=each.hello.free) for number, each in enumerate(channels, start=1)
        ]
        # Held while something is told and done here, which may block for ever once another host's part is missing. What
        # is known of the hosts has a lock of its own, for moments.
        self._order = threading.RLock()
        self._turn = threading.Condition(threading.RLock())
        self._buffer: list[Callable[[Follower], Verb]] = []
        self._engines, self._launches = itertools.count(1), itertools.count(1)
        self._next = 1  # number of an array
        self._log = LaunchLog()
        self._arrays: dict[int, tuple[weakref.ref[jax.Array], int]] = {}  # by Python's id of the array
        self._freed: deque[int] = deque()  # a destructor appends, with any lock held
        self._failed: dict[int, set[str]] = {}  # launches that ran out of memory: on which hosts
        self._done = 0  # the newest launch for which there was memory here
        self._lost: RequestFailedError | None = None
        self._saved = threading.Event()  # after a loss, so that the error of every call can say where
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._closed = False
        self._watch = start_thread("jax_client-hosts", self._look_after)

    def free_bytes(self) -> int:
        """Return the bytes that each device of the other hosts may still allocate, as they last said."""
        return min(follower.free for follower in self._followers)

    def health(self) -> list[dict[str, object]]:
        """Return the other hosts and how they do; waits for nothing."""
        state = "ready" if self._lost is None else "lost"
        return [follower.described(state) for follower in self._followers]

    @property
    def launches(self) -> str:
        """What has been launched so far, as one number."""
        return self._log.digest

    def call_when_lost(self, listener: Listener) -> None:
        """Have `listener.hosts_lost(error)` called, on another thread, if a host is lost; refers to it weakly."""
        self._listeners.add(listener)

    def load(self, load: Callable[[int], Load], count: int, read: Callable[[], R]) -> R:
        """Have all hosts read their parts of a model's weights; return the tree of arrays.

        Args:
            load: `f(first number) -> Load`.
            count: of the arrays.
            read: `f() -> arrays`, reads those of this host.

        Raises:
            BadRequestError: a host cannot read them, or has others.
        """
        with self._order:
            self._check()
            first = self._take_numbers(count)
        answers = [(each, each.channel.load(load(first))) for each in self._followers]
        try:
            try:
                arrays = read()
            finally:
                self._wait_for([answer for _, answer in answers], "load the weights")
            for follower, answer in answers:
                if why := answer.result():
                    raise BadRequestError(f"host {follower.channel.name}: {why}")
        except BaseException:
            self._freed.extend(range(first, first + count))
            raise
        with self._order:
            self._note(jax.tree.leaves(arrays), first)
        return arrays

    def open_engine(self) -> int:
        """Return the number of a new engine."""
        return next(self._engines)

    def make_programs(self, engine: int, attention: str, paged: str) -> None:
        """Have the other hosts make an engine's programs."""
        self._say(Programs(engine, attention, paged))

    def close_engine(self, engine: int) -> None:
        """Have the other hosts forget an engine."""
        with self._order:
            if self._lost is None and not self._closed:
                self._say(Close(engine))
                self._flush()

    def put(self, array: np.ndarray, place: Sharding) -> jax.Array:
        """Put a host array at a place that spans the hosts."""
        spec, parts = described(array.shape, array.dtype, place), parts_by_process(array, place)
        mine = from_parts(spec, parts(jax.process_index()))
        with self._order:
            self._check()
            number = self._note([mine], self._take_numbers(1))
            self._buffer.append(lambda follower: Put(number, spec, parts(follower.channel.hello.process)))
            if len(self._buffer) >= MAX_BEHIND:
                self._flush()
        return mine

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype, place: Sharding) -> jax.Array:
        """Return zeros at a place that spans the hosts."""
        mine = local_zeros(shape, dtype, place)
        with self._order:
            self._say(Zeros(self._note([mine], self._take_numbers(1)), described(shape, dtype, place)))
        return mine

    def call(
        self,
        engine: int,
        program: str,
        run: Callable[..., R],
        arguments: tuple[object, ...],
        static: Mapping[str, object],
    ) -> R:
        """Run a compiled program on all hosts; return what it returns here."""

        def verb(number: int, first: int) -> Call:
            return Call(number, engine, program, static, jax.tree.map(self._number_of, arguments), first)

        return self._launch(verb, lambda: run(*arguments))

    def gather(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """Return arrays that every device has whole."""
        if self._lost is not None:  # asked by the save that `_check` waits for
            raise self._lost

        def verb(number: int, first: int) -> Gather:
            return Gather(number, tuple(map(self._number_of, arrays)), first)

        return self._launch(verb, lambda: gathered(arrays))

    def compile(self, engine: int, program: str, arguments: object, static: Mapping[str, object]) -> Callable[[], None]:
        """Begin to compile a program on the other hosts.

        Returns:
            A function that waits for them, and raises if one of them cannot compile it: no host may call a program that
            another lacks, as it would wait for that one's part for ever.
        """
        with self._order:
            self._check()
            self._flush()  # the engine's programs may be among it
            compile_ = Compile(engine, program, dict(static), jax.tree.map(spec_of, arguments))
            answers = [(each, each.channel.compile(compile_)) for each in self._followers]

        def followed() -> None:
            self._wait_for([answer for _, answer in answers], f"compile {program}")
            for follower, answer in answers:
                if why := answer.result():
                    raise RequestFailedError(f"host {follower.channel.name} cannot compile {program}: {why}")

        return followed

    def suspect(self, error: BaseException) -> None:
        """Take an error of this host's devices for the loss of another host: a collective lacks its part."""
        self._lose(f"the devices of the {len(self._followers) + 1} hosts no longer compute together ({error})")

    def refuse(self) -> None:
        """Launch nothing any more; where a host is lost, end the process, as all is saved."""
        if self._lost is not None:
            self._end_now()
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def close(self) -> None:
        """End the processes of the other hosts, and leave jax's runtime; nothing is computed afterwards."""
        self.refuse()
        if self._lost is None:
            wait([follower.channel.leave() for follower in self._followers], LEAVE_S)
            jax.distributed.shutdown()
        for follower in self._followers:
            follower.channel.stop()

    def _launch(self, verb: Callable[[int, int], Call | Gather], run: Callable[[], R]) -> R:
        with self._order:
            self._make_room()
            number, first = next(self._launches), self._next
            told = verb(number, first)
            self._log.add(told)
            self._say(told)
            self._flush(launch=True)
            try:
                out = run()
            except Exception as error:
                if is_out_of_memory(error):
                    self._expect_failure(number)
                else:
                    self._lose(f"{error} (launch {number}) was raised on this host, while the others launched it")
                raise
            leaves = jax.tree.leaves(out)
            self._note(leaves, self._take_numbers(len(leaves)))
            with self._turn:
                self._done = number
                if number in self._failed:
                    self._lose_for_memory(number)
            return out

    def _expect_failure(self, number: int) -> None:
        """Wait until every host has run out of memory at a launch, as this one; a host that has not is lost."""
        self._wait_for([done for each in self._followers for _, done in each.behind], f"follow to launch {number}")
        with self._turn:
            failed = self._failed.pop(number, set())
        for follower in self._followers:
            if follower.channel.name not in failed:
                self._lose(f"host {follower.channel.name} had the memory for launch {number}, and this one had not")

    def _lose_for_memory(self, number: int) -> None:
        names = ", ".join(sorted(self._failed[number]))
        self._lose(f"host {names} ran out of memory at launch {number}, for which this one had enough")

    def _say(self, verb: Verb) -> None:
        with self._order:
            self._check()
            self._buffer.append(lambda _: verb)

    def _make_room(self) -> None:
        """Wait while a host is too far behind."""
        with self._turn:
            while any(len(each.behind) >= MAX_BEHIND for each in self._followers) and self._lost is None:
                self._turn.wait(1.0)
            self._check()

    def _flush(self, *, launch: bool = False) -> None:
        """Send what has gathered, of which the last may be a launch. In order."""
        freed = []
        while self._freed:
            freed.append(self._freed.popleft())
        buffer, self._buffer = self._buffer, []
        if freed:
            # Before a launch, so that memory is the same everywhere.
            buffer.insert(len(buffer) - launch, lambda _: Free(tuple(freed)))
        if not buffer:
            return
        for follower in self._followers:
            done = follower.channel.send(tuple(verb(follower) for verb in buffer))
            with self._turn:
                follower.behind.append((self._log.digest, done))
            done.add_done_callback(lambda done, follower=follower: self._followed(follower, done))

    def _followed(self, follower: Follower, done: Future[Done]) -> None:
        error = None if done.cancelled() else done.exception()
        with self._turn:
            if error is not None:
                self._lose(f"host {follower.channel.name} has failed: {error}")
                return
            answer = done.result()
            while follower.behind and follower.behind[0][1].done():
                expected, earliest = follower.behind.popleft()
                if earliest.exception() is None and (theirs := earliest.result().log) != expected:
                    self._lose(f"host {follower.channel.name} has launched something else ({theirs}, not {expected})")
                    return
                follower.log = expected
            follower.free, follower.heard = answer.free, time.monotonic()
            for number in answer.failed:
                self._failed.setdefault(number, set()).add(follower.channel.name)
                if number <= self._done:
                    self._lose_for_memory(number)
            self._turn.notify_all()

    def _take_numbers(self, count: int) -> int:
        """Return the first of some numbers that no array has. In order."""
        first, self._next = self._next, self._next + count
        return first

    def _note(self, leaves: Sequence[jax.Array], first: int) -> int:
        """Give arrays their numbers, from `first` on; return that. In order."""
        for number, array in enumerate(leaves, first):
            key = id(array)
            if key in self._arrays:  # a program returned an argument
                self._freed.append(number)
                continue
            self._arrays[key] = weakref.ref(array, lambda _, key=key: self._drop(key)), number
        return first

    def _drop(self, key: int) -> None:
        self._freed.append(self._arrays.pop(key)[1])

    def _number_of(self, array: jax.Array) -> int:
        if (entry := self._arrays.get(id(array))) is None:
            raise RuntimeError(f"an array of shape {array.shape} is on this host alone; this is a bug.")
        return entry[1]

    def _check(self) -> None:
        if self._lost is not None:
            self._saved.wait(SAVE_S)
            raise RequestFailedError(self._lost.message, category=self._lost.category)
        if self._closed:
            raise RequestFailedError("the other hosts have been released; make a new ServiceClient.", category="user")

    def _wait_for(self, answers: Sequence[Future[Done] | Future[str]], deed: str) -> None:
        """Wait for answers; raise if a host is lost meanwhile."""
        for answer in answers:
            answer.add_done_callback(lambda _: self._wake())
        with self._turn:
            while not all(answer.done() for answer in answers):
                self._check()
                self._turn.wait(1.0)
            for answer in answers:
                if (error := answer.exception()) is not None:
                    self._lose(f"a host could not {deed}: {error}")
            self._check()

    def _wake(self) -> None:
        with self._turn:
            self._turn.notify_all()

    def _look_after(self) -> None:
        while True:
            with self._turn:
                self._turn.wait(1.0)
                if self._closed or self._lost is not None:
                    return
                self._ping()
                for follower in self._followers:
                    silent = time.monotonic() - follower.heard
                    if silent > SILENCE_S:
                        self._lose(f"host {follower.channel.name} has not answered for {silent:.0f} s")

    def _ping(self) -> None:
        """Ask the hosts how they do, those that have answered the last time."""
        for follower in self._followers:
            waiting = follower.pinged is not None and not follower.pinged.done()
            if waiting or (follower.pinged is not None and time.monotonic() < follower.heard + PING_S):
                continue
            follower.pinged = follower.channel.ping()
            follower.pinged.add_done_callback(lambda ping, follower=follower: self._heard(follower, ping))

    def _heard(self, follower: Follower, ping: Future[int]) -> None:
        error = None if ping.cancelled() else ping.exception()
        with self._turn:
            if error is not None:
                self._lose(f"host {follower.channel.name} is gone: {error}")
            else:
                follower.free, follower.heard = ping.result(), time.monotonic()

    def _lose(self, why: str) -> None:
        """Take note that a host is lost, once, and tell the engines."""
        with self._turn:
            if self._lost is not None or self._closed:
                return
            self._lost = RequestFailedError(f"{why}. {self._consequence}", category="server")
            self._turn.notify_all()
        logger.error("%s", self._lost.message)
        start_thread("jax_client-hosts-lost", partial(self._end, self._lost))

    @property
    def _consequence(self) -> str:
        return f"The engine computes on {len(self._followers) + 1} hosts and cannot continue with fewer."

    def _end(self, lost: RequestFailedError) -> None:
        """Save what this host has, fail all requests, and end the process soon."""
        saved = process.save_after_loss()
        told = " ".join([lost.message, "Start the program again, and continue from the newest checkpoint.", *saved])
        self._lost = error = RequestFailedError(told, category="server")
        self._saved.set()
        for listener in list(self._listeners):
            listener.hosts_lost(error)
        print(f"jax_client: {told}", file=sys.stderr)
        time.sleep(GRACE_S)
        self._end_now()

    def _end_now(self) -> NoReturn:
        for follower in self._followers:  # one that hangs would stay
            with contextlib.suppress(Exception):
                follower.channel.stop()
        process.end_now(LOST)
