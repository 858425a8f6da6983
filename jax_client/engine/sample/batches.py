"""Which arrays does a sampling program take for a batch of tiles or rows?

Arrays have a leading axis W, the ways that a mesh splits rows. `SamplePrograms` describes each by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.requests import MAX_TARGETS
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.programs import SCORE_CHUNK
from jax_client.engine.sample.rows import Row, Tile
from jax_client.models.kernels.paged import BLOCK
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.sharding import put_rows, put_whole, shape_of_rows, shape_of_whole

STOP_IDS = 64
WHOLE = ("wanted", "steps")  # what every way sees
HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Builds the batches of one model on one mesh.

    Attributes:
        ways: W.
        table_width: entries of a row's page table.
    """

    mesh: Mesh
    ways: int
    table_width: int

    @classmethod
    def of(cls, mesh: Mesh, max_context: int) -> Batches:
        """Return the builder for sequences of up to `max_context` tokens."""
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        return cls(mesh=mesh, ways=ways, table_width=-(-max_context // (PAGE * BLOCK)) * BLOCK)

    def of_tiles(self, tiles: list[list[Tile]], size: int, snapshot: Snapshot | None) -> HostBatch:
        """Return the batch of a prefill of up to `size` tiles per way, all with one adapter's weights."""
        W, t, N = self.ways, size, size * PAGE
        batch = {
            "tokens": np.zeros((W, t, PAGE), np.int32),
            "start": np.full((W, t), -1, np.int32),
            "page": np.zeros((W, t), np.int32),
            "table": np.zeros((W, t, self.table_width), np.int32),
            "scale": np.zeros((W, t, 0 if snapshot is None else 1), np.float32),
            "targets": np.zeros((W, N, MAX_TARGETS), np.int32),
            "key": np.zeros((W, N, 2), np.uint32),
            "temperature": np.ones((W, N), np.float32),
            "top_k": np.full((W, N), -1, np.int32),
            "top_p": np.ones((W, N), np.float32),
            "wanted": np.zeros((N // SCORE_CHUNK, 3), np.int32),
        }
        for way, placed in enumerate(tiles):
            for i, tile in enumerate(placed):
                tokens_S = tile.row.tokens(tile.start, tile.stop)
                batch["tokens"][way, i, : len(tokens_S)] = tokens_S
                batch["start"][way, i], batch["page"][way, i] = tile.start, tile.page
                batch["table"][way, i, : len(tile.table)] = tile.table
                batch["scale"][way, i] = _scale(snapshot)
                _add_scores(batch, way, i, tile)
                _add_draw(batch, way, i, tile)
        return batch

    def of_rows(self, rows: list[list[Row]], size: int, versions: list[Snapshot]) -> HostBatch:
        """Return the batch of a decode block of up to `size` rows per way, each with one of the versions' weights."""
        W, R = self.ways, size
        batch = {
            "token": np.zeros((W, R), np.int32),
            "position": np.zeros((W, R), np.int32),
            "count": np.zeros((W, R), np.int32),
            "done": np.ones((W, R), bool),
            "max_tokens": np.zeros((W, R), np.int32),
            "temperature": np.ones((W, R), np.float32),
            "top_k": np.full((W, R), -1, np.int32),
            "top_p": np.ones((W, R), np.float32),
            "key": np.zeros((W, R, 2), np.uint32),
            "stop_ids": np.full((W, R, STOP_IDS), -1, np.int32),
            "top": np.zeros((W, R), bool),
            "table": np.zeros((W, R, self.table_width), np.int32),
            "scale": np.zeros((W, R, len(versions)), np.float32),
            "copy": np.zeros((W, R, 2), np.int32),
        }
        for way, members in enumerate(rows):
            for i, row in enumerate(members):
                request = row.job.request
                batch["token"][way, i] = row.tokens(row.length - 1, row.length)[0]
                batch["position"][way, i] = row.length - 1
                batch["count"][way, i] = len(row.drawn)
                batch["done"][way, i] = False
                batch["max_tokens"][way, i] = request.max_tokens
                batch["temperature"][way, i] = request.temperature
                batch["top_k"][way, i] = request.top_k
                batch["top_p"][way, i] = request.top_p
                batch["key"][way, i] = _key(request.seed, row.sample)
                batch["stop_ids"][way, i, : len(request.stop_ids)] = request.stop_ids
                batch["top"][way, i] = request.topk_sample > 0
                batch["table"][way, i, : len(row.pages)] = row.pages
                if row.job.snapshot is not None:
                    batch["scale"][way, i, versions.index(row.job.snapshot)] = _scale(row.job.snapshot)
                if row.copy is not None:
                    batch["copy"][way, i] = row.copy
        return batch

    def put(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Put a batch on the mesh, split by way; what every way sees is whole everywhere."""
        return {name: (put_whole if name in WHOLE else put_rows)(array, self.mesh) for name, array in batch.items()}

    def shapes(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Return the shapes and places of what `put` gives, to compile programs with."""
        shape = lambda name: shape_of_whole if name in WHOLE else shape_of_rows  # noqa: E731
        return {name: shape(name)(array, self.mesh) for name, array in batch.items()}


def _add_scores(batch: HostBatch, way: int, i: int, tile: Tile) -> None:
    """Write what is asked about the positions of a tile, if anything is."""
    if tile.scores is None:
        return
    request, at = tile.row.job.request, slice(i * PAGE, (i + 1) * PAGE)
    targets_TC = tile.scores.targets_TC[tile.start : tile.stop]
    batch["targets"][way, i * PAGE : i * PAGE + len(targets_TC), : targets_TC.shape[1]] = targets_TC
    if request.alternatives:
        # No row of the request has this number, so that its draws and these are independent.
        positions = range(tile.start, tile.start + PAGE)
        batch["key"][way, at] = [_key(request.seed, 2**32 + p) for p in positions]
    batch["temperature"][way, at] = request.temperature
    _want(batch, i, request.topk_prompt, request.alternatives)


def _add_draw(batch: HostBatch, way: int, i: int, tile: Tile) -> None:
    """Have a row's one token drawn at its last position, if it is drawn in prefill: as a decode step would draw it."""
    if not tile.draws:
        return
    row, request, last = tile.row, tile.row.job.request, i * PAGE + tile.stop - 1 - tile.start
    batch["key"][way, last] = _key(request.seed, row.sample)
    batch["temperature"][way, last] = request.temperature
    batch["top_k"][way, last], batch["top_p"][way, last] = request.top_k, request.top_p
    _want(batch, i, request.topk_sample, 1)


def _want(batch: HostBatch, i: int, top: int, draws: int) -> None:
    """Have the chunk of tile i scored, with at least `top` likeliest tokens and `draws` draws at each position."""
    chunk = i * PAGE // SCORE_CHUNK
    batch["wanted"][chunk] = np.maximum(batch["wanted"][chunk], (1, top, draws))


def _scale(snapshot: Snapshot | None) -> float:
    return 0.0 if snapshot is None else LORA_ALPHA / snapshot.spec.rank


def _key(seed: int, number: int) -> np.ndarray:
    """Return the raw key of one row, from the request's seed and the row's number."""
    return np.random.SeedSequence([seed & (2**64 - 1), number]).generate_state(2)
