"""Which of a program's sizes runs a batch? The smallest that holds it, or a larger one while that is compiled.

A first use compiles one program of each kind, the largest, for that one serves every batch; a smaller one is compiled
in the background once a batch would have taken it. What an earlier process left in the compilation cache is taken at
once, so that a second start runs the sizes that it would always run. Without a background there are no such choices:
the smallest size runs, compiled when it is first needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.programs import Cause, Program
from jax_client.engine.sample.batches import Batches, HostBatch
from jax_client.engine.sample.programs import BLOCK_STEPS, Pool, SamplePrograms
from jax_client.engine.sample.weights import DecodeWeights
from jax_client.threads import Workers


class SizedPrograms:
    """The sampling programs by size. For the dispatch thread.

    Args:
        programs: prefill and decode.
        batches: of which shapes they are made.
        weights: that they take.
        background: compiles in advance; None compiles nothing that is not needed now.
    """

    def __init__(
        self, programs: SamplePrograms, batches: Batches, weights: DecodeWeights, background: Workers | None
    ) -> None:
        self._programs = programs
        self._batches = batches
        self._weights = weights
        self._background = background
        # What batches take, compiled or waited for: the signature of the arguments themselves takes longer to look up.
        self._taken: set[object] = set()
        self._begun: set[object] = set()  # in the background

    def tiles(self, version: Snapshot | None, pool: Pool | None, sizes: Sequence[int]) -> int:
        """Return how many tiles per way the prefill has that runs next.

        Args:
            version: the weights of the tiles.
            pool: the cache.
            sizes: that may be taken, in ascending order; the first is the best.
        """
        empty = lambda size: self._batches.of_tiles([], size, version)  # noqa: E731
        return self._choose(self._programs.prefill, empty, [] if version is None else [version], pool, sizes)

    def rows(self, versions: list[Snapshot], pool: Pool | None, sizes: Sequence[int]) -> int:
        """Return how many rows per way the decode program has that runs next; arguments as of `tiles`."""
        return self._choose(self._programs.decode, self._no_rows(versions), versions, pool, sizes)

    def compile_decode_beside(self, version: Snapshot | None, pool: Pool | None, sizes: Sequence[int]) -> None:
        """Begin to compile the decode program of the next blocks, which `rows` takes, while prefill is compiled."""
        versions, decode = [] if version is None else [version], self._programs.decode
        if self._background is None or any(self._key(decode, versions, size) in self._taken for size in sizes):
            return
        empty = self._no_rows(versions)
        cached = decode.is_cached(*self._arguments(empty, versions, pool, sizes[0]))
        self._begin(decode, empty, versions, pool, sizes[0] if cached else sizes[-1], "first use")

    def _no_rows(self, versions: list[Snapshot]) -> Callable[[int], HostBatch]:
        return lambda size: self._batches.of_rows([], size, versions) | {"steps": np.asarray(BLOCK_STEPS, np.int32)}

    def _choose(
        self,
        program: Program[Any, Any],
        empty: Callable[[int], HostBatch],
        versions: list[Snapshot],
        pool: Pool | None,
        sizes: Sequence[int],
    ) -> int:
        best, largest = sizes[0], sizes[-1]
        key = partial(self._key, program, versions)
        if self._background is None or best == largest or key(best) in self._taken:
            return best
        if key(best) not in self._begun:
            arguments = self._arguments(empty, versions, pool, best)
            if program.is_compiled(*arguments) or program.is_cached(*arguments):
                self._taken.add(key(best))
                return best
            if key(largest) in self._taken:
                self._begin(program, empty, versions, pool, best, "background")
        self._taken.add(key(largest))
        return largest

    def _begin(
        self,
        program: Program[Any, Any],
        empty: Callable[[int], HostBatch],
        versions: list[Snapshot],
        pool: Pool | None,
        size: int,
        cause: Cause,
    ) -> None:
        key, arguments = self._key(program, versions, size), self._arguments(empty, versions, pool, size)
        (self._taken if cause == "first use" else self._begun).add(key)

        def compile_() -> None:
            # A batch that needs a program which cannot be compiled meets the same error, and reports it.
            with contextlib.suppress(Exception):
                program.compile(cause, *arguments)
                self._taken.add(key)

        if self._background is not None:
            self._background.submit(compile_)

    def _arguments(
        self, empty: Callable[[int], HostBatch], versions: list[Snapshot], pool: Pool | None, size: int
    ) -> tuple[Any, ...]:
        """Return the arguments of a run over `size` empty tiles or rows.

        The pool's are shapes, for a run takes it, and so are the weights': a copy of them may go before the compile
        ends.
        """
        shapes = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)  # noqa: E731
        loras = tuple(version.weights for version in versions)
        params, pool = jax.tree.map(shapes, (self._weights.now, pool))
        return params, loras, pool, self._batches.put(empty(size))

    def _key(self, program: Program[Any, Any], versions: list[Snapshot], size: int) -> object:
        kind = replace(versions[0].spec, seed=0) if versions else None
        return program.name, size, len(versions), kind, self._weights.bytes
