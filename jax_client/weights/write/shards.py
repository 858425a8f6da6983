"""How do tensors become .safetensors files without being in memory together? Rows are written as they are computed.

The header comes first and needs shapes only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_client.errors import RequestFailedError
from jax_client.values import JsonObject
from jax_client.weights.read import hf
from jax_client.weights.read.safetensors import STORED_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# Rows are computed and written in strips of about this many bytes of float32.
STRIP_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor to be written: its name, its shape, and `rows`, `f(first, end) -> rows[first:end]`.

    It has a dtype of its own, or that of the file.
    """

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    dtype: np.dtype | None = None

    def nbytes(self, dtype: np.dtype) -> int:
        """Return the bytes that it takes in a file of this dtype."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize

    def strips(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, a few at a time."""
        step = max(1, STRIP_BYTES // (4 * max(1, math.prod(self.shape[1:]))))
        for first in range(0, self.shape[0], step):
            yield self.rows(first, min(first + step, self.shape[0]))


def check_space(directory: Path, needed: int) -> None:
    """Raise RequestFailedError unless the disk of `directory` has `needed` free bytes; nothing has been written yet."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise RequestFailedError(
            f"{directory}: the export needs {needed:,} bytes, but {free:,} are free. Free some space, or export to a "
            "larger disk."
        )


def write_file(path: Path, tensors: Iterable[Tensor], dtype: np.dtype) -> None:
    """Write a new file with these tensors, in `dtype` (float32, float16 or bfloat16) unless they have their own.

    Raises:
        OSError: the file is there already, or the disk is full.
    """
    tensors = list(tensors)
    # transformers refuses a file that does not say for which framework's tensors it was made.
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes(dtype)
        entry = {
            "dtype": DTYPE_NAMES[tensor.dtype or dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        header[tensor.name], offset = entry, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            for rows in tensor.strips():
                file.write(np.ascontiguousarray(rows, tensor.dtype or dtype).reshape(-1).view(np.uint8).data)


def write_model(directory: Path, tensors: Sequence[Tensor], dtype: np.dtype, shard_bytes: int) -> None:
    """Write a model's tensors as one file, or as several of at most `shard_bytes` (or one tensor) with their index."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.nbytes(dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        write_file(directory / hf.SINGLE, tensors, dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / file, shard, dtype)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes(dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n")
