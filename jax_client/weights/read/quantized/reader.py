"""Which tensors does a quantised release stand for? Codes and their scales read as one float tensor of the plain name.

All of them are paired and their shapes checked before any is read; each is decoded when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jax_client.errors import BadRequestError
from jax_client.models.quantization import Quantization
from jax_client.weights.read import safetensors
from jax_client.weights.read.quantized import fp8, mxfp4
from jax_client.weights.read.tensors import TensorInfo, TensorReader

BLOCKS, SCALES = "_blocks", "_scales"
FP8_SCALES = "_scale_inv"
FP8_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
INCOMPLETE = "Use a complete copy of the release, with its own config.json."


class QuantizedReader:
    """The tensors of a quantised release: MXFP4 as bfloat16, FP8 in a given dtype, the others as they are stored."""

    supported_dtypes = tuple(safetensors.NUMPY_DTYPES)

    def __init__(self, files: TensorReader, quantization: Quantization, dtype: DTypeLike = np.float32) -> None:
        """Pair codes and scales.

        Codes or scales that are left alone keep their names and dtypes, and `check_tensors` refuses them.

        Args:
            files: the tensors as they are stored; a view of a file each.
            quantization: from the config.json.
            dtype: that a caller wants of FP8 weights. They take less memory on the way if they are rounded here.

        Raises:
            BadRequestError: codes without scales, or a pair whose shapes or dtypes do not fit each other, by name.
        """
        self._files = files
        self._quantized: Mapping[str, Quantized] = (
            find_mxfp4(files.tensors)
            if quantization.method == "mxfp4"
            else find_fp8(files.tensors, quantization.block, np.dtype(dtype))
        )
        members = {name for q in self._quantized.values() for name in (q.codes, q.scales)}
        self.tensors: dict[str, TensorInfo] = {n: info for n, info in files.tensors.items() if n not in members}
        if twice := self.tensors.keys() & self._quantized.keys():
            name = min(twice)
            raise BadRequestError(
                f"{self.tensors[name].file}: tensor {name} is there beside {self._quantized[name].codes}; one of the "
                f"two should be. {INCOMPLETE}"
            )
        self.tensors |= {name: q.info for name, q in self._quantized.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in the layout of the unquantised release, decoded as a whole.

        Raises:
            BadRequestError: codes or scales that are not numbers.
        """
        quantized = self._quantized.get(name)
        return self._files.read(name) if quantized is None else quantized.read(self._files, None)

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Return `read(name)[expert]`; no other slice is decoded.

        Raises: as `read`.
        """
        quantized = self._quantized.get(name)
        return self._files.read_expert(name, expert) if quantized is None else quantized.read(self._files, expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4:
    """Experts' matrices in MXFP4: codes (E, out, in / 32, 16) and scales (E, out, in / 32) of an (E, in, out) tensor.

    The files order them by output row. The bfloat16 release of gpt-oss has the input first, under the plain name.

    Attributes:
        codes, scales: the names of the two stored tensors.
        info: of the tensor that they stand for.
    """

    codes: str
    scales: str
    info: TensorInfo

    def read(self, files: TensorReader, expert: int | None) -> np.ndarray:
        """Return bfloat16 (E, in, out), or (in, out) of one expert: a transposed view of what was decoded."""
        blocks_EOGB, scales_EOG = files.read(self.codes), files.read(self.scales)
        if expert is not None:
            blocks_EOGB, scales_EOG = blocks_EOGB[expert, None], scales_EOG[expert, None]
        if (scales_EOG == mxfp4.NAN_SCALE).any():
            raise _not_finite(files, self.scales)
        *rows, n_groups, _ = blocks_EOGB.shape
        out_EOI = np.empty((*rows, n_groups * mxfp4.GROUP), ml_dtypes.bfloat16)
        for blocks_OGB, scales_OG, out_OI in zip(blocks_EOGB, scales_EOG, out_EOI, strict=True):
            mxfp4.decode(blocks_OGB, scales_OG, out_OI)
        out_EIO = out_EOI.swapaxes(1, 2)
        return out_EIO if expert is None else out_EIO[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """A weight in FP8: codes ([E,] out, in), and a scale for each block of the last two axes.

    Attributes:
        codes, scales, info: as `Mxfp4`.
        block: rows and columns that share a scale.
        dtype: of what is read.
    """

    codes: str
    scales: str
    info: TensorInfo
    block: tuple[int, int]
    dtype: np.dtype

    def read(self, files: TensorReader, expert: int | None) -> np.ndarray:
        """Return ([E,] out, in), or one slice along the first axis: code times scale in float32, rounded once."""
        codes, scales = files.read(self.codes), files.read(self.scales)
        if codes.ndim == 2 and expert is not None:
            return self.read(files, None)[expert]
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        if not np.isfinite(scales.astype(np.float32)).all():
            raise _not_finite(files, self.scales)
        out = np.empty(codes.shape, self.dtype)
        stacked = (-1, *codes.shape[-2:])
        for codes_OI, scales_PQ, out_OI in zip(
            codes.reshape(stacked), scales.reshape(-1, *scales.shape[-2:]), out.reshape(stacked), strict=True
        ):
            if not fp8.decode(codes_OI, scales_PQ, self.block, out_OI):
                raise _not_finite(files, self.codes)
        return out


Quantized: TypeAlias = Mxfp4 | Fp8


def find_mxfp4(stored: Mapping[str, TensorInfo]) -> dict[str, Mxfp4]:
    """Return the tensors X of every X_blocks with its X_scales.

    Args:
        stored: what the files hold.

    Raises:
        BadRequestError: X_scales is missing, or one of the two has a wrong shape or dtype.
    """
    found: dict[str, Mxfp4] = {}
    for codes, info in stored.items():
        if not codes.endswith(BLOCKS):
            continue
        name = codes.removesuffix(BLOCKS)
        scales = name + SCALES
        if info.dtype != "U8" or len(info.shape) != 4 or info.shape[-1] != mxfp4.GROUP_BYTES:
            raise BadRequestError(
                f"{info.file}: tensor {codes} is {info.dtype} {info.shape}; blocks of MXFP4 are U8 "
                f"(experts, out, in / {mxfp4.GROUP}, {mxfp4.GROUP_BYTES}). {INCOMPLETE}"
            )
        _check_scales(stored, codes, scales, info.shape[:-1], ("U8",))
        experts, rows, groups, _ = info.shape
        logical = TensorInfo(shape=(experts, groups * mxfp4.GROUP, rows), dtype="BF16", file=info.file)
        found[name] = Mxfp4(codes=codes, scales=scales, info=logical)
    return found


def find_fp8(stored: Mapping[str, TensorInfo], block: tuple[int, int], dtype: np.dtype) -> dict[str, Fp8]:
    """Return every e4m3 tensor X that has its X_scale_inv.

    Args:
        stored: what the files hold.
        block: rows and columns that share a scale.
        dtype: of what is read.

    Raises:
        BadRequestError: X_scale_inv is missing, or it has not one scale for each block, or a wrong dtype.
    """
    found: dict[str, Fp8] = {}
    for name, info in stored.items():
        if info.dtype != "F8_E4M3":
            continue
        if len(info.shape) not in (2, 3):
            raise BadRequestError(
                f"{info.file}: tensor {name} is {info.dtype} {info.shape}; only matrices, or stacks of them, have "
                f"scales of blocks. {INCOMPLETE}"
            )
        blocks = [math.ceil(size / side) for size, side in zip(info.shape[-2:], block, strict=True)]
        scales, needed = name + FP8_SCALES, (*info.shape[:-2], *blocks)
        _check_scales(stored, name, scales, needed, FP8_SCALE_DTYPES, f" in blocks of {block[0]} x {block[1]}")
        logical = TensorInfo(shape=info.shape, dtype="F32", file=info.file)
        found[name] = Fp8(codes=name, scales=scales, info=logical, block=block, dtype=dtype)
    return found


def _check_scales(
    stored: Mapping[str, TensorInfo],
    codes: str,
    scales: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...],
    blocks: str = "",
) -> None:
    """Raise BadRequestError unless the scales are there, one for each block, in one of the dtypes."""
    info = stored[codes]
    if scales not in stored:
        raise BadRequestError(f"{info.file}: tensor {codes} has no {scales} in any of the model's files. {INCOMPLETE}")
    found = stored[scales]
    if found.shape != shape or found.dtype not in dtypes:
        raise BadRequestError(
            f"{found.file}: tensor {scales} is {found.dtype} {found.shape}; expected {' or '.join(dtypes)} {shape}, "
            f"for {codes} of shape {info.shape}{blocks}. {INCOMPLETE}"
        )


def _not_finite(files: TensorReader, name: str) -> BadRequestError:
    return BadRequestError(
        f"{files.tensors[name].file}: tensor {name} holds values that are not finite. {safetensors.AGAIN}"
    )
