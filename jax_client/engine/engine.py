"""What can one base model on one mesh be asked to do? The engine's whole surface.

Every method returns a future at once; the work runs as tasks of the dispatcher. A task commits its result to the
adapter only after the device has finished it, so a failed request leaves the adapter as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_client import interpreter_end, process
from jax_client.config import EngineConfig, default_compilation_cache_dir
from jax_client.engine.core import adapters, matmul_benchmark, memory
from jax_client.engine.core.accounting import Work
from jax_client.engine.core.adapters import Adapter, Held, Snapshot, Version
from jax_client.engine.core.attention_check import choose_attention
from jax_client.engine.core.device_errors import named_error
from jax_client.engine.core.dispatch import Dispatcher, Lane, Task
from jax_client.engine.core.programs import Cause, CompileRecord, compiling, enable_compilation_cache
from jax_client.engine.core.requests import (
    AdamSettings,
    CustomLoss,
    GenerationRequest,
    GenerationResult,
    LossSpec,
    TrainResult,
)
from jax_client.engine.sample.loop import SamplingLoop
from jax_client.engine.train import packing
from jax_client.engine.train.packing import Plan
from jax_client.engine.train.trainer import Trainer
from jax_client.errors import RequestFailedError
from jax_client.models.decoder import param_specs
from jax_client.process import Step
from jax_client.sharding import check_mesh_divides, make_mesh
from jax_client.threads import Workers
from jax_client.values import AdapterState, LoraSpec, TrainExample
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import ModelSource

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_SKIPPED_IN_A_ROW = 10
# Of `Work.rates`, what the metrics of optim_step show of the step.
STEP_RATES = ("tokens_per_second", "padding_waste", "host_share", "matmul_fraction", "limit_fraction")
STEP_SUMS = {
    "tokens": "input_tokens",
    "queue_seconds": "queue_seconds",
    "host_seconds": "host_seconds",
    "compile_seconds": "compile_seconds",
    "device_seconds": "device_seconds",
}
# Longer than any turn of the device should take; compiles are known by name and may take longer still.
STUCK_SECONDS = 300.0
COMPILE_SECONDS = 3600.0


class Engine:
    """One base model on one mesh: its frozen weights, compiled programs, and the thread that launches them.

    Args:
        source: where the model's files are.
        settings: as the user gave them; "auto" values are chosen here and shown by `describe()`.

    Raises:
        BadRequestError: the model or the settings cannot be served; see `weights/` and `sharding`.
    """

    def __init__(self, source: ModelSource, settings: EngineConfig):
        cache = settings.compilation_cache_dir
        if cache != "":
            enable_compilation_cache(default_compilation_cache_dir() if cache is None else cache)
        self.source = source
        self.model = read_config(source)
        self.mesh = make_mesh(settings.mesh)
        check_mesh_divides(self.mesh, n_kv_heads=self.model.n_kv_heads, d_ff=self.model.d_ff)
        device = self.mesh.devices.flat[0]
        auto = settings.dtype == "auto"
        self.dtype = matmul_benchmark.faster_matmul_dtype(device) if auto else jnp.dtype(settings.dtype)
        # Now, while the device is idle: it is the yardstick of every step's time.
        self._matmul_rate = matmul_benchmark.matmul_rate(device, self.dtype) * self.mesh.size
        self._refuse_weights_that_do_not_fit(settings)
        on_cpu = device.platform == "cpu"
        self.params = load_params(source, self.model, self.dtype, self.mesh, bits=on_cpu)
        self._log: list[CompileRecord] = []
        self._adapters: list[Adapter] = []
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.attention = choose_attention(self.mesh, self.model, self.dtype)
        shared = self.params, self.model, self.dtype, self.mesh, self.attention, self._log
        self.sampler = SamplingLoop(*shared, settings.memory_fraction)
        concurrent = memory.choose_concurrency(self.mesh)
        self.trainer = Trainer(
            *shared,
            max_tokens=settings.max_tokens_per_micro_batch
            or concurrent * memory.choose_micro_batch_tokens(device, ways),
            concurrent=concurrent,
            remat=settings.remat,
            memory_fraction=settings.memory_fraction,
            make_room=self.sampler.release_cache,
        )
        self._background = Workers("jax_client-compile", 1, ready=1) if settings.precompile else None
        self._dispatcher = Dispatcher("jax_client")
        self._sampling_lane = Lane(sampling=True)
        self._closed = False
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

    @property
    def max_context(self) -> int:
        """Most tokens of a sequence."""
        return self.model.max_context

    def open_lane(self) -> Lane:
        """Return a queue for one client: its requests run in order, lanes take turns."""
        return Lane()

    def submit(self, lane: Lane, task: Task[T]) -> Future[T]:
        """Carry out a task of one of the engine's own rooms, on the thread that launches programs."""
        return self._dispatcher.submit(lane, self._with_named_errors(task))

    def create_adapter(self, lane: Lane, spec: LoraSpec) -> Future[Adapter]:
        """Make an adapter with fresh weights and optimizer."""

        def task() -> Task[Adapter]:
            self._refuse_adapter_that_does_not_fit(spec)
            weights = adapters.initial_weights(self.model, spec, self.mesh)
            return (yield from self._opened(self._new_adapter(spec, 0, weights, None, None)))

        return self.submit(lane, task())

    def forward(
        self, lane: Lane, adapter: Adapter | None, sequences: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        """Score sequences with an adapter, or with the base model for None; no gradient."""
        prepared = self._elsewhere(self.trainer.prepare, sequences, loss)
        return self.submit(lane, self.trainer.forward_task(adapter, sequences, loss, prepared))

    def forward_backward(
        self, lane: Lane, adapter: Adapter, sequences: list[TrainExample], loss: LossSpec
    ) -> Future[TrainResult]:
        """Add the gradient of the summed loss to the adapter's accumulated gradient."""
        prepared = self._elsewhere(self.trainer.prepare, sequences, loss)
        task = self.trainer.forward_backward_task(adapter, sequences, loss, prepared)
        return self.submit(lane, self._counting_queue(lane, adapter, task))

    def forward_backward_custom(
        self, lane: Lane, adapter: Adapter, sequences: list[TrainExample], loss: CustomLoss
    ) -> Future[TrainResult]:
        """As `forward_backward` with a loss that runs on the host, on a thread of its own."""
        prepared = self._elsewhere(self.trainer.prepare, sequences, None)
        task = self.trainer.custom_task(adapter, sequences, loss, prepared)
        return self.submit(lane, self._counting_queue(lane, adapter, task))

    def optim_step(self, lane: Lane, adapter: Adapter, settings: AdamSettings) -> Future[dict[str, float]]:
        """Apply one AdamW step with the accumulated gradient, and clear it.

        A gradient that is not finite is dropped without an update and reported as `skipped_nonfinite:sum`.
        """

        def task() -> Task[dict[str, float]]:
            if adapter.grads is None:
                raise RequestFailedError(
                    f"optim_step: there are no gradients since step {adapter.step}. Call forward_backward (and check "
                    "that it succeeded) before each optim_step.",
                    category="user",
                )
            new, metrics, work = yield from self.trainer.optim_step(adapter, settings)
            adapter.work = Work()
            if not metrics["finite"]:
                adapter.grads = None
                adapter.skipped_in_a_row += 1
                logger.warning("optim_step: the gradient is not finite; step %d was skipped", adapter.step + 1)
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

        return self.submit(lane, self._counting_queue(lane, adapter, task()))

    def snapshot(self, lane: Lane, adapter: Adapter) -> Future[Snapshot]:
        """Return the adapter's weights as of this place in its lane. Arrays are immutable: nothing is copied."""

        def task() -> Task[Snapshot]:
            return Snapshot(spec=adapter.spec, weights=adapter.weights)
            yield

        return self.submit(lane, task())

    def hold_state(self, lane: Lane, adapter: Adapter, optimizer: bool) -> Future[Held]:
        """Return the adapter as of this place in its lane, with Adam's moments if asked, to be fetched to the host.

        The lane continues at once. A lane of its own reads between two turns of the device, whatever else is queued.
        """

        def task() -> Task[Held]:
            return adapters.hold(adapter, optimizer)
            yield

        return self.submit(lane, task())

    def current_state(self, adapter: Adapter, optimizer: bool) -> Held:
        """Return the adapter as it is now, with Adam's moments if asked; any thread may ask, and waits for no request.

        Requests in flight do not count, and need not: what they have changed, they change all at once.
        """
        return adapters.hold(adapter, optimizer)

    def load_adapter(self, lane: Lane, state: AdapterState) -> Future[Adapter]:
        """Make an adapter from a saved state; a fresh optimizer where the state has no moments."""

        def task() -> Task[Adapter]:
            self._refuse_adapter_that_does_not_fit(state.spec)
            return (yield from self._opened(self._from_state(state)))

        return self.submit(lane, task())

    def restore_state(self, lane: Lane, adapter: Adapter, state: AdapterState) -> Future[Version]:
        """Replace the adapter's weights and optimizer by a saved state; accumulated gradients are dropped."""

        def task() -> Task[Version]:
            loaded = yield from self._settle(self._from_state(state))
            with adapter.lock:
                adapter.weights, adapter.mu, adapter.nu = loaded.weights, loaded.mu, loaded.nu
                adapter.step, adapter.grads, adapter.skipped_in_a_row = loaded.step, None, 0
                adapter.loads += 1
            return adapter.version

        return self.submit(lane, task())

    def load_snapshot(self, lane: Lane, state: AdapterState) -> Future[Snapshot]:
        """Put saved weights on the device, to sample from."""

        def task() -> Task[Snapshot]:
            weights = adapters.unflatten(state.weights, self.model, state.spec, self.mesh)
            return (yield from self._settle(Snapshot(spec=state.spec, weights=weights)))

        return self.submit(lane, task())

    def generate(self, lane: Lane, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Sample from, or score, a prompt with a snapshot's weights, or the base model's for None.

        Requests of all clients run together, whatever their weights. `lane` keeps the signature of the other
        operations; sampling has one lane of its own. Cancelling the future frees the request's rows.
        """
        del lane
        self._dispatcher.check_open()
        future, start = self.sampler.enqueue(snapshot, request)
        if start:
            self.submit(self._sampling_lane, self.sampler.serve()).add_done_callback(self.sampler.stopped)
        return future

    def warmup(self, spec: LoraSpec, lengths: list[int], targets_per_position: int) -> Future[list[dict[str, Any]]]:
        """Compile what forward_backward over sequences of these lengths, and optim_step, will need.

        Returns:
            What was compiled or loaded for it, as in `describe`; programs that were there already are left out.
        """

        def work() -> list[dict[str, Any]]:
            before = len(self._log)
            plans = packing.plan_call(lengths, self.trainer.limits)
            shapes = dict.fromkeys((plan.rows, plan.length) for plan in plans)
            examples = [Plan(rows=rows, length=length, slots=()) for rows, length in shapes]
            self._precompile(spec, examples, targets_per_position, "warmup")
            return [asdict(record) for record in self._log[before:] if record.cause == "warmup"]

        return self._elsewhere(work)

    def describe(self) -> dict[str, Any]:
        """Return the model, the mesh, every value that "auto" chose, memory by kind and the compiled programs."""
        device = self.mesh.devices.flat[0]
        limits, usage = self.trainer.limits, self.usage()
        return {
            "model": {"name": self.source.name, "path": str(self.source.path), "family": self.model.family},
            "device": {"platform": device.platform, "kind": device.device_kind, "count": self.mesh.size},
            "mesh": dict(self.mesh.shape),
            "dtype": self.dtype.name,
            "attention": self.attention.name,
            "remat": self.trainer.remat(limits.tokens_at_once),
            "max_tokens_per_micro_batch": limits.tokens_at_once * limits.ways,
            "micro_batches_at_once": limits.concurrent,
            "max_context": self.max_context,
            "memory_bytes": usage["memory_bytes"],
            "sampling": usage["sampling"],
            "training": self.trainer.total.rates(self._matmul_rate),
            "matmul_flops_per_second": self._matmul_rate,
            "compiled": self.compiled(),
        }

    def usage(self) -> dict[str, Any]:
        """Return what changes from step to step: memory by kind, what was sampled, and the sums of all training.

        Waits for nothing and walks the trees of the weights once; not for the thread that launches programs.
        """
        size = partial(jax.tree.reduce, lambda total, a: total + a.nbytes, initializer=0)
        known, sampling = list(self._adapters), self.sampler.describe()
        remat = self.trainer.remat(self.trainer.limits.tokens_at_once)
        return {
            "memory_bytes": {
                "weights": size(self.params),
                "adapters": size([a.weights for a in known]),
                "optimizer": size([(a.mu, a.nu) for a in known]),
                "gradients": size([grads for a in known if (grads := a.grads) is not None]),
                "cache": sampling["cache_bytes"],
                "activations_per_token": memory.activation_bytes_per_token(self.model, self.dtype, remat),
                "available": self.trainer.available_bytes(),
            },
            "sampling": sampling,
            "training": asdict(self.trainer.total),
        }

    def compiled(self, since: int = 0) -> list[dict[str, Any]]:
        """Return the compiles so far, but for the first `since`."""
        return [asdict(record) for record in self._log[since:]]

    def health(self) -> dict[str, Any]:
        """Return how the engine does: idle, busy, compiling, stuck, dead or closed. Never waits.

        Returns:
            state; waiting: requests that have not finished; stalled_seconds: since anything moved; compiling: what is
            being compiled, if anything.
        """
        found, now = self._dispatcher.liveness(), compiling(self._log)
        if not found.alive:
            state = "closed" if self._closed else "dead"
        elif any(each["seconds"] < COMPILE_SECONDS for each in now):
            state = "compiling"
        elif found.stalled_s > STUCK_SECONDS:
            state = "stuck"
        else:
            state = "busy" if found.waiting else "idle"
        return {
            "state": state,
            "waiting": found.waiting,
            "stalled_seconds": round(found.stalled_s, 3),
            "compiling": now,
        }

    def release(self, adapter: Adapter) -> None:
        """Forget an adapter; its memory is freed when nothing else refers to it."""
        if adapter in self._adapters:
            self._adapters.remove(adapter)

    def close(self) -> None:
        """Stop the engine's threads; requests that have not finished fail."""
        self._closed = True
        self._dispatcher.close()
        self._drop_compiles()
        self.trainer.close()
        self.sampler.fail_waiting(RequestFailedError("the engine was closed before this request was carried out."))
        process.unregister(self)

    def _drop_compiles(self) -> None:
        """Give up the compiles in advance that have not begun."""
        if self._background is not None:
            self._background.close(wait=False, cancel=True)

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
            adapter.weights, adapter.mu, adapter.nu, adapter.grads = {}, {}, {}, None

    def _keep_in_fork(self) -> None:
        """Fork rule: the arrays and their client are the parent's; freeing them here would crash."""
        interpreter_end.keep_in_fork(self, self.mesh.devices.flat[0].client)

    def _new_adapter(self, spec: LoraSpec, step: int, weights: adapters.Weights, mu: Any, nu: Any) -> Adapter:
        zeros = lambda: jax.tree.map(jnp.zeros_like, weights)  # noqa: E731
        return Adapter(spec=spec, weights=weights, mu=mu or zeros(), nu=nu or zeros(), step=step)

    def _opened(self, adapter: Adapter) -> Task[Adapter]:
        """Return an adapter when its arrays exist, from then on one of the engine's."""
        yield from self._settle(adapter)
        self._adapters.append(adapter)
        self._precompile_likely(adapter.spec)
        return adapter

    def _from_state(self, state: AdapterState) -> Adapter:
        put = lambda flat: adapters.unflatten(flat, self.model, state.spec, self.mesh)  # noqa: E731
        moments = (None, None) if state.mu is None or state.nu is None else (put(state.mu), put(state.nu))
        return self._new_adapter(state.spec, state.step if moments[0] else 0, put(state.weights), *moments)

    def _settle(self, value: T) -> Generator[Callable[[], Any], Any, T]:
        """Wait, off the dispatch thread, until the arrays of an adapter or snapshot exist."""
        arrays = [getattr(value, name) for name in ("weights", "mu", "nu") if hasattr(value, name)]
        yield partial(jax.block_until_ready, arrays)
        return value

    def _counting_queue(self, lane: Lane, adapter: Adapter, task: Task[T]) -> Task[T]:
        """Note at the first turn of a task how long it waited for it."""
        adapter.work.queue_s += lane.waited_s
        self.trainer.total.queue_s += lane.waited_s
        return (yield from task)

    def _elsewhere(self, fn: Callable[..., T], *args: Any) -> Future[T]:
        return self._dispatcher.workers.submit(fn, *args)

    def _with_named_errors(self, task: Task[T]) -> Task[T]:
        try:
            return (yield from task)
        except BaseException as error:
            named = named_error(error)
            if named is error:
                raise
            raise named from error

    def _refuse_weights_that_do_not_fit(self, settings: EngineConfig) -> None:
        weights = memory.tree_bytes(param_specs(self.model, self.dtype), self.mesh)
        memory.refuse_unless_fits(
            f"the base model {self.source.name!r} in {self.dtype.name}",
            {"weights": weights},
            partial(memory.available_bytes, self.mesh.devices.flat[0], settings.memory_fraction),
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

    def _precompile_likely(self, spec: LoraSpec) -> None:
        """Compile what a first step surely or likely needs, beside whatever comes next."""
        if self._background is not None:
            self._background.submit(self._precompile, spec, [packing.full_plan(self.trainer.limits)], 1, "background")

    def _precompile(self, spec: LoraSpec, plans: list[Plan], targets_per_position: int, cause: Cause) -> None:
        weights = adapters.abstract_weights(self.model, spec, self.mesh)
        try:
            for plan in plans:
                self.trainer.precompile(weights, plan, targets_per_position, cause)
        except Exception:
            if cause != "background":
                raise
            # The call that needs the program will meet the same error, and report it.
            if not process.ending():
                logger.warning("a program could not be compiled in advance", exc_info=True)
