"""How do a model's files become parameters on the mesh? They are read leaf by leaf, each tensor once.

The host holds one stacked leaf at a time, and of it only the shards of its own devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import DTypeLike

from jax_client.errors import BadRequestError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, param_specs
from jax_client.models.families.registry import config_from_hf
from jax_client.models.specs import ParamSpec
from jax_client.sharding import sharding_for
from jax_client.threads import Workers
from jax_client.weights.read import hf, safetensors
from jax_client.weights.read.gguf import GgufReader, as_hf_config, read_gguf
from jax_client.weights.read.names import Part, expected_tensors, leaf_parts, numbers
from jax_client.weights.read.progress import Counter
from jax_client.weights.read.source import ModelSource
from jax_client.weights.read.tensors import TensorReader, check_tensors

# Transposing in strips keeps the strided side of the copy in cache (measured on one core: 0.28 -> 0.6 GB/s).
STRIP = 32
# Each float type as an integer, and the exponent bits that are all set in what is not finite. numpy copies and tests
# integers 2 to 3 times as fast as bfloat16, and without the interpreter's lock.
BITS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
ALIGNMENT = 64

Bounds = tuple[tuple[int, int], ...]


def read_config(source: ModelSource) -> ModelConfig:
    """Read a model's sizes from config.json, or from a GGUF file's metadata.

    Raises:
        BadRequestError, UnsupportedError: the file is damaged, or asks for what the layers do not compute.
    """
    if source.kind == "gguf":
        return config_from_hf(as_hf_config(read_gguf(source.path)), str(source.path))
    return config_from_hf(hf.read_hf_config(source.path), str(source.path / hf.CONFIG))


def open_tensors(source: ModelSource, dtype: DTypeLike = np.float32) -> TensorReader:
    """Open a model's files; `dtype` is as `hf.open_weights` takes it. Raises BadRequestError for damaged ones."""
    return GgufReader(read_gguf(source.path)) if source.kind == "gguf" else hf.open_weights(source.path, dtype)


def load_params(
    source: ModelSource, config: ModelConfig, dtype: DTypeLike, mesh: Mesh, *, bits: bool = False
) -> Params:
    """Read the weights onto the mesh in the stored layout.

    Args:
        source: from `resolve`.
        config: from `read_config`.
        dtype: of the matmul weights and the embedding; norms and biases are float32.
        mesh: from `sharding.make_mesh`.
        bits: bfloat16 leaves as their uint16 bit patterns, as `layers.to_bits` gives them: here it is a view; of an
            array on a CPU it copies a whole stack of layers.

    Returns:
        The tree of `param_specs`, with arrays laid out by the specs' axes.

    Raises:
        BadRequestError: damaged files; missing, extra or misshapen tensors; values that are not finite.
        UnsupportedError: a tensor dtype that is not read.
    """
    reader = open_tensors(source, dtype)
    check_tensors(reader, expected_tensors(config, reader.tensors), tied=config.tied_embeddings, where=str(source.path))
    leaves = leaf_parts(config, reader.tensors)
    specs = param_specs(config, np.dtype(dtype))
    counter = Counter("loading", sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(specs)))
    with Workers("jax_client-read", min(8, os.cpu_count() or 1)) as pool:

        def build(key_path: Sequence[Any], spec: ParamSpec) -> jax.Array:
            path = tuple(key.key for key in key_path)
            job = leaves[path], numbers(path, config)
            return _build_leaf(".".join(path), spec, *job, reader, mesh, pool, bits, counter)

        return jax.tree_util.tree_map_with_path(build, specs)


def _build_leaf(
    name: str,
    spec: ParamSpec,
    parts: Sequence[Part],
    layers: Sequence[int],
    reader: TensorReader,
    mesh: Mesh,
    pool: Workers,
    bits: bool,
    counter: Counter,
) -> jax.Array:
    sharding = sharding_for(spec.axes, spec.shape, mesh, name)
    stacked = "{layer}" in parts[0].name
    # Replicas share a buffer.
    shards = {_bounds(i, spec.shape) for i in sharding.addressable_devices_indices_map(spec.shape).values() if i}
    buffers = {bounds: _aligned(_sizes(bounds), spec.dtype) for bounds in shards}
    # The same memory, with the axes that the parts know.
    views = {_apart(b, parts[0].apart): a.reshape(_sizes(_apart(b, parts[0].apart))) for b, a in buffers.items()}

    def fill(job: tuple[int, Part]) -> None:
        entry, part = job
        tensor_name = part.name.format(layer=layers[entry])
        x = part.read(reader, tensor_name)
        for bounds, buffer in views.items():
            if stacked:
                (first, end), bounds = bounds[0], bounds[1:]
                if not first <= entry < end:
                    continue
                buffer = buffer[entry - first]
            if not _copy_overlap(buffer, bounds, x, part):
                raise BadRequestError(
                    f"{reader.tensors[tensor_name].file}: tensor {tensor_name} holds values that are not finite in "
                    f"{spec.dtype}. {safetensors.AGAIN}"
                )
        counter.add(x.size * spec.dtype.itemsize)

    # list() is what lets a worker's exception out.
    pool.map(fill, [(entry, part) for entry in range(len(layers)) for part in parts])
    if bits and spec.dtype.name == "bfloat16":
        buffers = {bounds: buffer.view(np.uint16) for bounds, buffer in buffers.items()}
    array = jax.make_array_from_callback(spec.shape, sharding, lambda index: buffers[_bounds(index or (), spec.shape)])
    # The host buffers go before those of the next leaf come.
    return array.block_until_ready()


def _copy_overlap(buffer: np.ndarray, bounds: Bounds, x: np.ndarray, part: Part) -> bool:
    """Copy what a shard holds of one tensor; return whether all of it is finite.

    Args:
        buffer: the shard (of one layer).
        bounds: of the shard in the leaf, axis by axis, without the layer axis.
        x: the tensor in the leaf's order.
        part: its place in the leaf.
    """
    target, origin = [], []
    for axis, ((lo, hi), size) in enumerate(zip(bounds, x.shape, strict=True)):
        start = part.start if axis == part.axis else 0
        first, end = max(lo, start), min(hi, start + size)
        if first >= end:
            return True
        target.append(slice(first - lo, end - lo))
        origin.append(slice(first - start, end - start))
    buffer, x = buffer[tuple(target)], x[tuple(origin)]
    axis = max((a for a in range(x.ndim)), key=lambda a: (x.shape[a] > 1, x.strides[a]))
    step = max(1, STRIP * part.shape[-1] * x.itemsize // x.strides[axis])
    integer, exponent = BITS[buffer.dtype.name]
    finite = True
    for start in range(0, x.shape[axis], step):
        strip = (slice(None),) * axis + (slice(start, start + step),)
        # astype keeps the order of the file's bytes, so that only one of the two passes is strided.
        bits = x[strip].astype(buffer.dtype, copy=False).view(integer)
        finite &= not ((bits & exponent) == exponent).any()
        buffer[strip].view(integer)[...] = bits
    return finite


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an empty array at an address that the CPU backend takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _sizes(bounds: Bounds) -> list[int]:
    return [hi - lo for lo, hi in bounds]


def _apart(bounds: Bounds, apart: tuple[int, ...]) -> Bounds:
    """Return the bounds of a shard, the last axis taken apart into `apart`, of which the first may be split."""
    if not apart:
        return bounds
    *outer, (lo, hi) = bounds
    inner = math.prod(apart[1:])
    return *outer, (lo // inner, hi // inner), *((0, size) for size in apart[1:])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
