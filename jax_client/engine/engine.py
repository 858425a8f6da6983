"""How does an engine carry out its operations? As tasks of its dispatcher; `protocol` says what each does.

Every operation returns a future at once; the work runs as tasks of the dispatcher. A task commits its result to the
adapter only after the device has finished it, so a failed request leaves the adapter as it was.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_client import interpreter_end, process
from jax_client.config import EngineConfig, default_compilation_cache_dir
from jax_client.engine.core import adapters, matmul_benchmark, memory
from jax_client.engine.core.accounting import Work
from jax_client.engine.core.adapters import Adapter, Snapshot, Version, Weights
from jax_client.engine.core.attention_check import choose_attention
from jax_client.engine.core.dispatch import Dispatcher
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.core.requests import (
    AdamSettings,
    CustomLoss,
    GenerationRequest,
    GenerationResult,
    LossSpec,
    TrainResult,
)
from jax_client.engine.core.turns import NO_OWNER, Elsewhere, Lane, Task
from jax_client.engine.devices.arrays import fetch, put_whole, zeros
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.engine.devices.device_errors import is_device_failure, named_error
from jax_client.engine.devices.engine_hosts import EngineHosts
from jax_client.engine.devices.local import local_device
from jax_client.engine.hosts.start import lead_other_hosts
from jax_client.engine.monitor import EngineMonitor
from jax_client.engine.precompile import Precompiler
from jax_client.engine.sample.loop import SamplingLoop
from jax_client.engine.train import step_range
from jax_client.engine.train.logits import logits_program
from jax_client.engine.train.programs import NO_ADAPTER
from jax_client.engine.train.trainer import Packed, Trainer
from jax_client.errors import RequestFailedError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, param_specs
from jax_client.process import Step
from jax_client.sharding import check_mesh_divides, make_mesh
from jax_client.threads import InTurn
from jax_client.values import AdapterState, LoraSpec, TrainExample
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import ModelSource

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_SKIPPED_IN_A_ROW = 10
# Threads that lay out calls. Each takes Python's lock from the thread that launches.
PACKERS = 2
# Of `Work.rates`, what the metrics of optim_step show of the step.
STEP_RATES = ("tokens_per_second", "padding_waste", "host_share", "matmul_fraction", "limit_fraction")
STEP_SUMS = {
    "tokens": "input_tokens",
    "queue_seconds": "queue_seconds",
    "host_seconds": "host_seconds",
    "compile_seconds": "compile_seconds",
    "device_seconds": "device_seconds",
}


class Engine:
    """Implements `protocol.Engine`: one base model on one mesh, its compiled programs, the thread that launches them.

    Args:
        source: where the model's files are.
        settings: as the user gave them; "auto" values are chosen here and shown by `monitor.describe()`.

    Raises:
        BadRequestError: the model or the settings cannot be served; see `weights/` and `sharding`.
    """

    def __init__(self, source: ModelSource, settings: EngineConfig):
        if (cache := settings.compilation_cache_dir) != "":
            enable_compilation_cache(default_compilation_cache_dir() if cache is None else cache)
        leader = lead_other_hosts(settings)
        self.source = source
        self.model = read_config(source)
        self.mesh = make_mesh(settings.mesh, None if leader is None else jax.devices(), self.model)
        check_mesh_divides(self.mesh, self.model)
        device = local_device(self.mesh)
        auto = settings.dtype == "auto"
        self.dtype = matmul_benchmark.faster_matmul_dtype(device) if auto else jnp.dtype(settings.dtype)
        # Now, while the device is idle: it is the yardstick of every step's time.
        self._matmul_rate = matmul_benchmark.matmul_rate(device, self.dtype) * self.mesh.size
        self._refuse_weights_that_do_not_fit(settings)
        self._on_cpu = device.platform == "cpu"
        self._others = EngineHosts.of(leader, self.mesh, self.dtype, settings)
        self.params = self._load(source, self.model)
        self._log: list[CompileRecord] = []
        self._adapters: list[Adapter] = []
        self.attention = choose_attention(self.mesh, self.model, self.dtype)
        shared = self.params, self.model, self.dtype, self.mesh, self.attention, self._log
        self._compiles = Precompiler(self._log, unasked=settings.precompile)
        threads = {"compilers": self._compiles.compilers, "background": self._compiles.background}
        self.sampler = SamplingLoop(*shared, settings.memory_fraction, **threads)
        self.trainer = Trainer(
            *shared,
            max_tokens=settings.max_tokens_per_micro_batch,
            remat=settings.remat,
            memory_fraction=settings.memory_fraction,
            cache_bytes=self.sampler.cache_bytes(),
            make_room=self.sampler.release_cache,
            **threads,
        )
        self._logits = logits_program(self.dtype, self.attention, self.mesh, self._log)
        if self._others is not None:
            self._others.make_programs(self.attention.name, self.sampler.attention.name)
            for program in (*self.trainer.programs.all, *self.sampler.programs, self._logits):
                program.others = self._others
            self._others.leader.call_when_lost(self)
            self.sampler.is_loss = self._is_loss
        self._dispatcher = Dispatcher("jax_client")
        self._packers = InTurn("jax_client-pack", PACKERS, ready=1)
        self.monitor = EngineMonitor(
            source=source,
            model=self.model,
            mesh=self.mesh,
            dtype=self.dtype,
            attention=self.attention,
            weights_bytes=sum(a.nbytes for a in jax.tree.leaves(self.params)),
            sampler=self.sampler,
            trainer=self.trainer,
            dispatcher=self._dispatcher,
            adapters=self._adapters,
            log=self._log,
            matmul_flops_per_second=self._matmul_rate,
            others=self._others,
        )
        process.register(
            f"engine of {source.name}",
            "base weights, adapters, the sampler's cache and compiled programs",
            owner=self,
            at_exit={
                Step.SAMPLING: Engine._drop_rows,
                Step.ENGINES: Engine._drop_compiles,
                Step.MEMORY: Engine._free_arrays,
            },
            after_fork=Engine._keep_in_fork,
        )
        process.run_exit_steps_before_others()

    def open_lane(self, owner: str = NO_OWNER) -> Lane:
        """Return a queue for one client: its requests run in order, owners share the device, lanes take turns."""
        return Lane(owner)

    def submit(self, lane: Lane, task: Task[T], trained: Adapter | None = None) -> Future[T]:
        """Carry out a task on the thread that launches programs; `trained` is the adapter of a training task."""
        return self._dispatcher.submit(lane, self._supervised(lane, task, trained))

    def open_adapter(self, lane: Lane, start: LoraSpec | AdapterState) -> Future[Adapter]:
        """Make an adapter: with fresh weights, or with those of a saved state and its moments if it has them."""

        def task() -> Task[Adapter]:
            spec = start if isinstance(start, LoraSpec) else start.spec
            self._refuse_adapter_that_does_not_fit(spec)
            if isinstance(start, LoraSpec):
                adapter = self._new_adapter(spec, 0, adapters.initial_weights(self.model, spec, self.mesh), None, None)
            else:
                yield partial(adapters.refuse_wrong_numbers, start)
                adapter = self._from_state(start)
            yield partial(jax.block_until_ready, (adapter.weights, adapter.mu, adapter.nu))
            self._adapters.append(adapter)
            self._compiles.likely(self.trainer, spec)
            return adapter

        return self.submit(lane, task())

    def restore(self, lane: Lane, adapter: Adapter, state: AdapterState) -> Future[Version]:
        """Replace the adapter's weights and optimizer by a saved state; accumulated gradients are dropped."""

        def task() -> Task[Version]:
            yield partial(adapters.refuse_wrong_numbers, state)
            loaded = self._from_state(state)
            yield partial(jax.block_until_ready, (loaded.weights, loaded.mu, loaded.nu))
            with adapter.lock:
                adapter.weights, adapter.mu, adapter.nu = loaded.weights, loaded.mu, loaded.nu
                adapter.step, adapter.grads, adapter.skipped_in_a_row = loaded.step, None, 0
                adapter.loads += 1
            return adapter.version

        return self.submit(lane, task())

    def release(self, adapter: Adapter) -> None:
        """Forget an adapter; its memory is freed when nothing else refers to it."""
        if adapter in self._adapters:
            self._adapters.remove(adapter)

    def score_batch(
        self, lane: Lane, adapter: Adapter | None, examples: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        """Return the logprobs and the loss with an adapter, or with the base model for None; no gradient."""
        prepared = self._pack(lane, examples, loss)
        return self.submit(lane, self.trainer.score_task(adapter, examples, loss, prepared))

    def train_batch(
        self, lane: Lane, adapter: Adapter, examples: list[TrainExample], loss: LossSpec | CustomLoss
    ) -> Future[TrainResult]:
        """Add the gradient of the summed loss, built in or on the host, to the adapter's accumulated gradient."""
        prepared = self._pack(lane, examples, loss if isinstance(loss, LossSpec) else None, adapter.spec)
        if isinstance(loss, LossSpec):
            task = self.trainer.train_task(adapter, examples, loss, prepared)
        else:
            task = self.trainer.custom_task(adapter, examples, loss, prepared)
        return self.submit(lane, task, adapter)

    def optim_step(self, lane: Lane, adapter: Adapter, settings: AdamSettings) -> Future[dict[str, float]]:
        """Apply one AdamW step with the accumulated gradient, and clear it; return the step's metrics."""

        def task() -> Task[dict[str, float]]:
            if adapter.grads is None:
                raise RequestFailedError(
                    f"optim_step: there are no gradients since step {adapter.step}. Call forward_backward (and check "
                    "that it succeeded) before each optim_step.",
                    category="user",
                )
            take = partial(self.trainer.optim_step, adapter, adapter.grads)
            new, metrics, work = yield from take(settings)
            if metrics["finite"] and not metrics["in_range"]:
                del new  # its memory, before the step is computed again
                raise (yield from step_range.failure(take, settings, metrics, adapter.step))
            adapter.work = Work()
            if not metrics["finite"]:
                adapter.grads = None
                adapter.skipped_in_a_row += 1
                logger.warning("optim_step: the gradient's norm is not finite; step %d was skipped", adapter.step + 1)
                if adapter.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise RequestFailedError(
                        f"optim_step: the gradients of {adapter.skipped_in_a_row} steps in a row were not finite; the "
                        f"weights are those of step {adapter.step}. Lower the learning rate or look at the data, and "
                        "load the last good checkpoint.",
                        category="user",
                    )
                return {"skipped_nonfinite:sum": 1.0, "learning_rate:mean": settings.learning_rate}
            with adapter.lock:
                adapter.weights, adapter.mu, adapter.nu = new
                adapter.step += 1
                adapter.grads = None
            adapter.skipped_in_a_row = 0
            rates = work.rates(self._matmul_rate)
            return {
                "grad_norm:mean": float(metrics["grad_norm"]),
                "update_norm:mean": float(metrics["update_norm"]),
                "learning_rate:mean": settings.learning_rate,
                "step:max": float(adapter.step),
                **{f"{name}:mean": rates[name] for name in STEP_RATES if name in rates},
                **{f"{shown}:sum": rates[name] for name, shown in STEP_SUMS.items() if name in rates},
            }

        return self.submit(lane, task(), adapter)

    def snapshot(
        self, lane: Lane | None, source: Adapter | AdapterState, *, optimizer: bool = False
    ) -> Future[Snapshot]:
        """Return weights to sample from or to save: an adapter's as of this place in its lane, or a saved state's."""
        if lane is None:
            if not isinstance(source, Adapter):
                raise ValueError("snapshot: a saved state is put on the device in a lane; give that of its client.")
            now: Future[Snapshot] = Future()
            now.set_result(adapters.snapshot_of(source, optimizer))
            return now

        def task() -> Task[Snapshot]:
            if isinstance(source, Adapter):
                return adapters.snapshot_of(source, optimizer)
            yield partial(adapters.refuse_wrong_numbers, source)
            weights = adapters.put(source.weights, self.model, source.spec, self.mesh)
            yield partial(jax.block_until_ready, weights)
            return Snapshot(spec=source.spec, weights=weights, step=source.step)

        return self.submit(lane, task())

    def generate(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Sample from, or score, a prompt with a snapshot's weights, or the base model's for None.

        Requests of all clients run together in a lane of their own. Cancelling the future frees the request's rows.
        """
        self._dispatcher.check_open()
        self._compiles.asked.set()
        future, start = self.sampler.enqueue(snapshot, request)
        if start:
            self.submit(self.sampler.lane, self.sampler.serve()).add_done_callback(self.sampler.stopped)
        else:
            self._dispatcher.follow(self.sampler.lane)
        return future

    def logits(
        self, lane: Lane, tokens_T: np.ndarray, state: AdapterState | None, model: ModelSource | None = None
    ) -> Future[np.ndarray]:
        """Score a short text over the whole vocabulary, float32 (T, V), if need be with another model's weights."""

        def task() -> Task[np.ndarray]:
            params, config = self.params, self.model
            if model is not None:
                config = read_config(model)
                self._refuse_model_beside(config)
                params = yield partial(self._load, model, config, beside=True)
            weights: Weights = NO_ADAPTER
            if state is not None:
                yield partial(adapters.refuse_wrong_numbers, state)
                weights = adapters.put(state.weights, self.model, state.spec, self.mesh)
                yield partial(jax.block_until_ready, weights)
            tokens_BT = put_whole(tokens_T[None], self.mesh)
            run = partial(self._logits, params, weights, tokens_BT, model=config)
            yield Elsewhere(self._logits.begin(self._compiles.compilers, "first use", *run.args, **run.keywords))
            return (yield partial(fetch, run()))

        return self.submit(lane, task())

    def warmup(
        self, spec: LoraSpec, lengths: list[int], targets_per_position: int, *, sampling: bool = False
    ) -> Future[list[CompileRecord]]:
        """Compile what train_batch over sequences of these lengths, and optim_step, will need; return what was new.

        `sampling` adds what sampling from such an adapter will need.
        """
        self._dispatcher.check_open()
        begin = (lambda: self.submit(self.open_lane(), self.sampler.warm(spec))) if sampling else None
        work = partial(self._compiles.warm, self.trainer, spec, lengths, targets_per_position, begin)
        return self._dispatcher.workers.submit(work)

    def close(self) -> None:
        """Stop the engine's threads; requests that have not finished fail."""
        self._dispatcher.close()
        self._compiles.close()
        self._packers.close()
        self.trainer.close()
        self.sampler.fail_waiting(RequestFailedError("the engine was closed before this request was carried out."))
        if self._others is not None:
            self._others.close()
        process.unregister(self)

    def _is_loss(self, error: BaseException) -> bool:
        """Return whether an error shows that a host of the mesh is lost; all requests fail then, soon."""
        lost = self._others is not None and is_device_failure(error)
        if lost and self._others is not None:
            self._others.leader.suspect(error)
        return lost

    def hosts_lost(self, error: RequestFailedError) -> None:
        """Fail all requests, and do no more work: a host of the mesh is gone. Adapters stay, to be saved."""
        self._dispatcher.die(error)
        self.sampler.fail_waiting(error)

    def _drop_compiles(self) -> None:
        """Exit step: give up the compiles that have not begun."""
        self._compiles.close()

    def _drop_rows(self) -> None:
        """Exit step: forget what is sampled, once the dispatch thread has ended its turn."""
        if process.join(self._dispatcher.thread):
            self.sampler.drop_rows()

    def _free_arrays(self) -> None:
        """Exit step: drop the device arrays, which no thread uses any more."""
        self.params = {}
        self.sampler.free_weights()
        self.trainer.free_weights()
        for adapter in self._adapters:
            adapter.weights = adapter.mu = adapter.nu = NO_ADAPTER
            adapter.grads = None

    def _keep_in_fork(self) -> None:
        """Fork rule: the arrays and their client are the parent's; freeing them here would crash."""
        interpreter_end.keep_in_fork(self, self.mesh.devices.flat[0].client)

    def _new_adapter(
        self, spec: LoraSpec, step: int, weights: Weights, mu: Weights | None, nu: Weights | None
    ) -> Adapter:
        # From the host, as the first weights: nothing is compiled for them.
        none = lambda: jax.tree.map(lambda a: zeros(a.shape, a.dtype, a.sharding), weights)  # noqa: E731
        return Adapter(spec=spec, weights=weights, mu=mu or none(), nu=nu or none(), step=step)

    def _load(self, source: ModelSource, model: ModelConfig, *, beside: bool = False) -> Params:
        """Read a model's weights onto the mesh, the engine's own or for a comparison beside it."""
        read = partial(load_params, source, model, self.dtype, self.mesh, bits=self._on_cpu)
        return read() if self._others is None else self._others.load(source, model, read, beside=beside)

    def _from_state(self, state: AdapterState) -> Adapter:
        put = partial(adapters.put, c=self.model, spec=state.spec, mesh=self.mesh)
        if state.mu is None or state.nu is None:
            return self._new_adapter(state.spec, 0, put(state.weights), None, None)
        return self._new_adapter(state.spec, state.step, put(state.weights), put(state.mu), put(state.nu))

    def _refuse_model_beside(self, model: ModelConfig) -> None:
        """Raise unless there is memory for another model, in the engine's dtype, beside the engine's own."""
        memory.refuse_unless_fits(
            "the exported model, to compare it with the adapter,",
            {"weights": memory.tree_bytes(param_specs(model, self.dtype), self.mesh)},
            self.trainer.available_bytes,
            "The export is complete, but not checked. Close other clients, or check it on a machine with more memory.",
            self.sampler.release_cache,
        )

    def _pack(self, lane: Lane, *arguments: Any) -> Future[Packed]:
        """Lay out a call while the device is busy with others."""
        self._dispatcher.check_open()
        self._compiles.asked.set()
        return self._packers.submit(lane.owner, self.trainer.prepare, *arguments)

    def _supervised(self, lane: Lane, task: Task[T], trained: Adapter | None) -> Task[T]:
        """Run a task: note at its first turn how long a training task waited for it, and name the device's errors."""
        if trained is not None:
            # Not at submission: until this turn, a step before it may begin a new count.
            trained.work.queue_s += lane.waited_s
            self.trainer.total.queue_s += lane.waited_s
        try:
            return (yield from task)
        except BaseException as error:
            if self._is_loss(error):
                yield Elsewhere(Future())  # for ever: all requests are failed with what is lost
            named = named_error(error)
            if named is error:
                raise
            raise named from error

    def _refuse_weights_that_do_not_fit(self, settings: EngineConfig) -> None:
        weights = memory.tree_bytes(param_specs(self.model, self.dtype), self.mesh)
        memory.refuse_unless_fits(
            f"the base model {self.source.name!r} in {self.dtype.name}",
            {"weights": weights},
            partial(memory.free_bytes, self.mesh, settings.memory_fraction),
            "Shard it over more devices (EngineConfig.mesh with fsdp or tensor), set dtype='bfloat16', close other "
            "clients, or raise EngineConfig.memory_fraction.",
        )

    def _refuse_adapter_that_does_not_fit(self, spec: LoraSpec) -> None:
        weights = memory.tree_bytes(adapters.param_specs(self.model, spec), self.mesh)
        memory.refuse_unless_fits(
            f"a training client with rank {spec.rank}",
            {"adapter": weights, "optimizer": 2 * weights, "gradients": 2 * weights},
            self.trainer.available_bytes,
            "Lower the rank or train fewer modules (train_attn, train_mlp, train_unembed), shard over more devices "
            "(EngineConfig.mesh), set dtype='bfloat16', or close other clients.",
            self.sampler.release_cache,
        )
