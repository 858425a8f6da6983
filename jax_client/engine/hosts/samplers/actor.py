"""What does the process of a sampler do? It holds an ordinary engine, and answers the pool's calls.

Ray runs an object of `Sampler` in a process of its own, its methods on one event loop. Errors are returned, not raised,
so that they arrive as they are.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jax_client.engine.hosts.samplers.messages import Answer, Counts, Opened, Opening, Report, portable
from jax_client.engine.hosts.samplers.placement import share_of_cores, use_chips
from jax_client.errors import BadRequestError

if TYPE_CHECKING:
    from jax_client.engine.core.adapters import Snapshot
    from jax_client.engine.core.programs import CompileRecord
    from jax_client.engine.core.requests import GenerationRequest
    from jax_client.engine.engine import Engine
    from jax_client.values import AdapterState, LoraSpec

# How the variables begin that decide how jax computes and where it keeps what it compiled. Those of this package, such
# as JAX_CLIENT_HOSTS, are the trainer's.
PREFIXES = ("JAX_", "XLA_")
OWN_PREFIX = "JAX_CLIENT_"
# Cancelled requests that are remembered in case their call is still to come.
CANCELLED = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """The process of a sampler: its id, the name of its host, its chips by kind, and Ray's logs there."""

    pid: int
    host: str
    chips: dict[str, list[str]]
    logs: str


class Sampler:
    """One engine that only samples.

    Args:
        environment: the variables of the trainer that begin with `PREFIXES`, but not with `OWN_PREFIX`.
        index, count: which of the samplers of this host it is, for its share of the cores; 0 and 1 alone.
    """

    def __init__(self, environment: Mapping[str, str], index: int, count: int) -> None:
        for name in [name for name in os.environ if name.startswith(PREFIXES)]:
            del os.environ[name]
        os.environ.update(environment)
        if count > 1:
            _pin(share_of_cores(os.sched_getaffinity(0), index, count))
        self._engine: Engine | None = None
        self._versions: dict[int, Snapshot] = {}
        self._running: dict[int, asyncio.Task[Answer]] = {}
        self._cancelled = deque[int](maxlen=CANCELLED)  # that were not running: a call may overtake another

    async def hello(self) -> Process:
        """Return what this process is, before it takes any device."""
        import ray

        context = ray.get_runtime_context()
        own = {kind: list(ids) for kind, ids in context.get_accelerator_ids().items() if ids}
        return Process(pid=os.getpid(), host=socket.gethostname(), chips=own, logs=_logs())

    async def open(self, opening: Opening) -> Opened | BaseException:
        """Load the weights and open the engine; return what it is, or the error."""
        try:
            self._engine = await asyncio.to_thread(_open, opening, (await self.hello()).chips.get("TPU", []))
        except Exception as error:
            return portable(error)
        from jax_client.engine.sample.sized import sizes_on
        from jax_client.sharding import ways_of

        engine, process = self._engine, await self.hello()
        device = engine.mesh.devices.flat[0]
        return Opened(
            host=process.host,
            pid=process.pid,
            logs=process.logs,
            device=f"{engine.mesh.size} x {device.device_kind}",
            cores=len(os.sched_getaffinity(0)),
            slots=sizes_on(device.platform).rows[-1] * ways_of(engine.mesh),
            counts=self._counts(),
        )

    async def bind(self, version: int, state: AdapterState) -> BaseException | None:
        """Put an adapter on the devices; return the error if that fails."""
        engine = self._opened()
        try:
            self._versions[version] = await asyncio.wrap_future(engine.snapshot(engine.open_lane(), state))
        except Exception as error:
            return portable(error)
        return None

    async def free(self, version: int) -> None:
        """Drop an adapter."""
        self._versions.pop(version, None)

    async def generate(self, number: int, version: int, request: GenerationRequest) -> Answer:
        """Carry out a request; it may be cancelled by its number."""
        if number in self._cancelled:
            return Answer(counts=self._counts())
        task = self._running[number] = asyncio.ensure_future(self._generate(version, request))
        try:
            return await task
        except asyncio.CancelledError:
            return Answer(counts=self._counts())  # no one waits for it
        finally:
            del self._running[number]

    async def cancel(self, number: int) -> None:
        """Give up a request, if it is not answered yet."""
        if (task := self._running.get(number)) is not None:
            task.cancel()
        else:
            self._cancelled.append(number)

    async def warm(self, spec: LoraSpec) -> list[CompileRecord] | BaseException:
        """Compile what sampling from such an adapter will need; return what was new, or the error."""
        engine = self._opened()
        before = len(engine.monitor.compiled())
        try:
            await asyncio.wrap_future(engine.submit(engine.open_lane(), engine.sampler.warm(spec)))
        except Exception as error:
            return portable(error)
        return [record for record in engine.monitor.compiled(before) if record.cause == "warmup"]

    async def ping(self) -> Report:
        """Return how it does; before the engine is open, that it lives."""
        if (engine := self._engine) is None:
            return Report(counts={}, memory_bytes={}, compiling=[])
        usage = engine.monitor.usage()
        compiling = engine.monitor.health()["compiling"]
        return Report(counts=usage["sampling"], memory_bytes=usage["memory_bytes"], compiling=compiling)

    async def _generate(self, version: int, request: GenerationRequest) -> Answer:
        try:
            snapshot = self._versions[version] if version else None
            result = await asyncio.wrap_future(self._opened().generate(snapshot, request))
        except Exception as error:
            return Answer(error=portable(error), counts=self._counts())
        return Answer(result=result, counts=self._counts())

    def _opened(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the sampler's engine is not open")
        return self._engine

    def _counts(self) -> Counts:
        return self._opened().sampler.describe()


def _open(opening: Opening, tpus: list[str]) -> Engine:
    if tpus:
        use_chips("TPU", tpus)  # Ray's own variables do not say that this host is alone
    # Imported here: the variables and the cores have to be set before jax is imported.
    import jax

    from jax_client.engine.engine import Engine
    from jax_client.weights.read.identity import fingerprint
    from jax_client.weights.read.source import here

    source, config = here(opening.source), opening.config
    if (found := fingerprint(source)) != opening.fingerprint:
        raise BadRequestError(
            f"{source.path} on host {socket.gethostname()} has other weights than the trainer's (fingerprint "
            f"{found[:12]}, not {opening.fingerprint[:12]}). Put the same files there, or on a disk that all hosts see."
        )
    if config.mesh != "auto" and math.prod(config.mesh.values()) != len(jax.devices()):  # for the trainer's chips
        config = replace(config, mesh="auto")
    return Engine(source, config)


def _pin(cores: set[int]) -> None:
    """Run all threads of this process, and so those that they start, on these cores."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # it has ended
            continue


def _logs() -> str:
    """Return the directory of Ray's logs of this process."""
    from ray._private import worker

    node = getattr(worker.global_worker, "node", None)
    return "" if node is None else str(node.get_logs_dir_path())
