"""How does a leading host reach one that follows, and what does it know of it?"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from jax_client.engine.devices.verbs import Compile, Done, Hello, Load, Verb


class Channel(Protocol):
    """The way to one host, which carries out in order what it is sent. Futures fail if the host is gone."""

    @property
    def name(self) -> str:
        """Of the host, for people."""
        ...

    @property
    def hello(self) -> Hello:
        """What the host is."""
        ...

    def send(self, verbs: tuple[Verb, ...]) -> Future[Done]:
        """Have verbs carried out after those before."""
        ...

    def load(self, load: Load) -> Future[str]:
        """Have weights read, beside the verbs; return "" or why they cannot be."""
        ...

    def compile(self, compile_: Compile) -> Future[str]:
        """Have a program compiled, beside the verbs; return "" or why it cannot be."""
        ...

    def ping(self) -> Future[int]:
        """Return the bytes that each device may still allocate; at once, whatever else the host does."""
        ...

    def leave(self) -> Future[None]:
        """Have the host leave jax's runtime."""
        ...

    def stop(self) -> None:
        """End the host's process."""
        ...


@dataclass(slots=True, eq=False)
class Follower:
    """A host that follows, and how far.

    Attributes:
        channel: to it.
        number: of the host, from 1 on: this one is 0.
        behind: what it has been sent and has not answered, with the log of launches of this host after that.
        free: bytes that each of its devices may still allocate, as it last said.
        log: of its launches, as it last said.
        heard: when it last said anything.
        pinged: the newest ping.
    """

    channel: Channel
    number: int
    behind: deque[tuple[str, Future[Done]]] = field(default_factory=deque)
    free: int = 0
    log: str = ""
    heard: float = field(default_factory=time.monotonic)
    pinged: Future[int] | None = None

    def described(self, state: str) -> dict[str, object]:
        """Return what it is and how it does, for people; waits for nothing."""
        return {
            "host": self.channel.name,
            "role": "follower",
            "number": self.number,
            "state": state,
            "pid": self.channel.hello.pid,
            "devices": self.channel.hello.devices,
            "silent_seconds": round(time.monotonic() - self.heard, 1),
            "behind": len(self.behind),
            "launches": self.log,
            "available_bytes": self.free,
        }
