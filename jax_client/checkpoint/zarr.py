"""How are arrays saved at the end of a program? The calling thread alone writes the files that orbax would write.

Orbax starts threads for every save, which Python refuses then. Its directory is simple where nothing
is compressed or merged: a folder for each array with its bytes and a description (zarr, version 2), and two JSON files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.values import JsonObject

TREE = "_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def write(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into the new directory `directory`; not yet durable.

    Args:
        directory: its parent is there.
        arrays: float32, by name; "/" in a name makes folders.
    """
    began = time.time_ns()
    directory.mkdir()
    for name, array in arrays.items():
        place = directory / name
        place.mkdir(parents=True)
        (place / ".zarray").write_text(json.dumps(_description(array), separators=(",", ":")))
        np.ascontiguousarray(array, "<f4").tofile(place / _chunk(array.ndim))
    entry = {"value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False}}
    tree = {f"{(name,)}": {"key_metadata": [{"key": name, "key_type": 2}]} | entry for name in sorted(arrays)}
    kind = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (directory / TREE).write_text(json.dumps({"tree_metadata": tree, **kind, "custom_metadata": None}))
    item = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": began}
    item |= {"commit_timestamp_nsecs": time.time_ns(), "custom_metadata": {}}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(item))


def read(directory: Path) -> dict[str, np.ndarray]:
    """Read what `write`, or orbax for this package, wrote.

    Raises:
        DamagedError: the directory is of another form.
    """
    tree = json.loads((directory / TREE).read_text())["tree_metadata"].values()
    names = ["/".join(key["key"] for key in each["key_metadata"]) for each in tree]
    return {name: _read_array(directory / name) for name in names}


def _read_array(place: Path) -> np.ndarray:
    described = json.loads((place / ".zarray").read_text())
    shape = tuple(described["shape"])
    if described != _description(np.empty(shape, np.float32)):
        raise DamagedError(f"{place / '.zarray'} describes an array of another form than this package writes")
    return np.fromfile(place / _chunk(len(shape)), "<f4").reshape(shape)


def _description(array: np.ndarray) -> JsonObject:
    shape = list(array.shape)
    form = {"compressor": None, "dimension_separator": ".", "dtype": "<f4", "fill_value": None, "filters": None}
    return {"chunks": shape, **form, "order": "C", "shape": shape, "zarr_format": 2}


def _chunk(dimensions: int) -> str:
    """Return the name of an array's only chunk."""
    return ".".join(["0"] * max(dimensions, 1))
