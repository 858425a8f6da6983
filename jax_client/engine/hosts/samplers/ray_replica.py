"""How does the pool reach a sampler in another process? As a Ray actor, whose answers are futures.

Ray's own threads complete the futures. They do nothing else here: a callback that waited for Ray would never end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from jax_client.engine.hosts.ray_cluster import on_host
from jax_client.engine.hosts.samplers.actor import Process, Sampler
from jax_client.engine.hosts.samplers.messages import Answer, Opened, Opening, ReplicaLostError, Report, portable
from jax_client.engine.hosts.samplers.placement import Place
from jax_client.errors import BadRequestError, RequestFailedError, first_line

if TYPE_CHECKING:
    from jax_client.engine.core.programs import CompileRecord
    from jax_client.engine.core.requests import GenerationRequest
    from jax_client.values import LoraSpec

T = TypeVar("T")
# Calls that one actor carries out at once: each waits on its event loop, where thousands cost nothing.
CONCURRENT = 100_000
# For the kernel to end a process.
SIGNAL_S = 5.0


class _Ref(Protocol):
    def future(self) -> Future[object]: ...


class RayReplica:
    """Implements `messages.Replica` over a Ray actor.

    Args:
        ray: the module, which has joined a cluster.
        place: where the actor runs.
        environment: variables that its process has before jax starts.

    Attributes:
        hello: what the newest process is, before it has opened its engine.
    """

    def __init__(self, ray: ModuleType, place: Place, environment: Mapping[str, str]) -> None:
        self._ray = ray
        self._place = place
        self._environment = dict(environment)
        self._processes: list[int] = []  # file descriptors of those of this host that are not known to have ended
        self._actor: object = None
        self._launch()

    @property
    def host(self) -> str:
        """The name of the host that it is on."""
        return self._place.host.name

    @property
    def here(self) -> bool:
        """Whether it is on this host."""
        return self._place.host.here

    def start(self, opening: Opening) -> Future[Opened]:
        """Have the process open its engine; launch one if the last was killed."""
        if self._actor is None:
            self._launch()
        return cast("Future[Opened]", self._call("open", opening, read=_unless_error))

    def bind(self, version: int, weights: object) -> Future[None]:
        """Put an adapter on the devices; `weights` is a reference of Ray's, whose value travels once to each host."""
        return cast("Future[None]", self._call("bind", version, weights, read=_unless_error))

    def free(self, version: int) -> None:
        """Drop an adapter."""
        self._call("free", version)

    def generate(self, number: int, version: int, request: GenerationRequest) -> Future[Answer]:
        """Carry out a request."""
        return cast("Future[Answer]", self._call("generate", number, version, request))

    def cancel(self, number: int) -> None:
        """Give up a request."""
        self._call("cancel", number)

    def warm(self, spec: LoraSpec) -> Future[list[CompileRecord]]:
        """Compile what sampling from such an adapter will need."""
        return cast("Future[list[CompileRecord]]", self._call("warm", spec, read=_unless_error))

    def ping(self) -> Future[Report]:
        """Ask how it does."""
        return cast("Future[Report]", self._call("ping"))

    def kill(self, *, hung: bool = False) -> None:
        """End the process. Ray ends none that is stopped, so that one of this host gets the signal, too."""
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(Exception):  # it, or all of Ray, is gone
                self._ray.kill(actor, no_restart=True)
        if hung:
            self._signal()

    def wait_ended(self, seconds: float) -> None:
        """Wait for the end of the killed processes of this host; those that take longer get the signal."""
        deadline, late = time.monotonic() + seconds, False
        while self._processes:
            ended = select.poll()
            ended.register(self._processes[-1], select.POLLIN)
            if ended.poll(max(0.0, deadline - time.monotonic()) * 1000) or late:
                os.close(self._processes.pop())
            else:
                self._signal()
                deadline, late = time.monotonic() + SIGNAL_S, True

    def _signal(self) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(process, signal.SIGKILL)

    def _launch(self) -> None:
        place = self._place
        options = on_host(replace(place.host, gpus=place.gpus, tpus=place.tpus))
        actor_class = self._ray.remote(Sampler).options(max_concurrency=CONCURRENT, **options)
        self._actor = actor_class.remote(self._environment, place.index, place.count)
        self.hello = cast("Future[Process]", self._call("hello"))
        if self.here:
            self.hello.add_done_callback(self._note_process)

    def _note_process(self, hello: Future[Process]) -> None:
        if hello.exception() is None:
            with contextlib.suppress(OSError):  # it has ended
                self._processes.append(os.pidfd_open(hello.result().pid))

    def _call(self, method: str, *arguments: object, read: Callable[[object], object] | None = None) -> Future[object]:
        """Return the future of a method's result; `read(result)` returns its value, or raises."""
        future: Future[object] = Future()
        if (actor := self._actor) is None:
            future.set_exception(ReplicaLostError("Its process was killed."))
            return future
        try:
            reference: _Ref = getattr(actor, method).remote(*arguments)
        except TypeError as error:
            why = f"sample: a part of this request cannot be sent to another process: {first_line(error)}."
            future.set_exception(BadRequestError(why))
            return future
        except Exception as error:
            future.set_exception(self._named(error))
            return future

        def finished(done: Future[object]) -> None:
            if (error := done.exception()) is not None:
                future.set_exception(self._named(error))
                return
            try:
                value = done.result() if read is None else read(done.result())
            except Exception as raised:
                future.set_exception(raised)
            else:
                future.set_result(value)

        reference.future().add_done_callback(finished)
        return future

    def _named(self, error: BaseException) -> BaseException:
        """Return a lost process as such, and what a method raised by name."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError):
            cause = getattr(error, "cause", error)
            return portable(cause) if isinstance(cause, Exception) else RequestFailedError(first_line(error))
        return ReplicaLostError(f"{type(error).__name__}: {first_line(error)}.")


def _unless_error(value: T | BaseException) -> T:
    if isinstance(value, BaseException):
        raise value
    return value
