"""What does an engine compile before a request needs it?

It compiles what `warmup` asks for, at once and side by side. For a new adapter it compiles in the background what a
first step surely needs, and where nothing is asked for soon, what that step likely needs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from jax_client import process
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.train import packing
from jax_client.engine.train.packing import Plan
from jax_client.engine.train.trainer import Trainer
from jax_client.threads import Workers
from jax_client.values import LoraSpec

logger = logging.getLogger(__name__)
# How long an engine waits for a request, whose programs it should compile, before it compiles those of large ones.
IDLE_S = 2.0
# Programs that are compiled at once, of each kind of thread. XLA compiles one on several cores, Python traces on one.
COMPILERS = 4


class Precompiler:
    """Compiles the programs of one engine in advance. Thread-safe.

    Attributes:
        compilers: threads for what a request waits for.
        background: threads for what none waits for yet, which yields; None if nothing is to be compiled unasked.
        asked: set once a request came that runs programs.
    """

    def __init__(self, log: list[CompileRecord], *, unasked: bool) -> None:
        self._log = log
        self.compilers = Workers("jax_client-compile", COMPILERS, ready=2)
        self.background = Workers("jax_client-precompile", COMPILERS, ready=2) if unasked else None
        self.asked = threading.Event()

    def warm(
        self,
        trainer: Trainer,
        spec: LoraSpec,
        lengths: list[int],
        targets_per_position: int,
        sampling: Callable[[], Future[None]] | None,
    ) -> list[CompileRecord]:
        """Compile what `Engine.warmup` says; return what was new.

        Args:
            trainer: of the engine.
            spec: of the adapter.
            lengths: of the sequences.
            targets_per_position: K of the targets.
            sampling: `f() -> future` begins to compile the sampling programs; None leaves them out.
        """
        before = len(self._log)
        sampled = None if sampling is None else sampling()
        plans = packing.plan_call(lengths, trainer.limits)
        shapes = dict.fromkeys((plan.rows, plan.length) for plan in plans)
        jobs: list[Callable[[], None]] = []
        for rows, length in shapes:
            jobs += trainer.ahead.passes(spec, Plan(rows=rows, length=length, slots=()), targets_per_position, "warmup")
        jobs += trainer.ahead.steps(spec, "warmup", add=trainer.limits.concurrent > 1)
        self.compilers.map(lambda compile_: compile_(), jobs)
        if sampled is not None:
            sampled.result()
        return [record for record in self._log[before:] if record.cause == "warmup"]

    def likely(self, trainer: Trainer, spec: LoraSpec) -> None:
        """Compile what a first step surely needs, and where nothing is asked for soon, what it likely needs."""

        def work() -> None:
            ahead = trainer.ahead
            self._try(ahead.steps(spec, "background", add=trainer.limits.concurrent > 1))
            if not self.asked.wait(IDLE_S):
                self._try(ahead.passes(spec, packing.full_plan(trainer.limits), 1, "background"))

        if self.background is not None:
            self.background.submit(work)

    def close(self) -> None:
        """Give up what has not begun."""
        self.asked.set()
        for workers in (self.compilers, self.background):
            if workers is not None:
                workers.close(wait=False, cancel=True)

    def _try(self, jobs: list[Callable[[], None]]) -> None:
        try:
            for compile_ in jobs:
                compile_()
        except Exception:
            # The call that needs the program will meet the same error, and report it.
            if not process.ending():
                logger.warning("a program could not be compiled in advance", exc_info=True)
