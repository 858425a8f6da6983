"""Which of a program's sizes runs a batch, and is it there? The smallest that holds it, or a larger one meanwhile.

A first use compiles one program of each kind, the largest, for that one serves every batch; a smaller one is compiled
in the background once a batch would have taken it. What an earlier process left in the compilation cache is taken at
once, so that a second start runs the sizes that it would always run. Without a background there are no such choices:
the smallest size runs, compiled when it is first needed. Nothing is compiled on the dispatch thread: a program that is
not there is begun on a thread for that, and the caller asks again when its future is done.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.programs import Cause, Program
from jax_client.engine.devices.arrays import fetch
from jax_client.engine.sample.batches import Batches, HostBatch, unpack_drawn
from jax_client.engine.sample.device.pool import Pool
from jax_client.engine.sample.device.programs import BLOCK_STEPS, SamplePrograms
from jax_client.engine.sample.device.weights import DecodeWeights
from jax_client.engine.sample.rows import Row, extend
from jax_client.engine.sample.schedule import MAX_VERSIONS, Schedule
from jax_client.threads import Workers

T = TypeVar("T")
# Target seconds of a decode block; new requests wait for its end. An accelerator does all `BLOCK_STEPS` in less; a CPU,
# which takes tens of milliseconds a step, does fewer.
BLOCK_S = 0.5
FEWEST_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large batches are on a platform.

    Attributes:
        rows: ladder of the rows of a decode block, per way of the mesh that rows are split.
        tiles: of the two prefills, per way.
        many_tiles: from how many tiles on the larger prefill is the cheaper one.
        tokens_per_row: of the cache.
    """

    rows: tuple[int, ...]
    tiles: tuple[int, int]
    many_tiles: int
    tokens_per_row: int


# A CPU's time grows with the rows, padding included; an accelerator's hardly does before 100 rows or so.
CPU = Sizes(rows=(8, 32), tiles=(4, 16), many_tiles=13, tokens_per_row=512)
ACCELERATOR = Sizes(rows=(16, 128), tiles=(2, 16), many_tiles=3, tokens_per_row=2048)


def sizes_on(platform: str) -> Sizes:
    """Return the sizes on a device's platform."""
    return CPU if platform == "cpu" else ACCELERATOR


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """What a batch needs: all that its program depends on but the size.

    Attributes:
        empty: `f(size) -> batch` of empty tiles or rows.
        versions: the adapters of the program.
        pool: the cache.
    """

    program: Program[Any, Any]
    empty: Callable[[int], HostBatch]
    versions: list[Snapshot]
    pool: Pool | None


class SizedPrograms:
    """The sampling programs by size. For the dispatch thread.

    Args:
        programs: prefill and decode.
        batches: of which shapes they are made.
        weights: that they take.
        compilers: threads that compile what batches wait for.
        background: compiles in advance; None compiles nothing that is not needed now.
    """

    def __init__(
        self,
        programs: SamplePrograms,
        batches: Batches,
        weights: DecodeWeights,
        compilers: Workers,
        background: Workers | None,
    ) -> None:
        self._prefill, self._decode = programs.prefill, programs.decode
        self._batches = batches
        self._weights = weights
        self._compilers = compilers
        self._background = background
        # What batches take, compiled or waited for: the signature of the arguments themselves takes longer to look up.
        self._taken: set[object] = set()
        self._begun: set[object] = set()  # in the background
        self._compiled: set[object] = set()
        self._awaited: dict[object, Future[Any]] = {}

    def tiles(self, version: Snapshot | None, pool: Pool | None, sizes: Sequence[int]) -> int | BaseException | None:
        """Return how many tiles per way the prefill has that runs next.

        Args:
            version: the weights of the tiles.
            pool: the cache.
            sizes: that may be taken, in ascending order; the first is the best.

        Returns:
            None while that is compiled, or what compiling raised; asked for again, it is tried again. The error is not
            raised: it would have the callers' frames, and these the pool, for as long as a user has the error.
        """
        return self._choose(self._wanted_tiles(version, pool), sizes)

    def rows(self, versions: list[Snapshot], pool: Pool | None, sizes: Sequence[int]) -> int | BaseException | None:
        """Return how many rows per way the decode program has that runs next; as `tiles` does."""
        return self._choose(self._wanted_rows(versions, pool), sizes)

    def rows_compiled(self, versions: list[Snapshot], pool: Pool | None, sizes: Sequence[int]) -> int | None:
        """Return the fewest rows of a decode program that can run at once; None without one. Compiles nothing."""
        wanted = self._wanted_rows(versions, pool)
        return next((size for size in sizes if self._key(wanted, size) in self._compiled), None)

    def compile_decode_beside(self, version: Snapshot | None, pool: Pool | None, sizes: Sequence[int]) -> None:
        """Begin to compile the decode program of the next blocks, which `rows` takes, while prefill is compiled."""
        wanted = self._wanted_rows(_list(version), pool)
        if self._background is None or any(self._key(wanted, size) in self._taken for size in sizes):
            return
        cached = wanted.program.is_cached(*self._arguments(wanted, sizes[0]))
        size = sizes[0] if cached else sizes[-1]
        self._taken.add(self._key(wanted, size))
        self._compiling(wanted, size)

    def begin_all(self, version: Snapshot, pool: Pool | None, sizes: Sizes, cause: Cause) -> list[Future[Any]]:
        """Begin to compile the programs of every size for one adapter; return the futures of that."""
        wanted = [(self._wanted_tiles(version, pool), size) for size in sizes.tiles]
        wanted += [(self._wanted_rows([version], pool), size) for size in sizes.rows]
        return [each.program.begin(self._compilers, cause, *self._arguments(each, size)) for each, size in wanted]

    def awaited(self) -> list[Future[Any]]:
        """Return the compiles that batches wait for."""
        return [future for future in self._awaited.values() if not future.done()]

    def _wanted_tiles(self, version: Snapshot | None, pool: Pool | None) -> _Wanted:
        empty = lambda size: self._batches.of_tiles([], size, version)  # noqa: E731
        return _Wanted(program=self._prefill, empty=empty, versions=_list(version), pool=pool)

    def _wanted_rows(self, versions: list[Snapshot], pool: Pool | None) -> _Wanted:
        steps = np.asarray(BLOCK_STEPS, np.int32)
        empty = lambda size: self._batches.of_rows([], size, versions) | {"steps": steps}  # noqa: E731
        return _Wanted(program=self._decode, empty=empty, versions=versions, pool=pool)

    def _choose(self, wanted: _Wanted, sizes: Sequence[int]) -> int | BaseException | None:
        size = self._best(wanted, sizes)
        key = self._key(wanted, size)
        if key not in self._compiled:
            future = self._compiling(wanted, size)
            if key in self._awaited:  # not whether it is done: it may be by now, and then is asked for next time
                return None
            if (error := future.exception()) is not None:
                return error
            self._compiled.add(key)
        return size

    def _best(self, wanted: _Wanted, sizes: Sequence[int]) -> int:
        best, largest = self._key(wanted, sizes[0]), self._key(wanted, sizes[-1])
        if self._background is None or best == largest or best in self._taken:
            return sizes[0]
        if best not in self._begun and largest not in self._awaited:
            program, arguments = wanted.program, self._arguments(wanted, sizes[0])
            if program.is_compiled(*arguments) or program.is_cached(*arguments):
                self._taken.add(best)
                return sizes[0]
            if largest in self._compiled:
                self._begin_in_background(program, best, arguments)
        self._taken.add(largest)
        return sizes[-1]

    def _compiling(self, wanted: _Wanted, size: int) -> Future[Any]:
        """Return the future of a compile; begin that unless it has begun, and its end has not been asked for."""
        key = self._key(wanted, size)
        future = self._awaited.pop(key, None)
        if future is None:
            future = wanted.program.begin(self._compilers, "first use", *self._arguments(wanted, size))
        if not future.done():
            self._awaited[key] = future
        return future

    def _begin_in_background(self, program: Program[Any, Any], key: object, arguments: tuple[Any, ...]) -> None:
        def compile_() -> None:
            # A batch that needs a program which cannot be compiled meets the same error, and reports it.
            with contextlib.suppress(Exception):
                program.compile("background", *arguments)
                self._taken.add(key)

        if self._background is not None:
            self._begun.add(key)
            self._background.submit(compile_)

    def _arguments(self, wanted: _Wanted, size: int) -> tuple[Any, ...]:
        """Return the arguments of a run over `size` empty tiles or rows.

        All but these are shapes: a run takes the pool, and a copy of the weights or an adapter may go before the
        compile ends.
        """
        shapes = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)  # noqa: E731
        loras = tuple(version.weights for version in wanted.versions)
        return *jax.tree.map(shapes, (self._weights.now, loras, wanted.pool)), self._batches.shapes(wanted.empty(size))

    def _key(self, wanted: _Wanted, size: int) -> object:
        versions, pool = wanted.versions, wanted.pool
        kind = replace(versions[0].spec, seed=0) if versions else None
        pages = [] if pool is None else [array.shape for array in pool.values()]
        return wanted.program.name, size, len(versions), kind, self._weights.bytes, *pages[:1]


class StepTimes:
    """What a decode step takes, by the rows of its program, and so how many steps a block runs."""

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}

    def steps(self, rows: int) -> int:
        """Return how many steps a block of `rows` rows may run."""
        known = self._step_s.get(rows)
        steps = FEWEST_STEPS if known is None else int(BLOCK_S / known)
        return min(max(steps, FEWEST_STEPS), BLOCK_STEPS)

    def note(self, rows: int, seconds: float, steps: int) -> None:
        """Learn from a block what a step takes: the least of late, for other work may have run before the block."""
        if steps:
            self._step_s[rows] = min(seconds / steps, 1.1 * self._step_s.get(rows, math.inf))


@dataclass(slots=True)
class Counts:
    """What has been sampled so far; `slots` are the rows of the decode blocks, empty ones included."""

    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    sampled_tokens: int = 0
    blocks: int = 0
    rows_run: int = 0
    slots: int = 0

    def note_block(self, rows: int, slots: int) -> None:
        """Count a decode block."""
        self.blocks += 1
        self.rows_run += rows
        self.slots += slots

    def described(self) -> dict[str, float]:
        """Return the counts by the names under which they are shown."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_computed": self.computed_prompt_tokens,
            "prompt_tokens_cached": self.cached_prompt_tokens,
            "sampled_tokens": self.sampled_tokens,
            "decode_blocks": self.blocks,
            "decode_rows": self.rows_run,
            "decode_slots": self.slots,
            "occupancy": self.rows_run / self.slots if self.slots else 0.0,
        }


@dataclass(frozen=True, slots=True)
class Block:
    """A decode block to run.

    Attributes:
        versions: the adapters of the program: none, one, or `MAX_VERSIONS`.
        size: rows per way of the program.
        rows: of each way, up to `size`.
    """

    versions: list[Snapshot]
    size: int
    rows: list[list[Row]]

    @property
    def all_rows(self) -> list[Row]:
        """Return the rows of all ways that have not ended."""
        return [row for members in self.rows for row in members if row.stop_reason is None]

    @property
    def count(self) -> int:
        """Rows of all ways, those that have ended since the block was made too."""
        return sum(map(len, self.rows))

    @property
    def wants_top(self) -> bool:
        """Whether a request asks for the likeliest tokens."""
        return any(row.job.request.topk_sample for members in self.rows for row in members)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flight:
    """A decode block that has been launched.

    Attributes:
        settings: of its rows, on the host.
        on_device: the settings, and the state that it leaves.
        out: what it draws.
        steps: the most that it runs.
    """

    block: Block
    settings: np.ndarray
    on_device: dict[str, jax.Array]
    out: dict[str, jax.Array]
    steps: int

    def take(self) -> tuple[int, int]:
        """Wait for the block and give its rows what it drew; return how many tokens, and the most of one row."""
        block, tops = self.block, {}
        host = unpack_drawn(fetch(self.out["drawn"]))
        if block.wants_top:
            tops = fetch({name: self.out[name] for name in ("top_ids", "top_logprobs")})
        # One that ended at a stop string is not done on the device in the block after that.
        live = [[row.stop_reason is None for row in members] for members in block.rows]
        extend(block.rows, host | tops)
        new = [host["new"][way, : len(of_way)][of_way] for way, of_way in enumerate(live)]
        return sum(int(each.sum()) for each in new), int(host["new"].max())


class Runnable:
    """Chooses the tiles and the rows that run next: those whose program is there.

    Args:
        sized: the programs.
        sizes: of them.
        ways: of the mesh that rows are split.
        fail: `f(schedule, rows, error)` fails the requests of rows whose program could not be compiled, or has another
            one compiled for them.
    """

    def __init__(
        self,
        sized: SizedPrograms,
        sizes: Sizes,
        ways: int,
        fail: Callable[[Schedule, list[Row], BaseException], None],
    ) -> None:
        self._sized = sized
        self._sizes = sizes
        self._ways = ways
        self._fail = fail

    def tiles(self, schedule: Schedule, pool: Pool | None) -> int:
        """Return how many of the schedule's tiles per way run next; 0 for none."""
        for _ in range(schedule.pending_versions):
            version = schedule.next_version()
            if decoding := sum(row.job.decodes for row in (*schedule.placed, *schedule.waiting)):
                fewest = min(-(-decoding // self._ways), self._sizes.rows[-1])
                self._sized.compile_decode_beside(version, pool, self._row_sizes(fewest))
            larger = schedule.pending_tiles() >= self._sizes.many_tiles
            tiles = self._sized.tiles(version, pool, self._sizes.tiles[larger:])
            if isinstance(tiles, int):
                return tiles
            if tiles is not None:
                rows = [row for row in schedule.placed if row.job.snapshot is version and not row.ready]
                self._fail(schedule, rows, tiles)
                return self.tiles(schedule, pool)
            schedule.pass_version_over()
        return 0

    def block(self, schedule: Schedule, pool: Pool | None) -> Block:
        """Return the schedule's next decode block; one without rows if there is none."""
        snapshots, chosen = schedule.next_rows()
        if not chosen:
            return Block([], 0, schedule.next_block([])[1])
        size = self._sized.rows(_padded(snapshots), pool, self._row_sizes(self._most(chosen)))
        if isinstance(size, BaseException):
            self._fail(schedule, chosen, size)
            return self.block(schedule, pool)
        if size is None:  # the rows of others

            def fits(versions: list[Snapshot], most: int) -> bool:
                return self._sized.rows_compiled(_padded(versions), pool, self._row_sizes(most)) is not None

            snapshots, chosen = schedule.next_rows(fits)
            size = self._sized.rows_compiled(_padded(snapshots), pool, self._row_sizes(self._most(chosen)))
        return Block(_padded(snapshots), size or 0, schedule.next_block(chosen)[1])

    def smaller_fits(self, block: Block) -> bool:
        """Whether a smaller program holds what is left of a block's rows."""
        return self._row_sizes(self._most(block.all_rows))[0] < block.size

    def _row_sizes(self, fewest: int) -> list[int]:
        return [rows for rows in self._sizes.rows if rows >= fewest]

    def _most(self, rows: list[Row]) -> int:
        return max(sum(row.way == way for row in rows) for way in range(self._ways))


def _padded(versions: list[Snapshot]) -> list[Snapshot]:
    """Return one adapter, or a fixed number of them: beyond those in use the first again, which no row uses so."""
    return versions if len(versions) < 2 else [*versions, *[versions[0]] * (MAX_VERSIONS - len(versions))]


def _list(version: T | None) -> list[T]:
    return [] if version is None else [version]
