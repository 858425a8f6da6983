"""How does an adapter's state become an orbax directory? Its arrays are written under "group/name", bit for bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jax_client.checkpoint import zarr
from jax_client.errors import BadRequestError
from jax_client.threads import pools_serve
from jax_client.values import AdapterState, LoraSpec

DIRECTORY = "arrays"
_GROUPS = ("weights", "mu", "nu")


def group_arrays(state: AdapterState) -> dict[str, np.ndarray]:
    """Return the arrays of a state under "group/name", such as "weights/q.A".

    Raises:
        BadRequestError: there is none, or one is not a float32 array with at least one element.
    """
    arrays: dict[str, np.ndarray] = {}
    for group in _GROUPS:
        for name, array in (getattr(state, group) or {}).items():
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.size == 0:
                raise BadRequestError(
                    f"AdapterState.{group}[{name!r}] is {type(array).__name__} "
                    f"{getattr(array, 'dtype', '')} {getattr(array, 'shape', '')}; give non-empty float32 arrays."
                )
            arrays[f"{group}/{name}"] = array
    if not state.weights:
        raise BadRequestError("AdapterState.weights is empty; there is nothing to save.")
    return arrays


def ungroup_arrays(arrays: Mapping[str, np.ndarray], spec: LoraSpec, step: int) -> AdapterState:
    """Undo `group_arrays`; a group without arrays is None."""
    groups = {
        group: {key.removeprefix(f"{group}/"): array for key, array in arrays.items() if key.startswith(f"{group}/")}
        for group in _GROUPS
    }
    return AdapterState(
        spec=spec, step=step, weights=groups["weights"], mu=groups["mu"] or None, nu=groups["nu"] or None
    )


def size_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Return the bytes of the arrays."""
    return sum(math.prod(array.shape) * array.itemsize for array in arrays.values())


class _Unchanging(np.ndarray):
    """An array that is never written to. Orbax copies every other array before it continues in the background."""

    def __deepcopy__(self, memo: object) -> _Unchanging:
        return self


class InterruptedWriteError(Exception):
    """The main module ended while orbax wrote: written again, into another directory, it will be whole. Internal."""


# What orbax logs at every save without OCDBT, and what its threads log when the main module ends during a save.
_UNWANTED = ("Skipping merge of OCDBT checkpoints", "cannot schedule new futures", "can't create new thread")


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in _UNWANTED)


def write(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into the new directory `directory`; not yet durable.

    Orbax writes them on threads that it starts for each save. When Python gives it none any more, from the end of the
    main module on, the same files are written without it; so they are in a process that leads other hosts, where orbax
    would wait for these, of which one may be gone.

    Raises:
        InterruptedWriteError: the main module ended meanwhile. Threads of orbax may still write to `directory`.
    """
    if not _orbax_serves():
        zarr.write(directory, arrays)
        return
    try:
        _write_with_orbax(directory, arrays)
    except Exception as error:
        if pools_serve():
            raise
        raise InterruptedWriteError from error


def _orbax_serves() -> bool:
    # Here: a process that only lists checkpoints imports no jax.
    from jax_client.engine.devices.current import leads

    return pools_serve() and leads() is None


def _write_with_orbax(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    # Orbax takes seconds to import; a process that only lists checkpoints does without it.
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_wanted)
    # Measured with the state of a rank-32 adapter of a small model, 117 MB: OCDBT writes everything twice to merge what
    # several processes wrote, and trained float32 numbers compress by 8 % in as long as writing them takes.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave({n: a.view(_Unchanging) for n, a in arrays.items()}))


def read(directory: Path) -> dict[str, np.ndarray]:
    """Read the arrays that `write` wrote, without a device; as there, with or without orbax."""
    if not _orbax_serves():
        return zarr.read(directory)
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return dict(checkpointer.restore(directory))
    except Exception:
        if pools_serve():
            raise
        return zarr.read(directory)
