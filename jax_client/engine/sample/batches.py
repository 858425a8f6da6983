"""Which arrays does a sampling program take for a batch of tiles or rows?

Arrays have a leading axis W, the ways that a mesh splits rows. `SamplePrograms` describes each by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.requests import MAX_TARGETS
from jax_client.engine.devices.arrays import put_rows, put_whole
from jax_client.engine.sample.device.token_sampling import make_keys
from jax_client.engine.sample.pages import PAGE, SCRATCH
from jax_client.engine.sample.rows import Row, Tile
from jax_client.models.config import ModelConfig
from jax_client.models.kernels.paged import BLOCK
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.sharding import shape_of_rows, shape_of_whole, ways_of

SCORE_CHUNK = 64  # positions whose scores over the vocabulary exist at once
STOP_IDS = 64
WHOLE = ("wanted", "steps")  # what every way sees
# Of a row: its newest token, that token's position, how many it has drawn, whether it has ended, and a page with the
# one that it is copied into before the first step.
STATE = ("token", "position", "count", "done", "copy_from", "copy_to")
# The fields of a row's request before its stop ids: max_tokens, top_k, whether the likeliest tokens are wanted,
# temperature and top_p as bits of float32, and the numbers (4) that make its key.
OF_REQUEST = 9
HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class RowFields:
    """Where a decode block's settings of a row lie in one row of int32: one array is put on the device for all.

    Attributes:
        table_width: entries of a row's page table.
        versions: adapters of the batch.
    """

    table_width: int
    versions: int

    @property
    def of_request(self) -> slice:
        """Where it says what the request does: `OF_REQUEST` fields and `STOP_IDS` ids, padded with -1."""
        return slice(0, OF_REQUEST + STOP_IDS)

    @property
    def states(self) -> slice:
        """Where the places of its states are, 0 in a model that is not recurrent: `Row.place` and `Row.mark`."""
        return slice(self.of_request.stop, self.of_request.stop + 2)

    @property
    def scale(self) -> slice:
        """Where alpha / rank of the row's adapter is, in the column of that adapter, as bits of float32."""
        return slice(self.states.stop, self.states.stop + self.versions)

    @property
    def table(self) -> slice:
        """Where its pages are."""
        return slice(self.scale.stop, self.width)

    @property
    def width(self) -> int:
        """Fields in all."""
        return self.scale.stop + self.table_width

    def unpacked(self, settings_RF: jax.Array) -> dict[str, jax.Array]:
        """Return the settings of rows by name, each (R, ...)."""
        floats = lambda a: jax.lax.bitcast_convert_type(a, jnp.float32)  # noqa: E731
        max_tokens, top_k, top, temperature, top_p, *number = jnp.unstack(settings_RF[:, :OF_REQUEST], axis=-1)
        return {
            "max_tokens": max_tokens,
            "top_k": top_k,
            "top": top > 0,
            "temperature": floats(temperature),
            "top_p": floats(top_p),
            "key": make_keys(jax.lax.bitcast_convert_type(jnp.stack(number, axis=-1), jnp.uint32)),
            "stop_ids": settings_RF[:, OF_REQUEST : self.of_request.stop],
            "place": settings_RF[:, self.states.start],
            "mark": settings_RF[:, self.states.start + 1],
            "scale": floats(settings_RF[:, self.scale]),
            "table": settings_RF[:, self.table],
        }


def pack_drawn(drawn: dict[str, jax.Array], *ends: jax.Array) -> jax.Array:
    """Return what a block drew as one array, int32 (R, 2 n + 3): one copy to the host for all.

    Args:
        drawn: `tokens`, int32, and `logprobs`, float32, (R, n).
        ends: of each row (R,) how many of these count, whether a stop token ended it, and whether it has ended.
    """
    bits = jax.lax.bitcast_convert_type(drawn["logprobs"], jnp.int32)
    return jnp.concatenate([drawn["tokens"], bits, *(end.astype(jnp.int32)[:, None] for end in ends)], axis=-1)


def unpack_drawn(packed: np.ndarray) -> dict[str, np.ndarray]:
    """Return `tokens` and `logprobs` (..., n), `new`, `stopped` and `done` (...) of what `pack_drawn` made."""
    n = packed.shape[-1] // 2 - 1
    tokens, bits, ends = np.split(packed, (n, 2 * n), axis=-1)
    return {
        "tokens": tokens,
        "logprobs": bits.view(np.float32),
        "new": ends[..., 0],
        "stopped": ends[..., 1] > 0,
        "done": ends[..., 2] > 0,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Builds the batches of one model on one mesh.

    Attributes:
        ways: W.
        table_width: entries of a row's page table.
        recurrent: whether rows have states.
    """

    mesh: Mesh
    ways: int
    table_width: int
    recurrent: bool

    @classmethod
    def of(cls, mesh: Mesh, c: ModelConfig) -> Batches:
        """Return the builder for sequences of a model."""
        width = -(-c.max_context // (PAGE * BLOCK)) * BLOCK
        return cls(mesh=mesh, ways=ways_of(mesh), table_width=width, recurrent=c.delta is not None)

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
            "number": np.zeros((W, N, 4), np.uint32),
            "temperature": np.ones((W, N), np.float32),
            "top_k": np.full((W, N), -1, np.int32),
            "top_p": np.ones((W, N), np.float32),
            "wanted": np.zeros((N // SCORE_CHUNK, 3), np.int32),
        }
        if self.recurrent:
            batch |= {"count": np.zeros((W, t), np.int32), "places": np.zeros((W, t, 3), np.int32)}
        for way, placed in enumerate(tiles):
            for i, tile in enumerate(placed):
                tokens_S = tile.row.tokens(tile.start, tile.stop)
                batch["tokens"][way, i, : len(tokens_S)] = tokens_S
                batch["start"][way, i], batch["page"][way, i] = tile.start, tile.page
                batch["table"][way, i, : len(tile.table)] = tile.table
                batch["scale"][way, i] = _scale(snapshot)
                if self.recurrent:
                    batch["count"][way, i], batch["places"][way, i] = len(tokens_S), tile.places
                _add_scores(batch, way, i, tile)
                _add_draw(batch, way, i, tile)
        return batch

    def of_rows(self, rows: list[list[Row]], size: int, versions: list[Snapshot]) -> HostBatch:
        """Return the batch of a decode block of up to `size` rows per way, each with one of the versions' weights."""
        fields = RowFields(self.table_width, len(versions))
        settings = np.zeros((self.ways, size, fields.width), np.int32)
        state = np.zeros((self.ways, size, len(STATE)), np.int32)
        state[:, :, STATE.index("done")] = 1
        for way, members in enumerate(rows):
            if not members:
                continue
            settings[way, : len(members), fields.of_request] = [_of_request(row) for row in members]
            settings[way, : len(members), fields.states] = [(row.place, row.mark) for row in members]
            scale_RV = settings[way, :, fields.scale].view(np.float32)
            for i, row in enumerate(members):
                settings[way, i, fields.table.start : fields.table.start + len(row.pages)] = row.pages
                if row.job.snapshot is not None:
                    scale_RV[i, versions.index(row.job.snapshot)] = _scale(row.job.snapshot)
            state[way, : len(members)] = [
                (row.newest, row.length - 1, len(row.drawn), 0, *(row.copy or (0, 0))) for row in members
            ]
        return {"settings": settings, "state": state}

    def with_new_pages(self, settings: np.ndarray, rows: list[list[Row]], taken: dict[Row, int]) -> np.ndarray:
        """Return the settings of rows that have taken pages since, or have ended, of a batch that runs once more.

        Args:
            settings: as `of_rows` made them, or this.
            rows: of the batch.
            taken: by row, how many of its pages are new.
        """
        fields = RowFields(self.table_width, settings.shape[-1] - RowFields(self.table_width, 0).width)
        settings = settings.copy()  # a device may still read the other
        for way, members in enumerate(rows):
            for i, row in enumerate(members):
                if row.stop_reason is not None:
                    # Its pages and states may be another's by now.
                    settings[way, i, fields.table], settings[way, i, fields.of_request.start] = SCRATCH, 0
                    settings[way, i, fields.states] = SCRATCH
                elif count := taken.get(row, 0):
                    end = fields.table.start + len(row.pages)
                    settings[way, i, end - count : end] = row.pages[-count:]
        return settings

    def put(self, batch: Mapping[str, np.ndarray | jax.Array]) -> dict[str, jax.Array]:
        """Put a batch on the mesh, split by way; what every way sees is whole everywhere, what is there stays."""
        put = lambda name: put_whole if name in WHOLE else put_rows  # noqa: E731
        return {
            name: array if isinstance(array, jax.Array) else put(name)(array, self.mesh)
            for name, array in batch.items()
        }

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
        batch["number"][way, at] = [_number(request.seed, 2**32 + p) for p in positions]
    batch["temperature"][way, at] = request.temperature
    _want(batch, i, request.topk_prompt, request.alternatives)


def _add_draw(batch: HostBatch, way: int, i: int, tile: Tile) -> None:
    """Have a row's one token drawn at its last position, if it is drawn in prefill: as a decode step would draw it."""
    if not tile.draws:
        return
    row, request, last = tile.row, tile.row.job.request, i * PAGE + tile.stop - 1 - tile.start
    batch["number"][way, last] = _number(request.seed, row.sample)
    batch["temperature"][way, last] = request.temperature
    batch["top_k"][way, last], batch["top_p"][way, last] = request.top_k, request.top_p
    _want(batch, i, request.topk_sample, 1)


def _want(batch: HostBatch, i: int, top: int, draws: int) -> None:
    """Have the chunk of tile i scored, with at least `top` likeliest tokens and `draws` draws at each position."""
    chunk = i * PAGE // SCORE_CHUNK
    batch["wanted"][chunk] = np.maximum(batch["wanted"][chunk], (1, top, draws))


def _of_request(row: Row) -> np.ndarray:
    """Return what a row's request says, the fields `OF_REQUEST` in their order; it is the same in every block."""
    if row.packed is None:
        request, packed = row.job.request, np.full(OF_REQUEST + STOP_IDS, -1, np.int32)
        floats = np.array([request.temperature, request.top_p], np.float32).view(np.int32)
        key = _number(request.seed, row.sample).view(np.int32)
        packed[:OF_REQUEST] = (request.max_tokens, request.top_k, request.topk_sample > 0, *floats, *key)
        packed[OF_REQUEST : OF_REQUEST + len(request.stop_ids)] = request.stop_ids
        row.packed = packed
    return row.packed


def _scale(snapshot: Snapshot | None) -> float:
    return 0.0 if snapshot is None else LORA_ALPHA / snapshot.spec.rank


def _number(seed: int, number: int) -> np.ndarray:
    """Return what a key is made of on the device: a request's seed and a row's number, uint32 (4,), lowest first."""
    return np.array([seed & (2**64 - 1), number], np.uint64).view(np.uint32)
