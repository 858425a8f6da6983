"""How does a TensorData become a dense NumPy array, and which ones are refused?

A sparse tensor is compressed by rows (CSR) and may come from anywhere, so its indices are checked before any array
of the dense size is made. What is not listed is 0, as the SDK writes it, or what the field says.
"""

from __future__ import annotations

import math

import numpy as np
from tinker import types

from jax_client.errors import BadRequestError, BadTypeError
from jax_client.runs.checks.numbers import shown

# 256 MiB of float32: far above any batch that fits a device, far below what would stop the host.
MAX_DENSE_ELEMENTS = 2**26
# Above this a float32 does not hold every integer.
_EXACT_INT = 2**24


def dense(tensor: object, where: str, pad: int = 0) -> np.ndarray:
    """Return the int64 or float32 array of a TensorData, dense; it may share the tensor's memory.

    Args:
        tensor: what the datum carries.
        where: its name for messages, such as "data[3].loss_fn_inputs['weights']".
        pad: what a sparse tensor does not list.

    Raises:
        BadTypeError: not a TensorData, or of another dtype.
        BadRequestError: shape and size disagree, a CSR invariant is broken, or the dense size is over the limit.
    """
    if not isinstance(tensor, types.TensorData):
        raise BadTypeError(f"{where} is {type(tensor).__name__}, expected TensorData; use TensorData.from_numpy.")
    if tensor.dtype not in ("int64", "float32"):
        raise BadTypeError(f"{where} has dtype {shown(tensor.dtype)}; give int64 or float32.")
    shape = None if tensor.shape is None else _shape(tensor.shape, where)
    if tensor.sparse_crow_indices is not None or tensor.sparse_col_indices is not None:
        return _from_csr(tensor, shape, where, pad)
    array = tensor.to_numpy()
    if array.dtype.name != tensor.dtype:
        raise BadTypeError(f"{where} says dtype {tensor.dtype} but holds {array.dtype}; rebuild the TensorData.")
    if shape is not None and array.shape != shape:
        raise BadRequestError(
            f"{where} has shape {list(shape)} but {array.size} values in shape {list(array.shape)}; make them agree."
        )
    return array


def token_ids(array: np.ndarray, where: str, vocab_size: int, *, or_nothing: bool = False) -> np.ndarray:
    """Return token ids as a fresh int32 array; `or_nothing` allows -1, too.

    Raises:
        BadTypeError: not integers.
        BadRequestError: an id outside [0, vocab_size); the message names the first.
    """
    if array.dtype.kind != "i":
        raise BadTypeError(f"{where} has dtype {array.dtype}; token ids must be int64. Convert with .astype(int64).")
    bad = (array < (-1 if or_nothing else 0)) | (array >= vocab_size)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        hint = (
            " -1 asks for nothing."
            if or_nothing
            else (
                " Positions that must not count take any valid id and a weight or advantage of 0."
                if array[at] < 0
                else " Was it tokenized for another model? A token that was added to the tokenizer, for padding say, "
                "has no row in the embedding; sequences need no padding."
            )
        )
        raise BadRequestError(
            f"{where} has token id {array[at]} at position {_position(at)}; ids must be 0 to {vocab_size - 1} "
            f"(vocabulary size {vocab_size}).{hint}"
        )
    return array.astype(np.int32)


def finite_floats(array: np.ndarray, where: str) -> np.ndarray:
    """Return a fresh float32 array; integers are taken when float32 holds them exactly.

    Raises:
        BadTypeError: not numbers, or integers that are too large.
        BadRequestError: NaN or infinity; the message begins with the hosted service's name for it.
    """
    if array.dtype.kind == "i":
        if np.any(np.abs(array) > _EXACT_INT):
            raise BadTypeError(f"{where} has dtype {array.dtype} with values over 2**24; give float32.")
        return array.astype(np.float32)
    if array.dtype.kind != "f":
        raise BadTypeError(f"{where} has dtype {array.dtype}; give float32.")
    finite = np.isfinite(array)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise BadRequestError(
            f"NonFiniteInTensor: {where} is {array[at]} at position {_position(at)}, one of "
            f"{int(np.count_nonzero(~finite))} such values; every value must be finite. Look at what computed it."
        )
    return array.astype(np.float32)


def _position(at: tuple[int, ...]) -> str:
    return str(at[0]) if len(at) == 1 else str(list(at))


def _shape(shape: object, where: str) -> tuple[int, ...]:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else None
    if sizes is None or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise BadRequestError(f"{where} has shape {shown(shape)}; give a list of sizes that are 0 or more.")
    if math.prod(sizes) > MAX_DENSE_ELEMENTS:
        raise BadRequestError(
            f"{where} has shape {sizes}, which is {math.prod(sizes)} values when dense; the limit is "
            f"{MAX_DENSE_ELEMENTS}. Send fewer targets per position."
        )
    return tuple(sizes)


def _from_csr(tensor: types.TensorData, shape: tuple[int, ...] | None, where: str, pad: int) -> np.ndarray:
    broken = f"{where} is not a valid sparse CSR tensor:"
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        raise BadRequestError(f"{broken} sparse_crow_indices and sparse_col_indices must be given together.")
    if shape is None or len(shape) != 2:
        raise BadRequestError(f"{broken} shape is {shown(tensor.shape)}; it needs two sizes, [rows, columns].")
    rows, columns = shape
    crow = _indices(tensor.sparse_crow_indices, f"{broken} sparse_crow_indices")
    col = _indices(tensor.sparse_col_indices, f"{broken} sparse_col_indices")
    values = np.asarray(tensor.data, dtype=np.dtype(tensor.dtype))
    if len(crow) != rows + 1:
        raise BadRequestError(f"{broken} sparse_crow_indices has {len(crow)} entries; {rows} rows need {rows + 1}.")
    if len(col) != len(values):
        raise BadRequestError(f"{broken} sparse_col_indices has {len(col)} entries for {len(values)} values.")
    if crow[0] != 0 or crow[-1] != len(values):
        raise BadRequestError(
            f"{broken} sparse_crow_indices runs from {crow[0]} to {crow[-1]}; it must run from 0 to {len(values)}, "
            "the number of values."
        )
    steps = np.diff(crow)
    if np.any(steps < 0):
        raise BadRequestError(
            f"{broken} sparse_crow_indices must not decrease, but does after entry {int(np.argmax(steps < 0))}."
        )
    outside = (col < 0) | (col >= columns)
    if outside.any():
        at = int(np.argmax(outside))
        raise BadRequestError(
            f"{broken} sparse_col_indices[{at}] is {col[at]}; columns go from 0 to {columns - 1} (shape {list(shape)})."
        )
    row = np.repeat(np.arange(rows), steps)
    unsorted = (np.diff(row) == 0) & (np.diff(col) <= 0)
    if unsorted.any():
        raise BadRequestError(
            f"{broken} sparse_col_indices must increase within a row, but does not at entry "
            f"{int(np.argmax(unsorted)) + 1}."
        )
    array = np.full(shape, pad, dtype=values.dtype)
    array[row, col] = values
    return array


def _indices(values: object, field: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.empty((0, 0), dtype=object)
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind != "i":
        raise BadRequestError(f"{field} must be a flat list of integers, got {shown(values)}.")
    return array.astype(np.int64)
