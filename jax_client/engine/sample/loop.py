"""How are sampling requests carried out? Continuous batching over a paged cache, on the engine's dispatch thread.

One task serves all requests, round by round: it places waiting rows, computes tiles of prompts, runs one block of
decode steps, and takes out the rows that stopped. Between the rounds the other lanes have their turn. Rows and tiles
come from short ladders; max_tokens, temperature, top_k, top_p, seeds and stop sets are data, so none of them compiles
anything. Where an adapter's programs are still compiled, the rows of others continue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core import memory
from jax_client.engine.core.adapters import Snapshot, Weights, abstract_weights
from jax_client.engine.core.paged_check import choose_paged_attention
from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.core.turns import Elsewhere, Lane, Task, Unawaited, ring
from jax_client.engine.devices.arrays import fetch
from jax_client.engine.devices.device_errors import is_out_of_memory, named_error
from jax_client.engine.sample.batches import Batches, HostBatch
from jax_client.engine.sample.cache_size import FEWEST_PAGES, CacheSize
from jax_client.engine.sample.device.pool import Pool
from jax_client.engine.sample.device.programs import BLOCK_STEPS, SamplePrograms
from jax_client.engine.sample.device.weights import DecodeWeights, sampling_params
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.rows import Job, Row, take_scores
from jax_client.engine.sample.schedule import Schedule
from jax_client.engine.sample.sized import Block, Counts, Flight, Runnable, SizedPrograms, StepTimes, sizes_on
from jax_client.errors import RequestFailedError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params
from jax_client.models.parts.attention import Attention
from jax_client.threads import Workers
from jax_client.values import LoraSpec

MAX_WAITING = 65_536  # rows
PREFILL_TOKENS = 2048  # of prompts, at most, between two decode blocks
LINGER_S = 0.003


class SamplingLoop:
    """Runs sampling requests with the engine's weights.

    Attributes:
        lane: where `serve` runs; the owners of its rows share its turns.
        attention: over the cache.
        programs: that it launches.
        is_loss: `f(error) -> whether` another host of the mesh is lost.
        launches_ahead: whether a block may be launched before the one before it has been looked at. A CPU gains nothing
            by that: a block takes all of it, for longer.
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
        *,
        compilers: Workers,
        background: Workers | None = None,
    ):
        self.lane = Lane(sampling=True)
        self._weights = DecodeWeights(sampling_params(params, model), model, dtype, mesh, log)
        self._compilers = compilers
        self._model = model
        self._mesh = mesh
        self._sizes = sizes_on(mesh.devices.flat[0].platform)
        self._batches = Batches.of(mesh, model)
        self._memory_fraction = memory_fraction
        self.attention = choose_paged_attention(mesh, model, dtype)
        self._programs = SamplePrograms(model, dtype, mesh, attention, log, self.attention)
        self.programs = self._programs.prefill, self._programs.decode, self._weights.gather
        self._sized = SizedPrograms(self._programs, self._batches, self._weights, compilers, background)
        self._runnable = Runnable(self._sized, self._sizes, self._batches.ways, self._fail_rows)
        per_row, tensor = self._sizes.tokens_per_row, mesh.shape["tensor"]
        self._cache = CacheSize.of(model, dtype, tensor, self._sizes.rows[-1], per_row, self._free_bytes())
        self._pool: Pool | None = None
        self._schedule: Schedule | None = None
        self._lock = threading.Lock()
        self._inbox, self._returned = deque[Job](), deque[Row]()  # the latter are rows that wait for a cache
        self._waiting_rows = 0
        self._serving = self._any_cancelled = False  # the latter since the schedule forgot cancelled rows
        self._news: Future[None] = Future()  # done once there is something that a waiting round does not know
        self._times = StepTimes()
        self._counts: dict[int, jax.Array] = {}  # of steps, on the device
        self.launches_ahead = mesh.devices.flat[0].platform != "cpu"
        self.counts = Counts()
        self.is_loss: Callable[[BaseException], bool] = lambda _: False

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
        ring(self._news)
        job.future.add_done_callback(partial(self._left, job.left))
        return job.future, start

    def fail_waiting(self, error: BaseException) -> None:
        """Fail every request that has no answer yet."""
        with self._lock:
            jobs = set(self._inbox)
            self._inbox.clear()
        self._weights.drop()
        schedule, returned, self._returned = self._schedule, self._returned, deque()
        self._pool = self._schedule = None
        rows = [] if schedule is None else [*schedule.placed, *schedule.waiting]
        for job in jobs | {row.job for row in (*rows, *returned)}:
            job.fail(error)

    def serve(self) -> Task[None]:
        """Serve requests until none is left."""
        while True:
            try:
                yield from self._round()
            except Exception as error:
                if self.is_loss(error):
                    yield Elsewhere(Future())  # for ever: the engine fails all requests
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

    def warm(self, spec: LoraSpec) -> Task[None]:
        """Compile what sampling from an adapter of this configuration will need."""
        yield from self._ready_to_open()
        if self._schedule is None:
            self._open()
        weights = cast(Weights, abstract_weights(self._model, spec, self._mesh))
        version = Snapshot(spec=spec, weights=weights, step=0)
        begun = deque(self._sized.begin_all(version, self._pool, self._sizes, "warmup"))
        while begun:
            yield Elsewhere(begun.popleft())  # an error would keep this frame, and this frame its future

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
        self._returned.extend([*schedule.placed, *schedule.waiting])  # after those of a cache that went just before
        self._pool = self._schedule = None
        self._weights.drop()
        return True

    def describe(self) -> dict[str, float]:
        """Return the sizes of the cache and of a copy of the weights, and what has been sampled."""
        schedule = self._schedule
        return {
            **self._cache.described([] if schedule is None else schedule.pages, self._mesh.shape["tensor"]),
            "decode_weights_bytes": self._weights.bytes * self._mesh.size,
            "rows_running": 0 if schedule is None else len(schedule.placed),
            "rows_waiting": self._waiting_rows,
            **self.counts.described(),
        }

    def _end(self) -> None:
        """With the lock held: let the next request start a `serve` task, in a lane of its owner alone."""
        self._serving = False
        self.lane.shares, self.lane.due = {}, ()

    def _left(self, rows: int, done: Future[GenerationResult]) -> None:
        with self._lock:
            self._waiting_rows -= rows
            self._any_cancelled |= done.cancelled()
        if done.cancelled():
            ring(self._news)

    def _forget_cancelled(self, schedule: Schedule) -> None:
        if self._any_cancelled:
            self._any_cancelled = False
            schedule.forget_ended()

    def _fail_placed(self, error: BaseException) -> None:
        """Fail the requests of a failed program, or all if it had none; the cache may be gone with it."""
        schedule = self._schedule
        if schedule is None or not schedule.placed:
            self.fail_waiting(error)
            return
        placed = {row.job for row in schedule.placed}
        self._returned.extend(row for row in schedule.waiting if row.job not in placed)
        self._pool = self._schedule = None
        for job in placed:
            job.fail(error)

    def _round(self) -> Task[None]:
        """Yield-from: place, prefill, decode one block, and take out what stopped."""
        yield from self._ready_to_open()
        schedule = self._open()
        returned, self._returned = self._returned, deque()
        schedule.waiting.extend(row for row in returned if not row.job.refused_beyond(schedule.capacity))
        if returned:
            self._any_cancelled = True  # some of these may have been
        yield from self._run(schedule)
        self._finish(schedule)

    def _finish(self, schedule: Schedule) -> None:
        """Take out the rows that stopped, and those that only scored."""
        for row in [row for row in schedule.placed if row.stop_reason or (row.ready and not row.job.rows)]:
            if schedule is self._schedule:
                schedule.finish(row)
            elif row not in self._returned:  # it was taken out before
                continue
            else:  # the cache went while it ran
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
            while not (decoding and spent >= PREFILL_TOKENS) and (tiles := self._runnable.tiles(schedule, self._pool)):
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
        block = self._runnable.block(schedule, self._pool)
        if any(block.rows):
            yield from self._decode(schedule, block)
        elif not spent and self._sized.awaited() and (schedule.placed or schedule.waiting):
            yield Elsewhere(self._news_or_compiled())
        else:
            # The rows wait for pages: the other lanes have their turn.
            yield Unawaited(None, partial(jax.block_until_ready, self._pool))

    def _fail_rows(self, schedule: Schedule, rows: Sequence[Row], error: BaseException) -> None:
        """Fail the requests of rows whose program cannot be compiled; those of others continue."""
        if is_out_of_memory(error) and self._weights.bytes:
            self._weights.drop(for_good=True)  # the program without the copy may fit, and is compiled next
            return
        for job in {row.job for row in rows}:
            job.fail(named_error(error))
        schedule.forget_ended()

    def _news_or_compiled(self) -> Future[None]:
        """Return a future that is done at the next request or cancellation, or when one of the compiles has ended."""
        awaited, news = self._sized.awaited(), Future[None]()
        with self._lock:
            self._news = news
            if self._inbox or self._any_cancelled or not awaited:
                ring(news)
        for compile_ in awaited:
            compile_.add_done_callback(lambda _: ring(news))
        return news

    def _receive(self, schedule: Schedule) -> bool:
        """Take what was sent since the last time into the schedule; return whether a request was."""
        with self._lock:
            jobs = list(self._inbox)
            self._inbox.clear()
        for job in jobs:
            if not job.future.cancelled() and not job.refused_beyond(schedule.capacity):
                schedule.add(job)
                self.counts.prompt_tokens += len(job.request.tokens_T)
        return bool(jobs)

    def _open(self) -> Schedule:
        """Return the schedule; make the pool if there is none, or a larger one if this one is idle and small."""
        pages_now = 0
        if (schedule := self._schedule) is not None:
            pages_now = schedule.pages[0].count - 2
            if schedule.placed or schedule.waiting or pages_now >= self._cache.most_pages:
                return schedule
        pages = self._fitting_pages(pages_now)
        if schedule is not None and pages <= pages_now:
            return schedule
        self._pool = self._schedule = None
        while True:
            of_way = {"pages": pages + 2, "states": self._cache.states}
            try:
                self._pool = jax.block_until_ready(self._programs.pools.new(self._batches.ways, **of_way))
                break
            except Exception as error:
                if not is_out_of_memory(error) or pages <= FEWEST_PAGES:
                    raise
                pages //= 2
        self._weights.choose(self._free_bytes())
        schedule = Schedule(ways=self._batches.ways, rows=self._sizes.rows[-1], steps=BLOCK_STEPS, **of_way)
        self._schedule = schedule
        return schedule

    def _ready_to_open(self) -> Task[None]:
        if self._schedule is None:
            yield from self._weights.compiled(self._free_bytes(), self._compilers)

    def _fitting_pages(self, pages_now: int) -> int:
        """Return how many pages a way's pool may have; `pages_now` is what it has."""
        return self._cache.pages(self._free_bytes() + (self._cache.bytes(pages_now) if pages_now else 0))

    def _free_bytes(self) -> int:
        return memory.free_bytes(self._mesh, self._memory_fraction)

    def cache_bytes(self) -> int:
        """Return the bytes of a device that the cache will take, from what is free now; for before there is one."""
        return self._cache.bytes(self._fitting_pages(0))

    def _prefill(self, schedule: Schedule, size: int) -> Task[None]:
        """Yield-from: compute tiles of one version; wait for their scores and draws if any were asked for."""
        snapshot, tiles = schedule.next_tiles(size)
        loras = () if snapshot is None else (snapshot.weights,)
        batch = self._batches.put(self._batches.of_tiles(tiles, size, snapshot))
        self._share(schedule, [tile.row for way in tiles for tile in way])
        self._pool, scores = self._programs.prefill(self._weights.now, loras, self._take_pool(), batch)
        for tile in (tile for way in tiles for tile in way):
            schedule.launched(tile)
            self.counts.computed_prompt_tokens += tile.stop - tile.start
        if not any(tile.scores or tile.draws for way in tiles for tile in way):
            if len(self.lane.shares) > 1:  # the next program may be paid by others
                yield partial(jax.block_until_ready, self._pool)
            return
        host = yield partial(fetch, scores)
        self.counts.sampled_tokens += sum(tile.draws for way in tiles for tile in way)
        yield partial(take_scores, tiles, host)

    def _decode(self, schedule: Schedule, block: Block) -> Task[None]:
        """Yield-from: run a block of steps for rows of each way, and those after it that can be launched ahead."""
        on_host = self._batches.of_rows(block.rows, block.size, block.versions)
        flight = self._launch(schedule, block, on_host, on_host, self._times.steps(block.size))
        for row in block.all_rows:
            schedule.copied(row)
        since = time.perf_counter()
        while flight is not None:
            ahead = self._launch_ahead(schedule, flight)
            drawn, steps = yield flight.take
            now = time.perf_counter()
            self.counts.sampled_tokens += drawn
            self._times.note(block.size, now - since, steps)
            flight, since = ahead, now
            if flight is not None:
                self._finish(schedule)

    def _launch(
        self, schedule: Schedule, block: Block, on_host: HostBatch, arrays: Mapping[str, Any], steps: int
    ) -> Flight:
        """Launch a decode block; `arrays` are its settings and state, on the host or on the device."""
        loras = tuple(version.weights for version in block.versions)
        if (count := self._counts.get(steps)) is None:
            count = self._counts[steps] = self._batches.put({"steps": np.asarray(steps, np.int32)})["steps"]
        batch = self._batches.put({**arrays, "steps": count})
        rows = block.all_rows
        if arrays is on_host or len(rows) < block.count:  # else they share as they did
            self._share(schedule, rows)
        self._pool, out, state = self._programs.decode(self._weights.now, loras, self._take_pool(), batch)
        self.counts.note_block(len(rows), self._batches.ways * block.size)
        on_device = {"settings": batch["settings"], "state": state}
        return Flight(block=block, settings=on_host["settings"], on_device=on_device, out=out, steps=steps)

    def _launch_ahead(self, schedule: Schedule, flight: Flight) -> Flight | None:
        """Launch the block after one that runs from the state that this leaves on the device, if no one else waits."""
        known = schedule is self._schedule and not (self._inbox or self._any_cancelled)
        if not (known and self.launches_ahead and self.lane.alone) or self._runnable.smaller_fits(flight.block):
            return None
        # Half as long: who comes meanwhile waits for two of them.
        steps = min(self._times.steps(flight.block.size), BLOCK_STEPS // 2)
        taken = schedule.take_ahead(flight.block.rows, flight.steps, steps)
        if taken is None:
            return None
        settings, arrays = flight.settings, flight.on_device
        if taken or len(flight.block.all_rows) < flight.block.count:
            settings = self._batches.with_new_pages(settings, flight.block.rows, taken)
            arrays = arrays | {"settings": settings}
        return self._launch(schedule, flight.block, {"settings": settings}, arrays, steps)

    def _share(self, schedule: Schedule, rows: Sequence[Row]) -> None:
        """Have the owners of rows pay for the turn; name those of all others, and whom the next turn can serve."""
        with self._lock:
            came = {job.owner for job in self._inbox}
            self.lane.shares = dict.fromkeys(came, 0.0) | schedule.shares(rows)
            self.lane.due = came | {row.owner for row in schedule.placed}

    def _take_pool(self) -> Pool:
        """Return the pool for a program that takes its memory over; it is gone if that fails."""
        pool, self._pool = self._pool, None
        if pool is None:
            raise RequestFailedError("the key/value cache is gone; this should not happen.", category="server")
        return pool
