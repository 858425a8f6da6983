"""Is a .safetensors file whole, and where in it are its tensors? Its header gives each tensor's dtype, shape and bytes.

A reader maps those bytes. The safetensors package is not used:
of a damaged file it says neither the missing bytes nor the tensor, and it copies a tensor instead of mapping it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_client.errors import BadRequestError
from jax_client.values import JsonObject

ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# `NUMPY_DTYPES` are those of weights. The others are of codes and scales, which stand for weights only together, and of
# what is copied unread.
STORED_DTYPES = NUMPY_DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
MAX_HEADER_BYTES = 100_000_000
AGAIN = "The file is damaged: delete it and download it again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a file: dtype name, shape, and its bytes [begin, end) counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of a shard.

    Raises:
        BadRequestError: truncated file, trailing bytes, or a header that describes no valid file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BadRequestError(f"{path}: the header would need {8 + length} bytes, but the file has {size}. {AGAIN}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"{path}: the header is not JSON ({error}). {AGAIN}") from None
    if not isinstance(header, dict):
        raise BadRequestError(f"{path}: the header is {type(header).__name__}, expected an object. {AGAIN}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise BadRequestError(f"{path}: tensor {name} begins at byte {entry.begin}, expected {position}. {AGAIN}")
        position = entry.end
    if position != size:
        raise BadRequestError(f"{path}: the header describes {position} bytes, but the file has {size}. {AGAIN}")
    return entries


def view(path: Path, entry: Entry) -> np.ndarray:
    """Return a tensor as a view of the mapped file, in one of `STORED_DTYPES`; pages are read when touched."""
    dtype = STORED_DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return np.zeros(entry.shape, dtype)
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=entry.begin, shape=(entry.end - entry.begin,))
    return raw.view(np.ndarray).view(dtype).reshape(entry.shape)


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadRequestError(f"{path}: the header entry of tensor {name} is {value!r}. {AGAIN}") from None
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise BadRequestError(f"{path}: tensor {name} has shape {shape} at bytes {begin!r} to {end!r}. {AGAIN}")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise BadRequestError(
            f"{path}: tensor {name} has an unknown dtype {dtype!r}; known are {', '.join(ITEM_BITS)}."
        )
    needed = math.prod(shape) * ITEM_BITS[dtype] / 8
    if end - begin != needed:
        raise BadRequestError(
            f"{path}: tensor {name}, {dtype} {shape}, needs {needed:.0f} bytes, but has {end - begin}. {AGAIN}"
        )
    return Entry(dtype=dtype, shape=shape, begin=data_start + begin, end=data_start + end)


def _no_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
