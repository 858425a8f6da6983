"""What do the blocks and scales of MXFP4 stand for? Each byte holds two codes, each 32 codes of a row share a scale.

A code's value is its sign times one of eight sizes, times a power of two. bfloat16 holds every such number exactly, up
to its own largest.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

# Bits 0 to 2 of a code choose the size, bit 3 is the sign.
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32  # values that share a scale
GROUP_BYTES = GROUP // 2
# A scale's byte s stands for 2**(s - 127), this one for not a number.
NAN_SCALE = 255
# Bytes of codes that are decoded together, so that their indices stay in cache.
STRIP_BYTES = 2**14


def decode(blocks_OGB: np.ndarray, scales_OG: np.ndarray, out_OI: np.ndarray) -> None:
    """Decode one [out, in] matrix.

    Args:
        blocks_OGB: uint8 (out, in / 32, 16); of a byte the low half is the earlier value.
        scales_OG: uint8 (out, in / 32), none of them `NAN_SCALE`.
        out_OI: bfloat16 (out, in), contiguous, to be filled. What is too large for bfloat16 becomes infinite.

    Source: the MX formats' specification of the Open Compute Project, version 1.0, sections 5.3 and 6.3.
    """
    n_rows, table = len(blocks_OGB), _pairs()
    pairs_OGB = out_OI.view(np.uint32).reshape(blocks_OGB.shape)
    step = max(1, STRIP_BYTES // max(1, blocks_OGB[:1].size))
    for first in range(0, n_rows, step):
        rows = slice(first, first + step)
        index = (scales_OG[rows, :, None].astype(np.uint16) << 8) | blocks_OGB[rows]
        # No index is outside the table; any mode but "raise" writes without a buffer of its own.
        np.take(table, index, out=pairs_OGB[rows], mode="clip")


@cache
def _pairs() -> np.ndarray:
    """Return the two bfloat16 numbers of every (scale, byte), as one uint32 at index scale * 256 + byte."""
    sizes = np.array(SIZES)
    powers = np.ldexp(1.0, np.arange(256) - 127)
    powers[NAN_SCALE] = np.nan
    with np.errstate(over="ignore"):
        values = (powers[:, None] * np.concatenate([sizes, -sizes])).astype(np.float32).astype(ml_dtypes.bfloat16)
    byte = np.arange(256)
    return np.stack([values[:, byte & 15], values[:, byte >> 4]], axis=-1).view(np.uint32).reshape(-1)
