"""How do sampling requests become batches on the device, and when does a row end?

Requests that wait for the same weights run together. Rows, prompt lengths and cache lengths come from short ladders;
max_tokens, temperature, top_k, top_p, seeds and stop sets are data, so none of them compiles anything.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine import memory
from jax_client.engine.adapters import Snapshot
from jax_client.engine.compiled import CompileRecord
from jax_client.engine.decode_programs import BLOCK_STEPS, TOPK_CHUNK, DecodePrograms
from jax_client.engine.dispatch import Task
from jax_client.engine.faults import named_error
from jax_client.engine.packing import ladder
from jax_client.engine.requests import GeneratedRow, GenerationRequest, GenerationResult, LossSpec, Sequence
from jax_client.engine.train_programs import NO_ADAPTER
from jax_client.engine.trainer import Trainer
from jax_client.models.attention import Attention
from jax_client.models.config import ModelConfig
from jax_client.sharding import put_rows, put_whole

MAX_ROWS = 64  # rows of one decode batch
STOP_IDS = 8
MIN_SLOTS = 256
CACHE_SHARE = 0.4  # of the memory that is free, for one batch's cache
Steps = Generator[Any, Any, Any]
Entry = tuple[GenerationRequest, Future[GenerationResult]]


class Sampler:
    """Runs sampling requests with the engine's weights, in batches, on the engine's dispatch thread."""

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        attention: Attention,
        log: list[CompileRecord],
        trainer: Trainer,
    ):
        self._params = params
        self._model = model
        self._dtype = dtype
        self._mesh = mesh
        self._trainer = trainer
        self._row_multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        self._programs = DecodePrograms(model, dtype, mesh, attention, log)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Snapshot | None, Entry]] = deque()

    def enqueue(self, snapshot: Snapshot | None, request: GenerationRequest) -> Future[GenerationResult]:
        """Add a request to those that the next `batch_task`s serve."""
        future: Future[GenerationResult] = Future()
        with self._lock:
            self._waiting.append((snapshot, (request, future)))
        return future

    def fail_waiting(self, error: Exception) -> None:
        """Fail every request that no batch has taken."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        for _, (_, future) in waiting:
            future.set_exception(error)

    def batch_task(self) -> Task[None]:
        """Serve the oldest waiting request together with others for the same weights; do nothing if none is left."""
        snapshot, entries = self._take_batch()
        if not entries:
            return
        weights = NO_ADAPTER if snapshot is None else snapshot.weights
        try:
            rows = yield from self._generate(weights, [request for request, _ in entries])
            for (request, future), row in zip(entries, rows, strict=True):
                result = yield from self._with_prompt_scores(weights, request, row)
                future.set_result(result)
        except BaseException as error:
            for _, future in entries:
                if not future.done():
                    future.set_exception(named_error(error))
            raise

    def _take_batch(self) -> tuple[Snapshot | None, list[Entry]]:
        with self._lock:
            if not self._waiting:
                return None, []
            snapshot = self._waiting[0][0]
            batch: list[Entry] = []
            left: deque[tuple[Snapshot | None, Entry]] = deque()
            rows = 0
            for owner, entry in self._waiting:
                more = entry[0].num_samples
                if owner is snapshot and (not batch or rows + more <= MAX_ROWS):
                    if entry[1].set_running_or_notify_cancel():
                        batch.append(entry)
                        rows += more
                else:
                    left.append((owner, entry))
            self._waiting = left
            return snapshot, batch

    def _generate(self, weights: Any, requests: list[GenerationRequest]) -> Steps:
        """Yield-from: return the rows of each request; a request with many samples runs in several batches."""
        results: list[list[GeneratedRow]] = [[] for _ in requests]
        todo = [(r, sample) for r, request in enumerate(requests) for sample in range(request.num_samples)]
        most = self._rows_that_fit(max(len(request.tokens_T) + request.max_tokens for request in requests))
        for first in range(0, len(todo), most):
            members = todo[first : first + most]
            rows = yield from self._decode_batch(weights, [(requests[r], sample) for r, sample in members])
            for (r, _), row in zip(members, rows, strict=True):
                results[r].append(row)
        return results

    def _rows_that_fit(self, tokens: int) -> int:
        """Return how many rows of this length one batch may have."""
        c = self._model
        row_bytes = 2 * c.n_layers * c.n_kv_heads * c.head_dim * self._dtype.itemsize * max(2 * tokens, MIN_SLOTS)
        free = memory.available_bytes(self._mesh.devices.flat[0]) * self._mesh.size
        return int(min(MAX_ROWS, max(1, CACHE_SHARE * free // row_bytes)))

    def _decode_batch(self, weights: Any, members: list[tuple[GenerationRequest, int]]) -> Steps:
        """Yield-from: run rows to their ends; the cache grows with the longest of them."""
        row = _initial_rows(members, ladder(len(members), self._row_multiple * 4))
        need = max(len(request.tokens_T) + request.max_tokens for request, _ in members)
        cache, slots = self._prefill(weights, members, len(row["token"]), need)
        row = {name: put_rows(array, self._mesh) for name, array in row.items()}
        rows = [_RowSoFar(request) for request, _ in members]
        longest = max(len(request.tokens_T) for request, _ in members)
        while True:
            if (longest := longest + BLOCK_STEPS) > slots:
                slots *= 2
                cache = self._programs.grow(cache, slots=slots)
            cache, row, drawn = self._programs.decode(self._params, weights, cache, row)
            state = {name: row[name] for name in ("count", "stopped", "done")}
            host, drawn = yield partial(jax.device_get, (state, drawn))
            yield partial(_extend, rows, host, drawn)
            if all(r.stop_reason for r in rows):
                return [r.result() for r in rows]
            done = host["done"].copy()
            done[: len(rows)] = [r.stop_reason is not None for r in rows]
            row["done"] = put_rows(done, self._mesh)

    def _prefill(self, weights: Any, members: list[tuple[GenerationRequest, int]], B: int, need: int) -> Any:
        """Return the rows' cache after their prompts, each distinct prompt computed once, and its slots per row."""
        prompts = list({request.tokens_T.tobytes(): request.tokens_T for request, _ in members}.values())
        index = {prompt.tobytes(): i for i, prompt in enumerate(prompts)}
        T = ladder(max(len(p) for p in prompts), 32)
        slots = MIN_SLOTS
        while slots < max(T, min(need, T + BLOCK_STEPS)):
            slots *= 2
        tokens_PT = np.zeros((ladder(len(prompts), self._row_multiple), T), np.int32)
        lengths_P, prompt_of_row_B = np.zeros(len(tokens_PT), np.int32), np.zeros(B, np.int32)
        for i, prompt in enumerate(prompts):
            tokens_PT[i, : len(prompt) - 1] = prompt[:-1]
            lengths_P[i] = len(prompt) - 1
        prompt_of_row_B[: len(members)] = [index[request.tokens_T.tobytes()] for request, _ in members]
        arrays = [put_rows(array, self._mesh) for array in (tokens_PT, lengths_P, prompt_of_row_B)]
        return self._programs.prefill(self._params, weights, *arrays, slots=slots), slots

    def _with_prompt_scores(self, weights: Any, request: GenerationRequest, rows: list[GeneratedRow]) -> Steps:
        prompt_T = request.tokens_T
        logprobs_T = ids_Tk = top_Tk = None
        if request.prompt_logprobs:
            logprobs_T = np.full(len(prompt_T), np.nan, np.float32)
            if len(prompt_T) > 1:
                ready: Future[Any] = Future()
                sequence = Sequence(tokens_T=prompt_T[:-1], targets=prompt_T[1:])
                loss = LossSpec(name="cross_entropy")
                ready.set_result(self._trainer.prepare([sequence], loss))
                scored = yield from self._trainer.score(weights, [sequence], loss, ready)
                logprobs_T[1:] = scored.logprobs[0]
        if k := request.topk_prompt:
            ids_Tk, top_Tk = np.zeros((len(prompt_T), k), np.int32), np.full((len(prompt_T), k), -99999.0, np.float32)
            padded_1T = np.zeros((1, ladder(len(prompt_T), TOPK_CHUNK)), np.int32)
            padded_1T[0, : len(prompt_T)] = prompt_T
            scores = self._programs.top_tokens(
                self._params,
                weights,
                put_whole(padded_1T, self._mesh),
                put_whole(np.int32(len(prompt_T)), self._mesh),
                k=k,
            )
            ids, top = yield partial(jax.device_get, scores)
            ids_Tk[1:], top_Tk[1:] = ids[: len(prompt_T) - 1], top[: len(prompt_T) - 1]
        return GenerationResult(rows=rows, prompt_logprobs_T=logprobs_T, topk_ids_Tk=ids_Tk, topk_logprobs_Tk=top_Tk)


def _initial_rows(members: list[tuple[GenerationRequest, int]], B: int) -> dict[str, np.ndarray]:
    """Return the decode state before the first step; rows beyond the members are done."""
    n = max(len(request.stop_ids) for request, _ in members)
    row = {
        "token": np.zeros(B, np.int32),
        "position": np.zeros(B, np.int32),
        "count": np.zeros(B, np.int32),
        "done": np.ones(B, bool),
        "stopped": np.zeros(B, bool),
        "max_tokens": np.zeros(B, np.int32),
        "temperature": np.ones(B, np.float32),
        "top_k": np.full(B, -1, np.int32),
        "top_p": np.ones(B, np.float32),
        "key": np.zeros((B, 2), np.uint32),
        "stop_ids": np.full((B, ladder(n, STOP_IDS)), -1, np.int32),
    }
    for i, (request, sample) in enumerate(members):
        row["token"][i] = request.tokens_T[-1]
        row["position"][i] = len(request.tokens_T) - 1
        row["done"][i] = False
        row["max_tokens"][i] = request.max_tokens
        row["temperature"][i] = request.temperature
        row["top_k"][i] = request.top_k
        row["top_p"][i] = request.top_p
        row["key"][i] = np.random.SeedSequence([request.seed & (2**64 - 1), sample]).generate_state(2)
        row["stop_ids"][i, : len(request.stop_ids)] = request.stop_ids
    return row


class _RowSoFar:
    """One row's output on the host, block by block."""

    def __init__(self, request: GenerationRequest):
        self.stop_reason: Literal["stop", "length"] | None = None
        self._find_stop = request.find_stop
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray, stopped: bool, done: bool) -> None:
        if self.stop_reason is not None:
            return
        self._tokens += tokens.tolist()
        self._logprobs += logprobs.tolist()
        keep = self._find_stop(self._tokens) if self._find_stop is not None else None
        if keep is not None:
            del self._tokens[keep:], self._logprobs[keep:]
        if done or keep is not None:
            self.stop_reason = "stop" if stopped or keep is not None else "length"

    def count(self) -> int:
        return len(self._tokens)

    def result(self) -> GeneratedRow:
        return GeneratedRow(
            tokens=np.array(self._tokens, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            stop_reason=self.stop_reason or "length",
        )


def _extend(rows: list[_RowSoFar], host: dict[str, np.ndarray], drawn: dict[str, np.ndarray]) -> None:
    for i, row in enumerate(rows):
        new = int(host["count"][i]) - row.count()
        row.extend(
            drawn["tokens"][i, :new], drawn["logprobs"][i, :new], bool(host["stopped"][i]), bool(host["done"][i])
        )
