"""Followers in processes of this machine, reached by pipes in place of Ray: for tests of what is launched, and how."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any


class PipeChannel:
    """Implements `leader.Channel`; one thread of the process reads, and carries out verbs in their order."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.process = process
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._next = 0
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def join(self, coordinator: str, count: int, number: int) -> Future[Any]:
        return self._ask("join", coordinator, count, number, 60)

    def send(self, verbs: Any) -> Future[Any]:
        return self._ask("carry_out", verbs)

    def load(self, load: Any) -> Future[Any]:
        return self._ask("load", load)

    def compile(self, compile_: Any) -> Future[Any]:
        return self._ask("compile", compile_)

    def ping(self) -> Future[Any]:
        return self._ask("ping")

    def leave(self) -> Future[Any]:
        return self._ask("leave")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._waiting[number] = future
            self._calls.put(pickle.dumps((number, method, arguments)))
        return future

    def _write(self) -> None:
        # On a thread of its own, as Ray does: a process that is stopped reads nothing, and the pipe is full soon.
        try:
            while True:
                self.process.stdin.write(self._calls.get())
                self.process.stdin.flush()
        except OSError:
            self._fail()

    def _fail(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(ConnectionError("the process is gone"))

    def _read(self) -> None:
        try:
            while True:
                number, ok, value = pickle.load(self.process.stdout)
                with self._lock:
                    future = self._waiting.pop(number)
                future.set_result(value) if ok else future.set_exception(RuntimeError(value))
        except (EOFError, OSError):
            self._fail()


def start(count: int, environment: dict[str, str]) -> list[PipeChannel]:
    """Start the processes of further hosts."""
    command = [sys.executable, os.path.abspath(__file__)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | environment}
    return [PipeChannel(f"host-{i}", subprocess.Popen(command, **pipes)) for i in range(1, count + 1)]


def lead(channels: list[PipeChannel], coordinator: str) -> None:
    """Join the processes and this one, which leads them."""
    from jax_client.engine.devices.leader import Leader
    from jax_client.engine.hosts import joining, start

    joins = [channel.join(coordinator, len(channels) + 1, i) for i, channel in enumerate(channels, start=1)]
    joining.join(coordinator, len(channels) + 1, 0, 60)
    for channel, join in zip(channels, joins, strict=True):
        channel.hello = join.result()
    start.led_by(Leader(channels))


def main() -> None:
    """Be a host that follows: read calls from stdin, write answers to stdout."""
    from concurrent.futures import ThreadPoolExecutor

    from jax_client.engine.hosts.actor import GROUPS, FollowerActor

    answers, calls = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    actor, lock = FollowerActor({}), threading.Lock()
    groups = {name: ThreadPoolExecutor(threads) for name, threads in GROUPS.items()}
    group_of = {"carry_out": "verbs", "join": "verbs", "leave": "verbs", "ping": "pings"}

    def run(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = number, True, getattr(actor, method)(*arguments)
        except BaseException as error:
            answer = number, False, f"{type(error).__name__}: {error}"
        with lock:
            pickle.dump(answer, answers)
            answers.flush()

    while True:
        try:
            number, method, arguments = pickle.load(calls)
        except EOFError:
            os._exit(0)
        groups[group_of.get(method, "compiles")].submit(run, number, method, arguments)


if __name__ == "__main__":
    main()
