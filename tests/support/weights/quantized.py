"""How do the tests write quantised releases, and what do their codes stand for? Neither uses the package's decoders.

Codes are decoded one at a time, by the formats' definitions, in Python's own floats.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
E4M3 = ml_dtypes.float8_e4m3fn
FILE_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int32": "I32",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a file with tensors of any of `FILE_NAMES`; the safetensors package writes not all of them."""
    header, data = {}, b""
    for name, x in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(x).tobytes()
        header[name] = {"dtype": FILE_NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": [begin, len(data)]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_release(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], n_shards: int = 1
) -> Path:
    """Write a model directory; more than one shard come with an index, and a pair may be in two of them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if n_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names, weight_map = sorted(tensors), {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names[i::n_shards]})
        weight_map |= dict.fromkeys(names[i::n_shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def e4m3(code: int) -> float:
    """Return what one FP8 code stands for: a sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return math.copysign(size, -1.0 if code & 0x80 else 1.0)


def e2m1(code: int) -> float:
    """Return what one MXFP4 code stands for: a sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
    return math.copysign(size, -1.0 if code & 8 else 1.0)


def decoded_fp8(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Decode an [out, in] matrix element by element: the product of two numbers, rounded to float32."""
    bits = codes.view(np.uint8)
    out = np.empty(codes.shape, np.float32)
    for i, j in np.ndindex(codes.shape):
        # A product of 4 and at most 24 significant bits is exact in Python's float.
        out[i, j] = e4m3(int(bits[i, j])) * float(scales[i // block[0], j // block[1]])
    return out


def decoded_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode (E, out, in / 32, 16) byte by byte, low half first, into float64 (E, in, out)."""
    n_experts, n_rows, n_groups, n_bytes = blocks.shape
    out = np.empty((n_experts, n_groups * n_bytes * 2, n_rows))
    for e, row, group in np.ndindex(n_experts, n_rows, n_groups):
        power = math.ldexp(1.0, int(scales[e, row, group]) - 127)
        column = group * n_bytes * 2
        for byte in blocks[e, row, group].tolist():
            for half in (byte % 16, byte // 16):
                out[e, column, row] = e2m1(half) * power
                column += 1
    return out


def encoded_fp8(w: np.ndarray, block: tuple[int, int], scale_dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a float32 [out, in] matrix: the largest of each block becomes at most 448."""
    rows, columns = (math.ceil(size / side) for size, side in zip(w.shape, block, strict=True))
    codes, scales = np.empty(w.shape, E4M3), np.empty((rows, columns), scale_dtype)
    for p, q in np.ndindex(rows, columns):
        part = np.s_[p * block[0] : (p + 1) * block[0], q * block[1] : (q + 1) * block[1]]
        scale = np.abs(w[part]).max() / 448
        if scale_dtype != np.float32:
            scale = 2.0 ** math.ceil(math.log2(scale))
        scales[p, q] = scale
        codes[part] = (w[part] / np.float32(scales[p, q])).astype(E4M3)
    return codes, scales


def fp8_release(
    tensors: Mapping[str, np.ndarray], block: tuple[int, int], scale_dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Return a model's tensors with every projection of its layers in FP8, the others in bfloat16."""
    stored: dict[str, np.ndarray] = {}
    for name, w in tensors.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[name + "_scale_inv"] = encoded_fp8(w, block, scale_dtype)
        else:
            stored[name] = w.astype(ml_dtypes.bfloat16)
    return stored


def plain(stored: Mapping[str, np.ndarray], block: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the float32 tensors that an FP8 release stands for."""
    return {
        name: decoded_fp8(x, stored[name + "_scale_inv"], block) if x.dtype == E4M3 else x.astype(np.float32)
        for name, x in stored.items()
        if not name.endswith("_scale_inv")
    }
