"""Which training programs are compiled before a call needs them, and which rectangles does a call use until then?

A call whose largest rectangle is new waits for its programs and for no others: the smaller rectangles are compiled in
the background, and the largest holds their sequences meanwhile. What an earlier process left in the compilation cache
is taken at once, so that only a machine's first calls differ, in the last bits, from what the call alone decides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_client.engine.core import adapters
from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import Cause
from jax_client.engine.train import packing
from jax_client.engine.train.packing import Limits, Plan
from jax_client.engine.train.programs import Batch, TrainPrograms
from jax_client.engine.train.shapes import batch_shapes, loss_shape, step_shapes
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params
from jax_client.models.parts.block import Remat
from jax_client.threads import Workers
from jax_client.values import LoraSpec, TrainExample


class CompileAhead:
    """Compiles training programs before they run. Thread-safe.

    Args:
        remat_of: `f(plan) -> remat` of its forward pass.
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
        background: Workers | None,
    ) -> None:
        self._programs = programs
        self._params = params
        self._model = model
        self._mesh = mesh
        self._remat_of = remat_of
        self._background = background
        # Compiled or in the cache, and begun here, each for adapters of one configuration.
        self._at_hand: set[_Rectangle] = set()
        self._begun: set[_Rectangle] = set()

    def free_weights(self) -> None:
        """Drop the reference to the base weights; nothing can be compiled any more."""
        self._params = {}

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
            self._begin(largest, self._compile_backward)
        else:  # that one serves; the smaller are for calls that come later
            for rectangle in missing.values():
                self._begin(rectangle, self._compile_in_background)
        return packing.plan_call(lengths, limits, rectangles.keys() - missing.keys()) if missing else plans

    def compile_pass(self, spec: LoraSpec, plan: Plan, targets_per_position: int, cause: Cause) -> None:
        """Compile what a training pass over a micro-batch of this rectangle needs.

        Args:
            spec: of the adapter.
            plan: the rectangle; what lies in it does not matter.
            targets_per_position: K of the targets.
            cause: of the compiles' records.
        """
        weights, arguments, remat = self._arguments(_Rectangle(spec, plan.rows, plan.length, targets_per_position))
        _, g_BTC, _, saved = self._programs.forward.prepare(cause, *arguments, remat=remat)
        self._programs.backward.prepare(cause, self._params, weights, arguments[2], saved, g_BTC, weights)

    def compile_step(self, spec: LoraSpec, cause: Cause, *, add: bool) -> None:
        """Compile what every optimizer step needs, and where calls have several chains, what adds their gradients."""
        weights = self._weights(spec)
        if add:
            self._programs.add.prepare(cause, weights, weights)
        self._programs.optim_step.prepare(cause, *step_shapes(weights, self._mesh))

    def _is_at_hand(self, rectangle: _Rectangle) -> bool:
        if rectangle not in self._at_hand:
            _, arguments, remat = self._arguments(rectangle)
            forward = self._programs.forward
            # One that was begun here may be noted as cached while its backward pass is still compiled.
            cached = rectangle not in self._begun and forward.is_cached(*arguments, remat=remat)
            if not (cached or forward.is_compiled(*arguments, remat=remat)):
                return False
            self._at_hand.add(rectangle)
        return True

    def _begin(self, rectangle: _Rectangle, compile_: Callable[[_Rectangle], None]) -> None:
        def work() -> None:
            # A call that needs a program which cannot be compiled meets the same error, and reports it.
            with contextlib.suppress(Exception):
                compile_(rectangle)

        if rectangle not in self._begun and self._background is not None:
            self._begun.add(rectangle)
            self._background.submit(work)

    def _compile_in_background(self, rectangle: _Rectangle) -> None:
        plan = Plan(rows=rectangle.rows, length=rectangle.length, slots=())
        self.compile_pass(rectangle.spec, plan, rectangle.targets, "background")

    def _compile_backward(self, rectangle: _Rectangle) -> None:
        """Compile a backward pass that a call waits for, while the call's own thread compiles the forward pass."""
        if self._mesh.size > 1:  # the compiler decides where its arguments lie
            return
        weights, arguments, remat = self._arguments(rectangle)
        _, g_BTC, _, saved = self._programs.forward.shapes(*arguments, remat=remat)
        placed: Any = lambda where: lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
        g_BTC = placed(arguments[2]["targets_BTC"].sharding)(g_BTC)
        saved = jax.tree.map(placed(NamedSharding(self._mesh, PartitionSpec())), saved)
        self._programs.backward.compile("first use", self._params, weights, arguments[2], saved, g_BTC, weights)

    def _weights(self, spec: LoraSpec) -> Weights:
        # A program is prepared with shapes as it is called with arrays.
        return cast(Weights, adapters.abstract_weights(self._model, spec, self._mesh))

    def _arguments(self, rectangle: _Rectangle) -> tuple[Weights, tuple[Params, Weights, Batch, jax.Array], Remat]:
        """Return the weights, and the arguments of a forward pass over a micro-batch that holds next to nothing."""
        plan = Plan(rows=rectangle.rows, length=rectangle.length, slots=())
        batch = batch_shapes(rectangle.rows, rectangle.length, rectangle.targets, self._mesh)
        weights = self._weights(rectangle.spec)
        return weights, (self._params, weights, batch, loss_shape(self._mesh)), self._remat_of(plan)


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """What a pass over a micro-batch is compiled for: the adapter's configuration and the shape of the targets."""

    spec: LoraSpec
    rows: int
    length: int
    targets: int
