"""What runs on a host that follows, as a Ray actor, and how does the leading host reach it?

Ray keeps the order of the verbs, and says at once when the actor's process is gone. This module imports no jax: the
actor's environment has to be set before that.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_client.engine.hosts.ray_cluster import Handle, Ray

if TYPE_CHECKING:
    from jax_client.engine.devices.verbs import Compile, Done, Hello, Load, Verb
    from jax_client.engine.hosts.follower import Follower

# Verbs are carried out by one thread, in order; the others must not wait for them.
GROUPS = {"verbs": 1, "compiles": 4, "pings": 1}


class FollowerActor:
    """Holds a `Follower`.

    Args:
        environment: of the process, as the leading host's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        with contextlib.suppress(ValueError):  # not the main thread
            # A spot slice is told to end as a whole: this host waits while the leading one saves.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._follower: Follower | None = None

    def join(self, coordinator: str, count: int, process: int, timeout_s: int) -> Hello:
        """Join jax's runtime of several hosts; return what this host is."""
        from jax_client.engine.hosts import joining
        from jax_client.engine.hosts.follower import Follower

        joining.join(coordinator, count, process, timeout_s)
        self._follower = Follower()
        return self._follower.hello()

    def versions(self) -> dict[str, str]:
        """Return what must be the same on all hosts, before anything is joined."""
        from jax_client.engine.hosts.joining import versions

        return versions()

    def carry_out(self, verbs: tuple[Verb, ...]) -> Done:
        """Carry out verbs in their order."""
        return self._joined.carry_out(verbs)

    def load(self, load: Load) -> str:
        """Read this host's parts of a model's weights; return "" or why that cannot be."""
        return self._joined.load(load)

    def compile(self, compile_: Compile) -> str:
        """Compile a program; return "" or why that cannot be."""
        return self._joined.compile(compile_)

    def leave(self) -> None:
        """Leave jax's runtime of several hosts."""
        import jax

        jax.distributed.shutdown()

    def ping(self) -> int:
        """Return the bytes that each device may still allocate."""
        return self._joined.free_bytes()

    @property
    def _joined(self) -> Follower:
        if self._follower is None:
            raise RuntimeError("this host has not joined; this is a bug.")
        return self._follower


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorChannel:
    """The way to an actor; implements `leader.Channel`.

    Attributes:
        ray: the module.
        actor: its handle.
        name: of its host.
        hello: what it is.
    """

    ray: Ray
    actor: Handle
    name: str
    hello: Hello

    def send(self, verbs: tuple[Verb, ...]) -> Future[Done]:
        """Have verbs carried out after those before."""
        return self.actor.carry_out.options(concurrency_group="verbs").remote(verbs).future()

    def load(self, load: Load) -> Future[str]:
        """Have weights read, beside the verbs."""
        return self.actor.load.options(concurrency_group="compiles").remote(load).future()

    def compile(self, compile_: Compile) -> Future[str]:
        """Have a program compiled, beside the verbs."""
        return self.actor.compile.options(concurrency_group="compiles").remote(compile_).future()

    def ping(self) -> Future[int]:
        """Return the bytes that each device may still allocate."""
        return self.actor.ping.options(concurrency_group="pings").remote().future()

    def leave(self) -> Future[None]:
        """Have the host leave jax's runtime."""
        return self.actor.leave.options(concurrency_group="verbs").remote().future()

    def stop(self) -> None:
        """End the host's process."""
        self.ray.kill(self.actor)
