"""How are sampling requests carried out? Continuous batching over a paged cache, on the engine's dispatch thread.

One task serves all requests, round by round: it places waiting rows, computes tiles of prompts, runs one block of
decode steps, and takes out the rows that stopped. Between the rounds the other lanes have their turn. Rows and tiles
come from short ladders; max_tokens, temperature, top_k, top_p, seeds and stop sets are data, so none of them compiles
anything.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core import memory
from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.device_errors import is_out_of_memory, named_error
from jax_client.engine.core.paged_check import choose_paged_attention
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.core.turns import Lane, Task, Unawaited
from jax_client.engine.sample.batches import Batches
from jax_client.engine.sample.pages import FEWEST_PAGES, PAGE, fitting_pages, most_pages
from jax_client.engine.sample.programs import BLOCK_STEPS, Pool, SamplePrograms
from jax_client.engine.sample.rows import Job, Row, extend, take_scores
from jax_client.engine.sample.schedule import MAX_VERSIONS, Schedule
from jax_client.engine.sample.sized import SizedPrograms
from jax_client.engine.sample.weights import DecodeWeights, sampling_params
from jax_client.errors import RequestFailedError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params
from jax_client.models.parts.attention import Attention
from jax_client.threads import Workers

MAX_WAITING = 65_536  # rows
PREFILL_TOKENS = 2048  # of prompts, at most, between two decode blocks
LINGER_S = 0.003
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


@dataclass(slots=True)
class Counts:
    """What the loop has done so far, for `describe`; `slots` are the rows of the decode blocks, empty ones included."""

    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    sampled_tokens: int = 0
    blocks: int = 0
    rows_run: int = 0
    slots: int = 0


class SamplingLoop:
    """Runs sampling requests with the engine's weights.

    Attributes:
        lane: where `serve` runs; the owners of its rows share its turns. And `attention`, that over the cache.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        attention: Attention,
        log: list[CompileRecord],
        memory_fraction: float,
        background: Workers | None = None,
    ):
        self.lane = Lane(sampling=True)
        self._weights = DecodeWeights(sampling_params(params), model, dtype, mesh, log)
        self._model = model
        self._mesh = mesh
        self._sizes = sizes_on(mesh.devices.flat[0].platform)
        self._batches = Batches.of(mesh, model.max_context)
        self._memory_fraction = memory_fraction
        self.attention = choose_paged_attention(mesh, model, dtype)
        self._programs = SamplePrograms(model, dtype, mesh, attention, log, self.attention)
        self._sized = SizedPrograms(self._programs, self._batches, self._weights, background)
        self._most_pages = most_pages(model.max_context, self._sizes.rows[-1] * self._sizes.tokens_per_row)
        self._pool: Pool | None = None
        self._schedule: Schedule | None = None
        self._lock = threading.Lock()
        self._inbox, self._returned = deque[Job](), deque[Row]()  # the latter are rows that wait for a cache
        self._waiting_rows = 0
        self._serving = self._any_cancelled = False  # the latter since the schedule forgot cancelled rows
        self._step_s: dict[int, float] = {}  # of a decode step, by rows
        self.counts = Counts()

    def enqueue(self, snapshot: Snapshot | None, request: GenerationRequest) -> tuple[Future[GenerationResult], bool]:
        """Add a request; return the future of its answer, and whether a new `serve` task is needed for it.

        Raises:
            RequestFailedError: too many rows wait already.
        """
        job = Job(request, snapshot)
        with self._lock:
            if self._waiting_rows + job.left > MAX_WAITING and self._waiting_rows:
                raise RequestFailedError(
                    f"sample: {self._waiting_rows} samples wait already, and {job.left} more would pass the limit of "
                    f"{MAX_WAITING}. Wait for some answers, then send this request again.",
                    category="user",
                )
            self._waiting_rows += job.left
            self._inbox.append(job)
            self.lane.expect(job.owner)
            start, self._serving = not self._serving, True
        job.future.add_done_callback(partial(self._left, job.left))
        return job.future, start

    def fail_waiting(self, error: BaseException) -> None:
        """Fail every request that has no answer yet."""
        with self._lock:
            jobs = set(self._inbox)
            self._inbox.clear()
        self._weights.drop()
        schedule, returned = self._schedule, self._returned
        self._pool = self._schedule = None
        self._returned = deque()
        rows = [] if schedule is None else [*schedule.placed, *schedule.waiting]
        for job in jobs | {row.job for row in (*rows, *returned)}:
            _fail(job, error)

    def serve(self) -> Task[None]:
        """Serve requests until none is left."""
        while True:
            try:
                yield from self._round()
            except Exception as error:
                self._weights.drop(for_good=is_out_of_memory(error))
                self._fail_placed(named_error(error))
            with self._lock:
                schedule = self._schedule
                busy = schedule is not None and (schedule.placed or schedule.waiting)
                if not (busy or self._inbox or self._returned):
                    self._end()
                    return

    def stopped(self, serving: Future[None]) -> None:
        """Fail waiting requests if a `serve` task failed, as when its thread died; the next request may start one."""
        if not serving.cancelled() and (error := serving.exception()) is not None:
            with self._lock:
                self._end()
            self.fail_waiting(error)

    def drop_rows(self) -> None:
        """Forget every request, unanswered, and free the cache; only when no `serve` task runs any more."""
        with self._lock:
            self._inbox.clear()
        self._returned.clear()
        self._pool = self._schedule = None

    def free_weights(self) -> None:
        """Drop the references to the base weights; nothing can be sampled any more."""
        self._weights.free()

    def release_cache(self) -> bool:
        """Free the cache, and a copy of the weights beside it; running rows wait, and resume with their drawn tokens.

        To be called on the dispatch thread. Programs in flight finish first.

        Returns:
            Whether a cache was freed.
        """
        if (schedule := self._schedule) is None:
            return False
        self._returned = deque([*schedule.placed, *schedule.waiting])
        self._pool = self._schedule = None
        self._weights.drop()
        return True

    def describe(self) -> dict[str, float]:
        """Return the sizes of the cache and of a copy of the weights, and what has been sampled."""
        counts, schedule = self.counts, self._schedule
        pages = 0 if schedule is None else len(schedule.pages) * schedule.pages[0].count
        return {
            "cache_tokens": pages * PAGE,
            "cache_bytes": pages * self._programs.page_bytes(),
            "decode_weights_bytes": self._weights.bytes * self._mesh.size,
            "pages_used": 0 if schedule is None else sum(way.used for way in schedule.pages),
            "rows_running": 0 if schedule is None else len(schedule.placed),
            "rows_waiting": self._waiting_rows,
            "prompt_tokens": counts.prompt_tokens,
            "prompt_tokens_computed": counts.computed_prompt_tokens,
            "prompt_tokens_cached": counts.cached_prompt_tokens,
            "sampled_tokens": counts.sampled_tokens,
            "decode_blocks": counts.blocks,
            "decode_rows": counts.rows_run,
            "decode_slots": counts.slots,
            "occupancy": counts.rows_run / counts.slots if counts.slots else 0.0,
        }

    def _end(self) -> None:
        """With the lock held: let the next request start a `serve` task, in a lane of its owner alone."""
        self._serving = False
        self.lane.shares, self.lane.due = {}, ()

    def _left(self, rows: int, done: Future[GenerationResult]) -> None:
        with self._lock:
            self._waiting_rows -= rows
            self._any_cancelled |= done.cancelled()

    def _forget_cancelled(self, schedule: Schedule) -> None:
        if self._any_cancelled:
            self._any_cancelled = False
            schedule.forget_cancelled()

    def _fail_placed(self, error: BaseException) -> None:
        """Fail the requests of a failed program, or all if it had none; the cache may be gone with it."""
        schedule = self._schedule
        if schedule is None or not schedule.placed:
            self.fail_waiting(error)
            return
        placed = {row.job for row in schedule.placed}
        self._returned = deque(row for row in schedule.waiting if row.job not in placed)
        self._pool = self._schedule = None
        for job in placed:
            _fail(job, error)

    def _round(self) -> Task[None]:
        """Yield-from: place, prefill, decode one block, and take out what stopped."""
        schedule = self._open()
        yield from self._run(schedule)
        self._finish(schedule)

    def _finish(self, schedule: Schedule) -> None:
        """Take out the rows that stopped, and those that only scored."""
        for row in [row for row in schedule.placed if row.stop_reason or (row.ready and not row.job.rows)]:
            if schedule is self._schedule:
                schedule.finish(row)
            elif row in self._returned:  # the cache went while it ran
                self._returned.remove(row)
                row.job.finish(row)
            if not row.job.left:
                self.counts.cached_prompt_tokens += row.job.cached_tokens or 0

    def _run(self, schedule: Schedule) -> Task[None]:
        spent, decoding = 0, any(row.ready and row.job.rows for row in schedule.placed)
        while True:
            # Requests of one round of a user's loop come one by one, a little apart; a block takes much longer.
            while self._receive(schedule) and schedule.has_room():
                yield partial(time.sleep, LINGER_S)
                if schedule is not self._schedule:
                    return
            self._forget_cancelled(schedule)
            schedule.place()
            before = spent
            while (pending := schedule.pending_tiles()) and not (decoding and spent >= PREFILL_TOKENS):
                larger = pending >= self._sizes.many_tiles
                tiles = self._sized.tiles(schedule.next_version(), self._pool, self._sizes.tiles[larger:])
                spent += tiles * PAGE
                yield from self._prefill(schedule, tiles)
                if schedule is not self._schedule:
                    return
                self._forget_cancelled(schedule)
            if spent == before or not schedule.has_room() or (decoding and spent >= PREFILL_TOKENS):
                break
            # Requests that came while these prompts were computed should not wait for a whole block.
            yield partial(jax.block_until_ready, self._pool)
            if schedule is not self._schedule:
                return
            if not self._inbox:
                break
        self._finish(schedule)  # before a block, whose rows may need their pages
        snapshots, rows = schedule.next_block()
        if any(rows):
            yield from self._decode(schedule, snapshots, rows)
        else:
            # The rows wait for pages: the other lanes have their turn.
            yield Unawaited(None, partial(jax.block_until_ready, self._pool))

    def _receive(self, schedule: Schedule) -> bool:
        """Take what was sent since the last time into the schedule; return whether a request was."""
        with self._lock:
            jobs = list(self._inbox)
            self._inbox.clear()
        for job in jobs:
            if not job.future.cancelled() and not _refused(job, schedule):
                schedule.add(job)
                self.counts.prompt_tokens += len(job.request.tokens_T)
        return bool(jobs)

    def _open(self) -> Schedule:
        """Return the schedule; make the pool if there is none, or a larger one if this one is idle and small."""
        pages_now = 0
        if (schedule := self._schedule) is not None:
            pages_now = schedule.pages[0].count - 2
            if schedule.placed or schedule.waiting or pages_now >= self._most_pages:
                return schedule
        pages = self._fitting_pages(pages_now)
        if schedule is not None and pages <= pages_now:
            return schedule
        self._pool = self._schedule = None
        while True:
            try:
                self._pool = jax.block_until_ready(self._programs.new_pool(self._batches.ways, pages + 2))
                break
            except Exception as error:
                if not is_out_of_memory(error) or pages <= FEWEST_PAGES:
                    raise
                pages //= 2
        self._weights.choose(memory.available_bytes(self._mesh.devices.flat[0], self._memory_fraction))
        self._schedule = schedule = Schedule(
            ways=self._batches.ways, pages=pages + 2, rows=self._sizes.rows[-1], steps=BLOCK_STEPS
        )
        returned, self._returned = self._returned, deque()
        refused = {row.job for row in returned if _refused(row.job, schedule)}
        schedule.waiting.extend(row for row in returned if row.job not in refused)
        self._any_cancelled = True  # some of these may have been
        return schedule

    def _fitting_pages(self, pages_now: int) -> int:
        """Return how many pages a way's pool may have; `pages_now` is what it has."""
        page_bytes = self._programs.page_bytes() // self._mesh.shape["tensor"]
        free = memory.available_bytes(self._mesh.devices.flat[0], self._memory_fraction) + pages_now * page_bytes
        return fitting_pages(self._most_pages, page_bytes, free)

    def cache_bytes(self) -> int:
        """Return the bytes of a device that the cache will take, from what is free now; for before there is one."""
        return self._fitting_pages(0) * self._programs.page_bytes() // self._mesh.shape["tensor"]

    def _prefill(self, schedule: Schedule, size: int) -> Task[None]:
        """Yield-from: compute tiles of one version; wait for their scores and draws if any were asked for."""
        if decoding := sum(row.job.decodes for row in (*schedule.placed, *schedule.waiting)):
            fewest = min(-(-decoding // self._batches.ways), self._sizes.rows[-1])
            sizes = [rows for rows in self._sizes.rows if rows >= fewest]
            self._sized.compile_decode_beside(schedule.next_version(), self._pool, sizes)
        snapshot, tiles = schedule.next_tiles(size)
        loras = () if snapshot is None else (snapshot.weights,)
        batch = self._batches.put(self._batches.of_tiles(tiles, size, snapshot))
        self._share(schedule, [tile.row for way in tiles for tile in way])
        self._pool, scores = self._programs.prefill(self._weights.now, loras, self._take_pool(), batch)
        for tile in (tile for way in tiles for tile in way):
            tile.launched = True
            self.counts.computed_prompt_tokens += tile.stop - tile.start
        if not any(tile.scores or tile.draws for way in tiles for tile in way):
            if len(self.lane.shares) > 1:  # the next program may be paid by others
                yield partial(jax.block_until_ready, self._pool)
            return
        host = yield partial(jax.device_get, scores)
        self.counts.sampled_tokens += sum(tile.draws for way in tiles for tile in way)
        yield partial(take_scores, tiles, host)

    def _decode(self, schedule: Schedule, snapshots: list[Snapshot], rows: list[list[Row]]) -> Task[None]:
        """Yield-from: run one block of steps for rows of each way."""
        # One adapter, or a fixed number of them: those beyond the ones in use are the first again, which no row uses.
        versions = snapshots if len(snapshots) < 2 else [*snapshots, *[snapshots[0]] * (MAX_VERSIONS - len(snapshots))]
        R = self._sized.rows(versions, self._pool, [n for n in self._sizes.rows if n >= max(map(len, rows))])
        loras = tuple(snapshot.weights for snapshot in versions)
        batch = self._batches.put(self._batches.of_rows(rows, R, versions) | {"steps": self._steps(R)})
        self._share(schedule, [row for way in rows for row in way])
        self._pool, out = self._programs.decode(self._weights.now, loras, self._take_pool(), batch)
        for row in (row for way in rows for row in way):
            schedule.copied(row)
        counts = self.counts
        counts.blocks += 1
        counts.rows_run += sum(map(len, rows))
        counts.slots += self._batches.ways * R
        launched = time.perf_counter()
        host = yield partial(jax.device_get, out)
        counts.sampled_tokens += int(host["new"].sum())
        self._note_time(R, time.perf_counter() - launched, int(host["new"].max()))
        yield partial(extend, rows, host)

    def _share(self, schedule: Schedule, rows: Sequence[Row]) -> None:
        """Have the owners of rows pay for the turn; name those of all others, and whom the next turn can serve."""
        with self._lock:
            came = {job.owner for job in self._inbox}
            self.lane.shares = dict.fromkeys(came, 0.0) | schedule.shares(rows)
            self.lane.due = came | {row.owner for row in schedule.placed}

    def _steps(self, rows: int) -> np.ndarray:
        """Return how many steps a block of `rows` rows may run."""
        known = self._step_s.get(rows)
        steps = FEWEST_STEPS if known is None else int(BLOCK_S / known)
        return np.asarray(min(max(steps, FEWEST_STEPS), BLOCK_STEPS), np.int32)

    def _note_time(self, rows: int, seconds: float, steps: int) -> None:
        """Learn from a block what a step takes: the least of late, for other work may have run before the block."""
        if steps:
            self._step_s[rows] = min(seconds / steps, 1.1 * self._step_s.get(rows, math.inf))

    def _take_pool(self) -> Pool:
        """Return the pool for a program that takes its memory over; it is gone if that fails."""
        pool, self._pool = self._pool, None
        if pool is None:
            raise RequestFailedError("the key/value cache is gone; this should not happen.", category="server")
        return pool


def _fail(job: Job, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled, or answered
        job.future.set_exception(error)


def _refused(job: Job, schedule: Schedule) -> bool:
    """Fail a request that has no room even alone; return whether it was failed."""
    tokens = job.request.stored_tokens
    if tokens <= schedule.capacity:
        return False
    error = RequestFailedError(
        f"sample: prompt and max_tokens are {tokens} tokens together, but the memory that is left holds "
        f"{schedule.capacity}. Lower max_tokens, close other clients, or raise EngineConfig.memory_fraction.",
        category="user",
    )
    _fail(job, error)
    return True
