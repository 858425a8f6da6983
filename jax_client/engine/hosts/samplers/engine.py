"""How do samplers stand in for the sampler of an engine? The trainer does all else; `generate` goes to the replicas."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from jax_client.config import EngineConfig
from jax_client.engine import protocol
from jax_client.engine.hosts import ray_cluster
from jax_client.engine.hosts.samplers import cluster
from jax_client.engine.hosts.samplers.actor import OWN_PREFIX, PREFIXES
from jax_client.engine.hosts.samplers.messages import Opening
from jax_client.engine.hosts.samplers.monitor import SamplersMonitor
from jax_client.engine.hosts.samplers.placement import Place, hosts_for_samplers, keep_other_chips
from jax_client.engine.hosts.samplers.pool import SamplerPool
from jax_client.engine.hosts.samplers.ray_replica import RayReplica
from jax_client.engine.hosts.start import computing_hosts
from jax_client.errors import RequestFailedError

if TYPE_CHECKING:
    import numpy as np

    from jax_client.engine.core.adapters import Adapter, Snapshot, Version
    from jax_client.engine.core.programs import CompileRecord
    from jax_client.engine.core.requests import (
        AdamSettings,
        CustomLoss,
        GenerationRequest,
        GenerationResult,
        LossSpec,
        TrainResult,
    )
    from jax_client.engine.core.turns import Lane
    from jax_client.models.config import ModelConfig
    from jax_client.values import AdapterState, LoraSpec, TrainExample
    from jax_client.weights.read.source import ModelSource

# In which a process of a sampler has to run, before its engine opens.
PROCESS_S = 300.0


def open_with_samplers(
    source: ModelSource, fingerprint: str, config: EngineConfig, open_trainer: Callable[[], protocol.Engine]
) -> EngineWithSamplers:
    """Open the trainer, and beside it `config.samplers` engines that sample.

    Args:
        source: the base model.
        fingerprint: of its weights; a host with others is refused.
        config: of the trainer.
        open_trainer: `f() -> engine`; called once the samplers have their chips.

    Raises:
        BadRequestError: the samplers do not fit, or a host has other weights.
        RequestFailedError: one did not start.
    """
    ray = cluster.join()
    replicas: list[RayReplica] = []
    trainer: protocol.Engine | None = None
    try:
        places = _places(ray_cluster.hosts(ray), config)
        environment = sampler_environment()
        replicas = [RayReplica(ray, place, environment) for place in places]
        _leave_chips(places, replicas)
        trainer = open_trainer()
        settings = replace(
            config, dtype=trainer.dtype.name, samplers=0, hosts=None, state_dir=None, record_metrics=False
        )
        opening = Opening(source=source, fingerprint=fingerprint, config=settings)
        pool = SamplerPool(replicas, opening, ray.put, trainer.generate)
    except BaseException:
        for replica in replicas:
            replica.kill()
        if trainer is not None:
            trainer.close()
        cluster.leave()
        raise
    engine = EngineWithSamplers(trainer, pool, cluster.leave)
    try:
        pool.opened.result()
    except BaseException:
        engine.close()
        raise
    return engine


def _places(hosts: list[ray_cluster.Host], config: EngineConfig) -> list[Place]:
    here = next(host for host in hosts if host.here)
    on_cpu = _platforms().startswith("cpu") or not (here.gpus or here.tpus)
    excluded = {host.node for host in computing_hosts(hosts, config.samplers)} if config.on_several_hosts else set()
    return hosts_for_samplers(hosts, config.samplers, excluded=excluded, on_cpu=on_cpu)


def _platforms() -> str:
    import jax

    return getattr(jax.config, "jax_platforms", None) or ""


def sampler_environment() -> dict[str, str]:
    """Return the variables that a sampler's process has as this one."""
    named = [name for name in os.environ if name.startswith(PREFIXES) and not name.startswith(OWN_PREFIX)]
    environment = {name: os.environ[name] for name in named}
    if platforms := _platforms():  # a program may set it by other means
        environment["JAX_PLATFORMS"] = platforms
    return environment


def _leave_chips(places: list[Place], replicas: list[RayReplica]) -> None:
    """Have this process use the chips of its host that no sampler has; does nothing where none has any."""
    here = [(place, replica) for place, replica in zip(places, replicas, strict=True) if place.host.here]
    if not here or not (here[0][0].gpus or here[0][0].tpus):
        return
    kind, host = ("GPU" if here[0][0].gpus else "TPU"), here[0][0].host
    taken: set[str] = set()
    for _, replica in here:
        try:
            taken |= set(replica.hello.result(PROCESS_S).chips.get(kind, []))
        except Exception as error:
            raise RequestFailedError(
                f"a sampler got no chips of this host within {PROCESS_S:.0f} s ({type(error).__name__}: {error}). "
                "Look at 'ray status' for who has them, and at Ray's logs."
            ) from None
    keep_other_chips(kind, host.gpus or host.tpus, taken)


class EngineWithSamplers:
    """Implements `protocol.Engine`: everything is the trainer's, but for what samples.

    Args:
        trainer: the engine of this process.
        pool: the samplers.
        leave: `f()` is called once all is closed.
    """

    def __init__(self, trainer: protocol.Engine, pool: SamplerPool, leave: Callable[[], None]) -> None:
        self._trainer = trainer
        self._pool = pool
        self._leave = leave
        self.monitor = SamplersMonitor(trainer=trainer.monitor, pool=pool)

    @property
    def source(self) -> ModelSource:
        """Where the model's files are."""
        return self._trainer.source

    @property
    def model(self) -> ModelConfig:
        """The model's sizes."""
        return self._trainer.model

    @property
    def dtype(self) -> np.dtype:
        """The type of weights and matmul operands, here and in every sampler."""
        return self._trainer.dtype

    def open_lane(self, owner: str = "") -> Lane:
        """Return a queue of the trainer's for one client."""
        return self._trainer.open_lane(owner)

    def open_adapter(self, lane: Lane, start: LoraSpec | AdapterState) -> Future[Adapter]:
        """Make an adapter of the trainer's."""
        return self._trainer.open_adapter(lane, start)

    def restore(self, lane: Lane, adapter: Adapter, state: AdapterState) -> Future[Version]:
        """Replace the adapter's weights and optimizer by a saved state."""
        return self._trainer.restore(lane, adapter, state)

    def release(self, adapter: Adapter) -> None:
        """Forget an adapter."""
        self._trainer.release(adapter)

    def score_batch(
        self, lane: Lane, adapter: Adapter | None, examples: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        """Return the trainer's logprobs and loss."""
        return self._trainer.score_batch(lane, adapter, examples, loss)

    def train_batch(
        self, lane: Lane, adapter: Adapter, examples: list[TrainExample], loss: LossSpec | CustomLoss
    ) -> Future[TrainResult]:
        """Add the gradient of the summed loss to the adapter's accumulated gradient."""
        return self._trainer.train_batch(lane, adapter, examples, loss)

    def optim_step(self, lane: Lane, adapter: Adapter, settings: AdamSettings) -> Future[dict[str, float]]:
        """Apply one AdamW step."""
        return self._trainer.optim_step(lane, adapter, settings)

    def snapshot(
        self, lane: Lane | None, source: Adapter | AdapterState, *, optimizer: bool = False
    ) -> Future[Snapshot]:
        """Return weights to sample from or to save. A sampler gets them at the first request that names them."""
        return self._trainer.snapshot(lane, source, optimizer=optimizer)

    def generate(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Have a sampler carry out a request. Cancelling the future frees the request's rows there."""
        return self._pool.generate(snapshot, request)

    def logits(
        self, lane: Lane, tokens_T: np.ndarray, state: AdapterState | None, model: ModelSource | None = None
    ) -> Future[np.ndarray]:
        """Score a short text over the whole vocabulary, with the trainer."""
        return self._trainer.logits(lane, tokens_T, state, model)

    def warmup(
        self, spec: LoraSpec, lengths: list[int], targets_per_position: int, *, sampling: bool = False
    ) -> Future[list[CompileRecord]]:
        """Compile what training needs here, and what sampling needs in every sampler; return what was new."""
        here = self._trainer.warmup(spec, lengths, targets_per_position)
        return _together([here, *(self._pool.warm(spec) if sampling else [])])

    def close(self) -> None:
        """Stop the trainer and the samplers; requests that have not finished fail."""
        self._pool.close()
        self._trainer.close()
        leave, self._leave = self._leave, lambda: None
        leave()


def _together(futures: list[Future[list[CompileRecord]]]) -> Future[list[CompileRecord]]:
    """Return the future of all lists in one; it fails with the first that fails."""
    whole: Future[list[CompileRecord]] = Future()
    left = iter(futures)
    records: list[CompileRecord] = []

    def next_one(done: Future[list[CompileRecord]] | None = None) -> None:
        if done is not None:
            if (error := done.exception()) is not None:
                whole.set_exception(error)
                return
            records.extend(done.result())
        if (future := next(left, None)) is None:
            whole.set_result(records)
        else:
            future.add_done_callback(next_one)

    next_one()
    return whole
