"""How does a training call become micro-batches on the device and come back as one answer?

The trainer packs a call on the host, launches the programs of each micro-batch and commits the gradient after the last.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core import accounting, memory
from jax_client.engine.core.accounting import Work
from jax_client.engine.core.adapters import Adapter, Weights
from jax_client.engine.core.memory import PassMemory
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.core.requests import AdamSettings, CustomLoss, LossSpec, TrainResult
from jax_client.engine.core.turns import Task
from jax_client.engine.devices.arrays import fetch, put_rows, put_whole
from jax_client.engine.devices.device_errors import is_out_of_memory, named_error
from jax_client.engine.train import packing
from jax_client.engine.train.ahead import CompileAhead
from jax_client.engine.train.halving import halved, shape_and_remedy
from jax_client.engine.train.limits import Sizing
from jax_client.engine.train.packing import MicroBatch, Plan
from jax_client.engine.train.programs import NO_ADAPTER, Batch, Kept, StepMetrics, TrainPrograms, laid_out
from jax_client.engine.train.results import Launched, Results
from jax_client.errors import DoesNotFitError
from jax_client.losses import registry
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.kind import Remat
from jax_client.threads import Workers
from jax_client.values import LoraSpec, TrainExample

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A call laid out on the host: rounds of micro-batches that run at the same time."""

    rounds: list[list[MicroBatch]]
    seconds: float

    @property
    def batches(self) -> list[MicroBatch]:
        """Return the micro-batches of all rounds."""
        return [batch for batch_round in self.rounds for batch in batch_round]


class Trainer:
    """Runs training calls with the engine's weights. Its tasks run on the engine's dispatch thread.

    Args:
        max_tokens: ceiling of the tokens that are computed at once, all devices together; None chooses, see `limits`.
        remat: what the backward pass recomputes; "auto" decides by the size of the micro-batch.
        memory_fraction: of a device's memory that may be filled.
        cache_bytes: of a device, that the sampler's cache will take.
        compilers: threads that compile what is needed now.
        background: compiles in advance; None compiles nothing that is not needed now.
        make_room: frees memory that can be done without, and says whether there was any; called before a request is
            refused or made smaller for lack of memory.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        attention: Attention,
        log: list[CompileRecord],
        *,
        max_tokens: int | None,
        remat: str,
        memory_fraction: float,
        cache_bytes: int,
        make_room: Callable[[], bool],
        compilers: Workers,
        background: Workers | None = None,
    ):
        self.total = Work()
        self.programs = TrainPrograms(model, dtype, mesh, attention, log)
        self._params = params
        self._model = model
        self._dtype = dtype
        self._mesh = mesh
        self._memory_fraction = memory_fraction
        self._make_room = make_room
        self.memory = PassMemory(
            config=model, dtype=dtype, mesh=mesh, attention=attention.name, blocks=self.programs.blocks
        )
        self._sizing = Sizing(
            memory=self.memory, attention=attention, free=self.available_bytes(), cache=cache_bytes, setting=remat
        )
        self.limits = self._sizing.limits(max_tokens)
        threads = {"compilers": compilers, "background": background}
        self.ahead = CompileAhead(self.programs, params, model, mesh, remat_of=self._remat_of, **threads)
        # One program alone leaves a CPU's cores idle at times.
        self._launchers = Workers("jax_client-train", self.limits.concurrent - 1, ready=self.limits.concurrent - 1)

    def close(self) -> None:
        """End the threads that launch micro-batches side by side."""
        self._launchers.close(wait=False)

    def free_weights(self) -> None:
        """Drop the references to the base weights; nothing can be trained any more."""
        self._params = {}
        self.ahead.free_weights()

    def available_bytes(self) -> int:
        """Return the bytes that this process may still allocate on a device."""
        return memory.free_bytes(self._mesh, self._memory_fraction)

    def remat(self, tokens: int) -> Remat:
        """Return the remat setting where `tokens` tokens per way are computed at the same time."""
        return self._sizing.remat(tokens)

    def prepare(self, sequences: list[TrainExample], loss: LossSpec | None, spec: LoraSpec | None = None) -> Packed:
        """Pack a call on the host; runs on a worker thread while the device is busy with earlier calls.

        Args:
            sequences: of the call.
            loss: the built-in loss, None for one of the host.
            spec: of the adapter that is trained; None plans without regard to what is compiled.
        """
        start = time.perf_counter()
        defaults, gradient_input = dict.fromkeys(registry.INPUTS, 0.0), None
        if loss is not None:
            known = registry.LOSSES[loss.name]
            defaults |= {**known.defaults, **known.config, **loss.config}
            gradient_input = None if known.masked_has_gradient else known.mask
        plans = self.ahead.plan_call(sequences, self.limits, spec)
        rounds = packing.in_rounds(plans, self.limits)
        filled = [[packing.fill(plan, sequences, defaults, gradient_input) for plan in plans] for plans in rounds]
        return Packed(rounds=filled, seconds=time.perf_counter() - start)

    def score_task(
        self, adapter: Adapter | None, sequences: list[TrainExample], loss: LossSpec, prepared: Future[Packed]
    ) -> Task[TrainResult]:
        """Score the sequences and their loss without a gradient."""
        weights = NO_ADAPTER if adapter is None else adapter.weights

        def run(packed: Packed) -> Task[TrainResult]:
            out = Results(sequences)

            def launch(batch: MicroBatch) -> Launched:
                logprobs_BTC, _, sums, _ = self._forward(weights, self._put(batch), loss, remat=None)
                return logprobs_BTC, sums

            spec = None if adapter is None else adapter.spec
            yield from self.ahead.ready(spec, packed.batches, backward=False, add=False)
            for batches in packed.rounds:
                launched = self._run_concurrently(launch, batches)
                for batch, (logprobs_BTC, sums) in zip(batches, launched, strict=True):
                    yield from out.add(batch, logprobs_BTC, sums, running=launched)
            yield from out.drain()
            return out.result(loss)

        return (yield from self._halving(run, sequences, loss, prepared))

    def train_task(
        self, adapter: Adapter, sequences: list[TrainExample], loss: LossSpec, prepared: Future[Packed]
    ) -> Task[TrainResult]:
        """Accumulate the gradient of a built-in loss."""

        def run(packed: Packed) -> Task[TrainResult]:
            compile_s = yield from self._ready(adapter, packed)
            out, work, totals = Results(sequences), self._work(adapter, packed), self._accumulators(adapter, packed)
            work.compile_s = compile_s

            def launch(batches: list[MicroBatch], total: Weights) -> tuple[Weights, list[tuple[MicroBatch, Launched]]]:
                answers = []
                for batch in batches:
                    device, remat = self._put(batch), self._remat_of(batch.plan)
                    logprobs_BTC, g_BTC, sums, saved = self._forward(adapter.weights, device, loss, remat=remat)
                    total = self._backward(adapter, device, saved, g_BTC, total)
                    del saved
                    if batch is not batches[-1]:  # the saved activations of two micro-batches may not fit
                        jax.block_until_ready(total)
                    answers.append((batch, (logprobs_BTC, sums)))
                return total, answers

            with self._clock(work):
                for chains in packing.chained(packed.rounds):
                    launched = self._run_concurrently(launch, chains, totals)
                    totals[: len(launched)] = [grads for grads, _ in launched]
                    for batch, answer in (pair for _, answers in launched for pair in answers):
                        yield from out.add(batch, *answer, running=totals)
                yield from out.drain()
                grads = yield partial(jax.block_until_ready, self._sum(totals))
            adapter.grads = grads
            self._account(adapter, work, out)
            return out.result(loss)

        return (yield from self._halving(run, sequences, loss, prepared, adapter))

    def custom_task(
        self, adapter: Adapter, sequences: list[TrainExample], loss: CustomLoss, prepared: Future[Packed]
    ) -> Task[TrainResult]:
        """Accumulate the gradient of a loss that runs on the host: one forward, the user's function, one backward.

        The saved activations wait on the device for the cotangents; the micro-batches beyond the memory's share run
        their forward pass again.
        """

        def run(packed: Packed) -> Task[TrainResult]:
            compile_s = yield from self._ready(adapter, packed)
            out, work, kept = Results(sequences), self._work(adapter, packed), list[list[tuple[Batch, Kept | None]]]()
            work.compile_s = compile_s
            room = memory.ACTIVATION_SHARE * self.available_bytes()

            def forward(batch: MicroBatch, keep: bool) -> tuple[jax.Array, tuple[Batch, Kept | None]]:
                device, remat = self._put(batch), self._remat_of(batch.plan)
                logprobs_BTC, _, _, saved = self._forward(adapter.weights, device, None, remat=remat)
                return logprobs_BTC, (device, saved if keep else None)

            def backward(batch: MicroBatch, forwarded: list[tuple[Batch, Kept | None]], total: Weights) -> Weights:
                device, saved = forwarded.pop()  # popped, so that what was saved is freed as soon as it was used
                if saved is None:
                    *_, saved = self._forward(adapter.weights, device, None, remat=self._remat_of(batch.plan))
                g_BTC = put_rows(packing.scatter(batch.plan, sequences, cotangents), self._mesh)
                return self._backward(adapter, device, saved, g_BTC, total)

            with self._clock(work):
                for batches in packed.rounds:
                    keep = []
                    for batch in batches:
                        room -= self._tokens(batch.plan) * self.memory.activations(self._remat_of(batch.plan))
                        keep.append(room >= 0)
                    launched = self._run_concurrently(forward, batches, keep)
                    for batch, (logprobs_BTC, forwarded) in zip(batches, launched, strict=True):
                        kept.append([forwarded])
                        yield from out.add(batch, logprobs_BTC, {}, running=[logprobs for logprobs, _ in launched])
                    del launched, forwarded
                yield from out.drain()
            try:
                value, cotangents, metrics = yield partial(loss, out.logprobs())
            except BaseException:
                kept.clear()  # the user may keep the error, and its traceback this frame
                raise

            totals, waiting = self._accumulators(adapter, packed), iter(kept)
            with self._clock(work):
                for batches in packed.rounds:
                    launched = self._run_concurrently(backward, batches, waiting, totals)
                    totals[: len(launched)] = launched
                    yield partial(jax.block_until_ready, launched)
                grads = yield partial(jax.block_until_ready, self._sum(totals))
            adapter.grads = grads
            self._account(adapter, work, out)
            return TrainResult(logprobs=out.logprobs(), metrics={**metrics, "loss:sum": value})

        return (yield from self._halving(run, sequences, None, prepared, adapter))

    def optim_step(
        self, adapter: Adapter, grads: Weights, settings: AdamSettings
    ) -> Task[tuple[tuple[Weights, Weights, Weights], StepMetrics, Work]]:
        """Yield-from: return ((weights, mu, nu), metrics on the host, work since the last step).

        The adapter is not changed.
        """
        hyper = {name: put_whole(np.float32(value), self._mesh) for name, value in asdict(settings).items()}
        work, step = Work(), put_whole(np.int32(adapter.step), self._mesh)
        work.compile_s = yield from self.ahead.ready_to_step(adapter.spec)
        with self._clock(work):
            *new, metrics = self.programs.optim_step(adapter.weights, adapter.mu, adapter.nu, grads, step, hyper)
            yield partial(jax.block_until_ready, new)
        self.total.add(work)
        work.add(adapter.work)
        weights, mu, nu = new
        return (weights, mu, nu), (yield partial(fetch, metrics)), work

    def _halving(
        self,
        run: Callable[[Packed], Task[TrainResult]],
        sequences: list[TrainExample],
        loss: LossSpec | None,
        prepared: Future[Packed],
        adapter: Adapter | None = None,
    ) -> Task[TrainResult]:
        """Run a packed call; where the device runs out of memory, once more with what could be freed, and then with
        micro-batches half as large.

        Nothing was committed, so the second run starts from the same state. If it succeeds, the smaller ceiling stays.
        `adapter` is the one that is trained, None where there is no backward pass.
        """
        packed = yield prepared
        if adapter is not None:
            packed = yield from self._fitting(adapter, packed, sequences, loss)
        before = self.limits
        try:
            try:
                return (yield from run(packed))
            except jax.errors.JaxRuntimeError as error:
                if not (is_out_of_memory(error) and self._make_room()):
                    raise
            return (yield from run(packed))
        except jax.errors.JaxRuntimeError as error:
            smaller = halved(packed.batches, self.limits)
            if smaller is None or not is_out_of_memory(error):
                raise named_error(error, *shape_and_remedy(packed.batches, before)) from error
        self.limits = smaller
        packed = yield partial(self.prepare, sequences, loss)
        try:
            result = yield from run(packed)
        except BaseException as error:
            self.limits = before
            named = named_error(error, *shape_and_remedy(packed.batches, before))
            if named is error:
                raise
            raise named from error
        most = smaller.tokens_at_once * smaller.ways
        logger.warning("out of memory: at most %d tokens are computed at once from now on", most)
        return result

    def _fitting(
        self, adapter: Adapter, packed: Packed, sequences: list[TrainExample], loss: LossSpec | None
    ) -> Task[Packed]:
        """Yield-from: return a packed call whose micro-batches fit, by the estimate: where they do not, smaller ones.

        The smaller ceiling stays.

        Raises:
            DoesNotFitError: the smallest that can hold the longest sequence does not fit, and nothing has changed.
        """
        before = self.limits
        while True:
            try:
                self._refuse_what_does_not_fit(adapter, packed)
                break
            except DoesNotFitError:
                if (smaller := halved(packed.batches, self.limits)) is None:
                    self.limits = before
                    raise
            self.limits = smaller
            packed = yield partial(self.prepare, sequences, loss)
        if self.limits is not before:
            most = self.limits.tokens_at_once * self.limits.ways
            logger.warning("little memory is free: at most %d tokens are computed at once from now on", most)
        return packed

    def _ready(self, adapter: Adapter, packed: Packed) -> Task[float]:
        """Yield-from: wait for the programs of a call with a gradient; return for how many seconds."""
        add = max(map(len, packed.rounds)) > 1
        return (yield from self.ahead.ready(adapter.spec, packed.batches, backward=True, add=add))

    def _refuse_what_does_not_fit(self, adapter: Adapter, packed: Packed) -> None:
        for shapes in {tuple(batch.targets_BTC.shape for batch in batches) for batches in packed.rounds}:
            parts = Counter[str]()
            for rows, length, targets in shapes:
                plan = Plan(rows=rows, length=length, slots=())
                parts.update(self.memory.step(self._remat_of(plan), self._tokens(plan), adapter.spec, targets))
            each = [f"{rows} x {length} tokens" + (f" x {K} targets" if K > 1 else "") for rows, length, K in shapes]
            memory.refuse_unless_fits(
                "a micro-batch of " + " beside one of ".join(each),
                parts,
                self.available_bytes,
                "Lower EngineConfig.max_tokens_per_micro_batch, set remat='full', send shorter sequences, lower the "
                "rank, or shard over more devices (mesh).",
                self._make_room,
            )

    def _tokens(self, plan: Plan) -> int:
        return plan.rows * plan.length // self.limits.ways

    def _remat_of(self, plan: Plan) -> Remat:
        return self.remat(self._tokens(plan) * (1 if self.limits.alone(plan) else self.limits.concurrent))

    def _work(self, adapter: Adapter, packed: Packed) -> Work:
        work = Work(host_s=packed.seconds)
        for batch in packed.batches:
            lengths = [slot.length for slot in batch.plan.slots]
            useful, hardware = accounting.flops(self._model, adapter.spec, lengths, self._remat_of(batch.plan))
            computed = batch.plan.rows * batch.plan.length
            work.add(Work(tokens=sum(lengths), computed=computed, flops=useful, hardware_flops=hardware))
        return work

    def _account(self, adapter: Adapter, work: Work, out: Results) -> None:
        work.host_s += out.host_s
        adapter.work.add(work)
        self.total.add(work)

    @contextmanager
    def _clock(self, work: Work) -> Iterator[None]:
        start = time.perf_counter()
        yield
        work.device_s += time.perf_counter() - start

    def _accumulators(self, adapter: Adapter, packed: Packed) -> list[Weights]:
        """Return a tree to add gradients to for each concurrent micro-batch: the adapter's own first, then zeros."""
        further = max(map(len, packed.rounds)) - 1
        if adapter.grads is not None and not further:
            return [adapter.grads]
        zeros = self.programs.zeros(adapter.weights)
        return [zeros if adapter.grads is None else adapter.grads, *[zeros] * further]

    def _sum(self, totals: list[Weights]) -> Weights:
        return reduce(self.programs.add, totals)

    def _forward(
        self, weights: Weights, device: Batch, loss: LossSpec | None, *, remat: Remat | None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], Kept]:
        number = registry.NO_LOSS if loss is None else registry.loss_number(loss.name)
        return self.programs.forward(
            self._params, weights, device, put_whole(np.int32(number), self._mesh), remat=remat
        )

    def _backward(self, adapter: Adapter, device: Batch, saved: Kept, g_BTC: jax.Array, grads: Weights) -> Weights:
        return self.programs.backward(self._params, adapter.weights, device, saved, g_BTC, grads)

    def _run_concurrently(self, launch: Callable[..., T], *each: Iterable[Any]) -> list[T]:
        """Return launch(*...) for the first of each, the second of each, and so on.

        A single one returns with its programs queued, as on any device. Of several each has a thread, for XLA runs what
        one thread launches in turn on a CPU, and all have ended when this returns: even if one fails, none is left that
        would still use memory. The dispatch thread is one of them, so that no other request takes memory beside theirs.
        """
        first, *others = (partial(launch, *arguments) for arguments in zip(*each, strict=False))
        if not others:
            return [first()]
        futures = [self._launchers.submit(lambda launch=launch: jax.block_until_ready(launch())) for launch in others]
        try:
            return [jax.block_until_ready(first()), *(future.result() for future in futures)]
        finally:
            wait(futures)

    def _put(self, batch: MicroBatch) -> Batch:
        return laid_out(batch, partial(put_rows, mesh=self._mesh), partial(put_whole, mesh=self._mesh))
