"""Do arrays that are written without orbax equal those that it writes, file by file, and does each read the other's?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import zarr
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.store import CheckpointStore
from support.checkpoints import assert_same, key, make_state, save

# The times of writing, and the temporary directory's path.
CHANGING = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in CHANGING]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def assert_equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == np.float32 and got[name].shape == array.shape
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_both_write_the_same_files_and_read_each_others(tmp_path: Path) -> None:
    arrays = array_files.group_arrays(make_state(1))
    array_files.write(tmp_path / "orbax", arrays)
    zarr.write(tmp_path / "plain", arrays)
    assert files(tmp_path / "plain") == files(tmp_path / "orbax")
    assert json.loads((tmp_path / "plain" / "_CHECKPOINT_METADATA").read_text()).keys() == (
        json.loads((tmp_path / "orbax" / "_CHECKPOINT_METADATA").read_text()).keys()
    )
    assert_equal(zarr.read(tmp_path / "orbax"), arrays)
    assert_equal(array_files.read(tmp_path / "plain"), arrays)


def test_what_is_saved_while_pools_are_shut_loads_in_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, "with-orbax", 2)
    with monkeypatch.context() as patch:
        patch.setattr(array_files, "pools_serve", lambda: False)
        save(store, "without", 3)
        assert_same(store.load(key("with-orbax"))[0], make_state(2))
        assert_same(store.load(key("without"))[0], make_state(3))
    assert_same(store.load(key("without"))[0], make_state(3))


def test_a_pool_that_shuts_during_a_save_does_not_fail_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serves = iter([True, False, False])
    monkeypatch.setattr(array_files, "pools_serve", lambda: next(serves))

    def interrupted(directory: Path, arrays: object) -> None:
        (directory.parent / f"{directory.name}.orbax-checkpoint-tmp").mkdir()
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(array_files, "_write_with_orbax", interrupted)
    save(CheckpointStore(tmp_path), "mine", 4)
    monkeypatch.undo()
    assert_same(CheckpointStore(tmp_path).load(key("mine"))[0], make_state(4))
    assert not list(tmp_path.rglob("*.orbax-checkpoint-tmp"))


def test_another_form_is_not_read_as_numbers(tmp_path: Path) -> None:
    zarr.write(tmp_path / "plain", {"weights/a": np.ones((2, 3), np.float32)})
    place = tmp_path / "plain" / "weights" / "a" / ".zarray"
    place.write_text(place.read_text().replace('"chunks":[2,3]', '"chunks":[1,3]'))
    with pytest.raises(DamagedError, match=r"weights/a/\.zarray describes an array of another form"):
        zarr.read(tmp_path / "plain")
