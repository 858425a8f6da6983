"""Which training programs are compiled before a call needs them, and which rectangles does a call use until then?

A call whose largest rectangle is new waits for its programs and for no others: the smaller rectangles are compiled in
the background, and the largest holds their sequences meanwhile. What an earlier process left in the compilation cache
is taken at once, so that only a machine's first calls differ, in the last bits, from what the call alone decides. What
a call waits for is compiled side by side on threads of its own, and the call's task waits for that without the dispatch
thread.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_client.engine.core import adapters
from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import Cause
from jax_client.engine.core.turns import Elsewhere, Task
from jax_client.engine.train import packing
from jax_client.engine.train.packing import Limits, MicroBatch, Plan
from jax_client.engine.train.programs import NO_ADAPTER, Batch, TrainPrograms
from jax_client.engine.train.shapes import batch_shapes, loss_shape, step_shapes
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params
from jax_client.models.parts.kind import Remat
from jax_client.threads import Workers
from jax_client.values import LoraSpec, TrainExample


class CompileAhead:
    """Compiles training programs before they run. Thread-safe.

    Args:
        remat_of: `f(plan) -> remat` of its forward pass.
        compilers: threads that compile what calls wait for.
        background: threads that compile beside the calls; None compiles nothing that is not asked for.
    """

    def __init__(
        self,
        programs: TrainPrograms,
        params: Params,
        model: ModelConfig,
        mesh: Mesh,
        *,
        remat_of: Callable[[Plan], Remat],
        compilers: Workers,
        background: Workers | None,
    ) -> None:
        self._forward, self._backward, self._zeros = programs.forward, programs.backward, programs.zeros
        self._add, self._optim_step = programs.add, programs.optim_step
        self._params = params
        self._model = model
        self._mesh = mesh
        self._remat_of = remat_of
        self._compilers = compilers
        self._background = background
        self._lock = threading.Lock()
        self._jobs: dict[object, Future[None]] = {}  # what calls waited for, but for what failed
        # Compiled or in the cache, and begun here, each for adapters of one configuration.
        self._at_hand: set[_Rectangle] = set()
        self._begun: set[_Rectangle] = set()

    def free_weights(self) -> None:
        """Drop the references to the base weights, also those of errors; nothing can be compiled any more."""
        self._params = {}
        self._jobs.clear()

    def plan_call(self, sequences: list[TrainExample], limits: Limits, spec: LoraSpec | None) -> list[Plan]:
        """Plan a call, as `packing.plan_call`, with rectangles that are compiled or in the cache, or the largest.

        Args:
            sequences: of the call.
            limits: of a micro-batch.
            spec: of the adapter that is trained; None plans without regard to what is compiled.
        """
        lengths = [len(sequence.tokens_T) for sequence in sequences]
        plans = packing.plan_call(lengths, limits)
        if spec is None or self._background is None:
            return plans
        targets = packing.targets_of(sequences)
        shapes = {(plan.rows, plan.length) for plan in plans}
        rectangles = {shape: _Rectangle(replace(spec, seed=0), *shape, targets) for shape in shapes}
        missing = {shape: each for shape, each in rectangles.items() if not self._is_at_hand(each)}
        largest = missing.pop(max(rectangles, key=math.prod), None)
        if largest is not None:
            self._begun.add(largest)
            self._begin_pass(largest, self._remat_of(_empty(largest)))
        else:  # that one serves; the smaller are for calls that come later
            for rectangle in missing.values():
                self._begin_in_background(rectangle)
        return packing.plan_call(lengths, limits, rectangles.keys() - missing.keys()) if missing else plans

    def ready(self, spec: LoraSpec | None, batches: Iterable[MicroBatch], *, backward: bool, add: bool) -> Task[float]:
        """Yield-from: wait for the programs of a call, compiled side by side; return for how many seconds.

        Args:
            spec: of the adapter; None for the base model.
            batches: the call's micro-batches.
            backward: whether it computes a gradient.
            add: whether it adds up several gradients.
        """
        shapes = list(dict.fromkeys(batch.targets_BTC.shape for batch in batches))
        own = spec and replace(spec, seed=0)

        def begin() -> list[Future[None]]:
            jobs: list[Future[None]] = []
            for rows, length, targets in shapes:
                rectangle = _Rectangle(own, rows, length, targets)
                jobs += self._begin_pass(rectangle, self._remat_of(_empty(rectangle)) if backward else None)
            if backward and own is not None:
                jobs += self._begin_steps(own, ("zeros", "add") if add else ("zeros",))
            return jobs

        return (yield from _compiled(begin))

    def ready_to_step(self, spec: LoraSpec) -> Task[float]:
        """Yield-from: wait for the program of an optimizer step; return for how many seconds."""
        own = replace(spec, seed=0)
        return (yield from _compiled(lambda: self._begin_steps(own, ("optim_step",))))

    def passes(self, spec: LoraSpec, plan: Plan, targets_per_position: int, cause: Cause) -> list[Callable[[], None]]:
        """Return the compiles of what a training pass over a micro-batch needs; they can run side by side.

        Args:
            spec: of the adapter.
            plan: the rectangle; what lies in it does not matter.
            targets_per_position: K of the targets.
            cause: of the compiles' records.
        """
        rectangle = _Rectangle(replace(spec, seed=0), plan.rows, plan.length, targets_per_position)
        return self._pass(rectangle, self._remat_of(plan), cause)

    def steps(self, spec: LoraSpec, cause: Cause, *, add: bool) -> list[Callable[[], None]]:
        """Return the compiles of what every step needs beside its passes; `add` where calls have several chains."""
        names = ("zeros", "add", "optim_step") if add else ("zeros", "optim_step")
        return [partial(self._compile_step, name, spec, cause) for name in names]

    def _compile_step(self, name: str, spec: LoraSpec, cause: Cause) -> None:
        weights = self._weights(spec)
        if name == "zeros":
            self._zeros.compile(cause, weights)
        elif name == "add":
            self._add.compile(cause, weights, weights)
        else:
            self._optim_step.compile(cause, *step_shapes(weights, self._mesh))

    def _begin_steps(self, spec: LoraSpec, names: Iterable[str]) -> list[Future[None]]:
        return [self._job((name, spec), partial(self._compile_step, name, spec, "first use")) for name in names]

    def _job(self, key: object, compile_: Callable[[], None]) -> Future[None]:
        """Return the future of a compile that calls wait for; begin it if that has not been done, or has failed."""
        with self._lock:
            known = self._jobs.get(key)
        if known is not None and not (known.done() and (known.cancelled() or known.exception() is not None)):
            return known
        job = self._compilers.submit(compile_)
        with self._lock:
            self._jobs[key] = job
        return job

    def _begin_pass(self, rectangle: _Rectangle, remat: Remat | None) -> list[Future[None]]:
        """Begin the compiles of a pass, of a forward pass alone if nothing is kept for the backward pass."""
        steps = self._pass(rectangle, remat, "first use")
        return [self._job((rectangle, remat, i), compile_) for i, compile_ in enumerate(steps)]

    def _pass(self, rectangle: _Rectangle, remat: Remat | None, cause: Cause) -> list[Callable[[], None]]:
        """Return the compiles of a pass, which can run side by side."""

        def forward() -> None:
            _, arguments = self._arguments(rectangle)
            self._forward.compile(cause, *arguments, remat=remat)

        def backward() -> None:
            weights, arguments = self._arguments(rectangle)
            if self._mesh.size > 1:  # the compiler decides where its arguments lie
                _, g_BTC, _, saved = self._forward.prepare(cause, *arguments, remat=remat)
            else:
                _, g_BTC, _, saved = self._forward.shapes(*arguments, remat=remat)
                placed: Any = lambda where: lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
                g_BTC = placed(arguments[2]["targets_BTC"].sharding)(g_BTC)
                saved = jax.tree.map(placed(NamedSharding(self._mesh, PartitionSpec())), saved)
            self._backward.compile(cause, self._params, weights, arguments[2], saved, g_BTC, weights)

        return [forward] if remat is None else [forward, backward]

    def _is_at_hand(self, rectangle: _Rectangle) -> bool:
        if rectangle not in self._at_hand:
            _, arguments = self._arguments(rectangle)
            forward, remat = self._forward, self._remat_of(_empty(rectangle))
            # One that was begun here may be noted as cached while its backward pass is still compiled.
            cached = rectangle not in self._begun and forward.is_cached(*arguments, remat=remat)
            if not (cached or forward.is_compiled(*arguments, remat=remat)):
                return False
            self._at_hand.add(rectangle)
        return True

    def _begin_in_background(self, rectangle: _Rectangle) -> None:
        def work() -> None:
            # A call that needs a program which cannot be compiled meets the same error, and reports it.
            with contextlib.suppress(Exception):
                for compile_ in self._pass(rectangle, self._remat_of(_empty(rectangle)), "background"):
                    compile_()

        if rectangle not in self._begun and self._background is not None:
            self._begun.add(rectangle)
            self._background.submit(work)

    def _weights(self, spec: LoraSpec | None) -> Weights:
        # A program is prepared with shapes as it is called with arrays.
        return NO_ADAPTER if spec is None else cast(Weights, adapters.abstract_weights(self._model, spec, self._mesh))

    def _arguments(self, rectangle: _Rectangle) -> tuple[Weights, tuple[Params, Weights, Batch, jax.Array]]:
        """Return the weights, and the arguments of a forward pass over a micro-batch that holds next to nothing."""
        batch = batch_shapes(rectangle.rows, rectangle.length, rectangle.targets, self._mesh)
        weights = self._weights(rectangle.spec)
        return weights, (self._params, weights, batch, loss_shape(self._mesh))


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """What a pass over a micro-batch is compiled for: the adapter's configuration and the shape of the targets."""

    spec: LoraSpec | None
    rows: int
    length: int
    targets: int


def _empty(rectangle: _Rectangle) -> Plan:
    return Plan(rows=rectangle.rows, length=rectangle.length, slots=())


def _compiled(begin: Callable[[], list[Future[None]]]) -> Task[float]:
    """Yield-from: wait for compiles; return for how many seconds. Raises what one of them does.

    Args:
        begin: `f() -> futures` of the compiles that are needed; begins those that have not begun, or have failed.
    """
    seconds = 0.0
    # Once more after a wait: meanwhile another call may have lowered the limits, which decide what is needed.
    while missing := deque(future for future in begin() if not _succeeded(future)):
        start = time.perf_counter()
        while missing:
            yield Elsewhere(missing.popleft())  # an error would keep this frame, and this frame its future
        seconds += time.perf_counter() - start
    return seconds


def _succeeded(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
