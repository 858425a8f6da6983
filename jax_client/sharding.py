"""How do logical axis names become positions on the device mesh?"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, Protocol, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_client.config import MESH_AXES
from jax_client.errors import BadRequestError
from jax_client.host.slices import refuse_part_of_a_slice

logger = logging.getLogger(__name__)

ROWS = ("data", "fsdp", "expert")  # the mesh axes that split the rows of a batch
# Logical axis -> mesh axes. A name that is absent is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ROWS,
    "embed": ("fsdp",),
    "kv_heads": ("tensor",),
    "heads": ("tensor",),
    "ffw": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("fsdp", "expert"),
}
LANES = 128  # of a TPU's tile: the last axis of an array lies in memory as whole tiles of 128 numbers


class Device(Protocol):
    """What this package asks of a `jax.Device`, which comes without types."""

    @property
    def platform(self) -> str:
        """Such as "cpu"."""
        ...

    def memory_stats(self) -> dict[str, Any] | None:
        """Bytes by kind of use, None where the device does not count them."""
        ...


class ModelSizes(Protocol):
    """What a mesh splits of a model: a `ModelConfig` has it."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream, over "fsdp"."""
        ...

    @property
    def head_counts(self) -> tuple[int, ...]:
        """Heads of the layers, over "tensor"."""
        ...

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Hidden widths of the feed-forward layers, over "tensor"."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the output table, over "tensor"."""
        ...


_chosen: ContextVar[Sequence[Device] | None] = ContextVar("_chosen", default=None)


@contextlib.contextmanager
def only_devices(devices: Sequence[Device]) -> Iterator[None]:
    """Have the meshes that this thread makes within the block consist of these devices, in place of all."""
    token = _chosen.set(devices)
    try:
        yield
    finally:
        _chosen.reset(token)


def make_mesh(
    axes: Literal["auto"] | Mapping[str, int],
    devices: Sequence[Device] | None = None,
    model: ModelSizes | None = None,
) -> Mesh:
    """Build the device mesh with every axis of `MESH_AXES`.

    Axis types are Auto: jax's default is Explicit since 0.10.

    Args:
        axes: sizes by axis, or "auto" for those of `auto_axes`.
        devices: None for those of `only_devices`, else all.
        model: what the mesh is for, if for one.

    Raises:
        BadRequestError: the sizes do not multiply to the number of devices.
        UnsupportedError: this machine is one host of a TPU slice of several.
    """
    if devices is None:
        refuse_part_of_a_slice()
        devices = _chosen.get() or jax.devices()
    devices = list(devices)
    shape = mesh_shape(axes, devices, model)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def describe_mesh(
    axes: Literal["auto"] | Mapping[str, int], devices: Sequence[Device], model: ModelSizes | None = None
) -> Mesh:
    """Build the mesh of devices that are not here, of which only what `Device` names is known.

    Shapes and bytes per device come from it as from a real one; nothing can be compiled or put there.

    Raises:
        BadRequestError: as `make_mesh`.
    """
    shape = mesh_shape(axes, devices, model)
    places = np.empty(len(devices), object)
    places[:] = devices
    return Mesh(places.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(
    axes: Literal["auto"] | Mapping[str, int], devices: Sequence[Device], model: ModelSizes | None = None
) -> tuple[int, ...]:
    """Return the sizes of `MESH_AXES` for these devices.

    Raises:
        BadRequestError: the sizes do not multiply to the number of devices.
    """
    count = len(devices)
    sizes = auto_axes(devices, model) if axes == "auto" else dict(axes)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if math.prod(shape) != count:
        raise BadRequestError(
            f"EngineConfig.mesh {sizes} needs {math.prod(shape)} devices, but {count} are there; choose sizes "
            f"whose product is {count}, or leave mesh='auto'."
        )
    return shape


def auto_axes(devices: Sequence[Device], model: ModelSizes | None) -> dict[str, int]:
    """Return the sizes by axis that "auto" means: all devices on "fsdp", but for some models on TPUs.

    There a part of the model's width has to fill whole tiles. XLA lays out anew what does not, in copies of the stacks
    and of the table. So "fsdp" is the largest size whose parts do, and "tensor" has the rest, where that divides the
    model; else all devices are on "fsdp".
    """
    count = len(devices)
    if model is not None and devices[0].platform == "tpu":
        for tensor in (n for n in range(1, count + 1) if count % n == 0):
            fsdp = count // tensor
            split = *model.head_counts, *model.hidden_widths, model.vocab_size
            if model.d_model % (fsdp * LANES) == 0 and not any(size % tensor for size in split):
                return {"fsdp": fsdp, "tensor": tensor}
    return {"fsdp": count}


def sharding_for(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str = "array") -> NamedSharding:
    """Return the sharding of an array whose dimensions carry the logical names `axes`.

    A dimension that the mesh axes do not divide is replicated, with a warning that names it.

    Raises:
        BadRequestError: two dimensions claim one mesh axis.
    """
    spec: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in RULES.get(axis or "", ()) if mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % ways:
            logger.warning("%s: axis %s of size %d is replicated, %d does not divide it", name, axis, size, ways)
            mesh_axes = ()
        spec.append(mesh_axes or None)
    used = [a for entry in spec if entry for a in entry]
    if len(used) != len(set(used)):
        raise BadRequestError(f"{name}: the logical axes {tuple(axes)} use a mesh axis twice: {used}.")
    return NamedSharding(mesh, PartitionSpec(*spec))


def ways_of(mesh: Mesh) -> int:
    """Return how many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Within a program, have an array's first axis split as the rows of a batch are, and the others whole."""
    return jax.lax.with_sharding_constraint(array, place_of_rows(array, mesh))


def place_of_rows(array: np.ndarray | jax.Array, mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is split as the rows of a batch are."""
    return sharding_for(("rows", *(None,) * (array.ndim - 1)), array.shape, mesh)


def shape_of_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return the shape, the type and the place of an array of rows on the mesh, to compile programs with."""
    return _shape(array, place_of_rows(array, mesh))


def shape_of_whole(array: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """Return the shape, the type and the place of an array that every device has whole, to compile programs with."""
    return _shape(array, replicated(mesh))


def _shape(array: np.ndarray | np.generic, place: NamedSharding) -> jax.Array:
    # A program is prepared with shapes as it is called with arrays.
    return cast(jax.Array, jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place))


def check_mesh_divides(mesh: Mesh, model: ModelSizes) -> None:
    """Raise BadRequestError if the tensor axis cannot keep whole heads and equal slices of the feed-forward widths."""
    ways, sizes = mesh.shape["tensor"], (*model.head_counts, *model.hidden_widths)
    if any(size % ways for size in sizes):
        fits = [n for n in range(1, min(model.head_counts) + 1) if not any(size % n for size in sizes)]
        raise BadRequestError(
            f"EngineConfig.mesh['tensor'] is {ways}, but the model has "
            f"{' and '.join(map(str, model.head_counts))} key/value heads and a feed-forward width of "
            f"{' and '.join(map(str, model.hidden_widths))}; the tensor axis must divide them. "
            f"Sizes that do: {', '.join(map(str, fits))}."
        )
