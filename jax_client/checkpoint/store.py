"""Where are checkpoints, and how does each call leave them whole?

    STATE/runs/RUN/run.json                     what is known of a run, sealed
    STATE/runs/RUN/KIND/NAME/000001/            one version of a checkpoint; the highest number counts
                                    arrays/     orbax
                                    manifest.json
A save fills a temporary directory, writes the manifest last, waits for the disk, and then renames the directory to
the next number: this rename is the commit. Only after it is an older version removed, so that a kill at any point
leaves the old or the new one whole. Reading a listing opens manifests only and starts no jax backend.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import files, manifest
from jax_client.checkpoint.manifest import DamagedError, Manifest
from jax_client.checkpoint.names import KINDS, checkpoint_directory, is_name, run_directory, run_id_of
from jax_client.engine.requests import AdapterState
from jax_client.errors import JaxClientError, NotFoundError, RequestFailedError, UnsupportedError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RUN_FILE = "run.json"
# Manifest, directories, and what the file system needs for itself.
_SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One checkpoint.

    Attributes:
        run_id, kind, name: where it is; kind is "weights" or "sampler_weights".
        created: unix seconds.
        size_bytes: on disk.
        metadata: what the saver gave, JSON.
    """

    run_id: str
    kind: str
    name: str
    created: float
    size_bytes: int
    metadata: dict[str, Any]


# Named here, because inside the class `list` is a method.
Records: TypeAlias = list[Record]
Runs: TypeAlias = list[tuple[str, dict[str, Any]]]


class CheckpointStore:
    """The checkpoints under a state directory. Thread-safe; several processes may share the directory.

    Args:
        state_dir: made when something is first saved.
    """

    def __init__(self, state_dir: Path) -> None:
        self._runs = Path(state_dir).absolute() / "runs"
        self._swept = False

    def save(
        self,
        *,
        run_id: str,
        kind: str,
        name: str,
        state: AdapterState,
        metadata: dict[str, Any],
        overwrite: bool = False,
    ) -> Record:
        """Write a checkpoint; on return it is durable.

        Raises:
            BadRequestError: a malformed name, or arrays or metadata that cannot be saved.
            RequestFailedError: the name is taken and `overwrite` is False (category user), or the disk failed
                (category server); earlier checkpoints are as they were.
        """
        directory = checkpoint_directory(self._runs, run_id, kind, name)
        run_place = run_directory(self._runs, run_id)
        arrays = array_files.flatten(state)
        draft = Manifest(
            run_id=run_id,
            kind=kind,
            name=name,
            created=time.time(),
            spec=state.spec,
            step=state.step,
            arrays={key: array.shape for key, array in arrays.items()},
            metadata=metadata,
        )
        manifest.seal({"metadata": metadata}, "metadata")
        try:
            files.make_directories(run_place)
            self._sweep_once()
            with files.locked(run_place):
                if not overwrite:
                    self._refuse_taken(directory, draft)
                return self._save(directory, draft, arrays)
        except JaxClientError:
            raise
        except Exception as error:
            # Orbax reports a failed write as ValueError, the system as OSError.
            raise RequestFailedError(
                f"checkpoint {kind}/{name} of run {run_id} was not saved: {_first_line(error)}. It needs about "
                f"{array_files.size_bytes(arrays)} bytes under {self._runs}, {_free_bytes(self._runs)} are free. "
                "Earlier checkpoints are as they were; make room or check the disk, and save again."
            ) from error

    def _refuse_taken(self, directory: Path, draft: Manifest) -> None:
        version = _newest_version(directory)
        if version is None:
            return
        try:
            taken = manifest.read(version)
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken.created))
            about = f"from step {taken.step}, saved {when}"
        except (DamagedError, UnsupportedError) as error:
            about = f"but cannot be read: {error}"
        raise RequestFailedError(
            f"checkpoint {draft.kind}/{draft.name} of run {draft.run_id} exists already ({about}); pass overwrite=True "
            "where the call takes it, or choose another name.",
            category="user",
        )

    def _save(self, directory: Path, draft: Manifest, arrays: dict[str, Any]) -> Record:
        files.make_directories(directory)
        need, free = array_files.size_bytes(arrays) + _SPARE_BYTES, _free_bytes(directory)
        if need > free:
            raise OSError(f"{need} bytes are needed, {free} are free")
        older = _versions(directory)
        number = max((int(path.name) for path in older), default=0) + 1
        with files.temporary_directory(directory) as temporary:
            array_files.write(temporary / array_files.DIRECTORY, arrays)
            written = manifest.write(temporary, draft)
            files.fsync_tree(temporary)
            files.move(temporary, directory / f"{number:06d}")
        for path in older:
            _remove_quietly(path)
        return _record(written)

    def _sweep_once(self) -> None:
        """Remove the leftovers of crashes, except in runs that another process is writing."""
        if self._swept:
            return
        self._swept = True
        for run_id in self._run_ids():
            directory = run_directory(self._runs, run_id)
            # Another user's run that cannot be tidied is no reason to refuse a save.
            with contextlib.suppress(OSError), files.locked(directory, wait=False) as held:
                if held:
                    kinds = [directory / kind for kind in KINDS]
                    for place in (directory, *kinds, *(child for kind in kinds for child in _children(kind))):
                        files.sweep(place)

    def load(self, run_id: str, kind: str, name: str) -> tuple[AdapterState, Record]:
        """Read a checkpoint after comparing every file with its hash.

        Raises:
            NotFoundError: there is none of this name.
            RequestFailedError: a file is missing or damaged; the message names it and the newest good checkpoint.
            UnsupportedError: a newer version of this package wrote it.
        """

        def read(version: Path) -> tuple[AdapterState, Record]:
            found = self._read_manifest(version, run_id, kind, name)
            manifest.verify(version, found)
            restored = array_files.read(version / array_files.DIRECTORY)
            shapes = {key: array.shape for key, array in restored.items()}
            if shapes != found.arrays or any(array.dtype != "float32" for array in restored.values()):
                raise DamagedError(f"{version / array_files.DIRECTORY} holds other arrays than its manifest lists")
            return array_files.unflatten(restored, found.spec, found.step), _record(found)

        return self._reading(run_id, kind, name, read)

    def record(self, run_id: str, kind: str, name: str) -> Record:
        """Return what is known of a checkpoint; its arrays are not looked at. Raises as `load` does."""
        return self._reading(
            run_id, kind, name, lambda version: _record(self._read_manifest(version, run_id, kind, name))
        )

    def verify(self, run_id: str, kind: str, name: str) -> Record:
        """Compare every file of a checkpoint with its hash, without reading arrays. Raises as `load` does."""

        def check(version: Path) -> Record:
            found = self._read_manifest(version, run_id, kind, name)
            manifest.verify(version, found)
            return _record(found)

        return self._reading(run_id, kind, name, check)

    def exists(self, run_id: str, kind: str, name: str) -> bool:
        """Say whether a checkpoint of this name was saved."""
        return _newest_version(checkpoint_directory(self._runs, run_id, kind, name)) is not None

    def list(self, run_id: str | None = None) -> Records:
        """Return the checkpoints of a run, or of all, oldest first; one with a damaged manifest is logged instead."""
        runs = self._run_ids() if run_id is None else [run_id]
        records = [record for run in runs for record in self._records(run)]
        return sorted(records, key=lambda record: (record.created, record.run_id, record.kind, record.name))

    def delete(self, run_id: str, kind: str, name: str) -> None:
        """Delete a checkpoint, damaged or not.

        Raises:
            NotFoundError: there is none of this name.
            RequestFailedError: the disk failed.
        """
        directory = checkpoint_directory(self._runs, run_id, kind, name)
        if _newest_version(directory) is None:
            raise self._not_found(run_id, kind, name)
        try:
            with files.locked(run_directory(self._runs, run_id)):
                files.remove(directory)
        except FileNotFoundError:
            raise self._not_found(run_id, kind, name) from None
        except OSError as error:
            raise RequestFailedError(
                f"checkpoint {kind}/{name} of run {run_id} was not deleted: {_first_line(error)}. "
                f"Check that {directory.parent} is writable."
            ) from error

    def put_run(self, run_id: str, metadata: dict[str, Any]) -> None:
        """Keep what is known of a run, durably, replacing what was kept before.

        Raises:
            BadRequestError: a malformed id, or metadata that JSON cannot hold.
            RequestFailedError: the disk failed.
        """
        directory = run_directory(self._runs, run_id)
        data = manifest.seal({"run_id": run_id, "metadata": metadata}, "metadata")
        try:
            files.make_directories(directory)
            with files.locked(directory):
                files.replace(directory / _RUN_FILE, data)
        except OSError as error:
            raise RequestFailedError(
                f"run {run_id} was not recorded: {_first_line(error)}. Check that {directory} is writable and has room."
            ) from error

    def run(self, run_id: str) -> dict[str, Any]:
        """Return what was kept of a run.

        Raises:
            NotFoundError: nothing was kept.
            RequestFailedError: the file is damaged.
        """
        path = run_directory(self._runs, run_id) / _RUN_FILE
        try:
            return manifest.unseal(path.read_bytes(), str(path))["metadata"]
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"there is no run {run_id!r} under {self._runs}; list the runs to see what is."
            ) from None
        except (DamagedError, OSError) as error:
            raise RequestFailedError(f"run {run_id}: {error}. Its checkpoints can still be loaded.") from error

    def runs(self) -> Runs:
        """Return every run with what was kept of it; a damaged entry is logged, not listed."""
        found: Runs = []
        for run_id in self._run_ids():
            try:
                found.append((run_id, self.run(run_id)))
            except NotFoundError:
                continue
            except RequestFailedError as error:
                logger.warning("%s", error)
        return found

    def _run_ids(self) -> Iterable[str]:
        ids = (run_id_of(path) for path in _children(self._runs))
        return sorted(run_id for run_id in ids if run_id is not None)

    def _records(self, run_id: str) -> Iterator[Record]:
        for kind in KINDS:
            for directory in _children(run_directory(self._runs, run_id) / kind):
                if not is_name(directory.name) or _newest_version(directory) is None:
                    continue
                try:
                    yield self.record(run_id, kind, directory.name)
                except (NotFoundError, UnsupportedError, RequestFailedError) as error:
                    logger.warning("%s", error)

    def _read_manifest(self, version: Path, run_id: str, kind: str, name: str) -> Manifest:
        found = manifest.read(version)
        if (found.run_id, found.kind, found.name) != (run_id, kind, name):
            raise DamagedError(
                f"{version / manifest.FILE_NAME} is that of {found.kind}/{found.name} of run {found.run_id}"
            )
        return found

    def _reading(self, run_id: str, kind: str, name: str, read: Callable[[Path], T]) -> T:
        directory = checkpoint_directory(self._runs, run_id, kind, name)
        while True:
            version = _newest_version(directory)
            if version is None:
                raise self._not_found(run_id, kind, name)
            try:
                return read(version)
            except UnsupportedError:
                raise
            except Exception as error:
                # An overwrite or delete by another thread or process takes files away under a reader.
                if _newest_version(directory) != version:
                    continue
                good = self._newest_good(run_id, kind, name)
                raise RequestFailedError(
                    f"checkpoint {kind}/{name} of run {run_id} cannot be loaded: {_first_line(error)}. "
                    + (
                        f"The newest good checkpoint of this run is {good}."
                        if good
                        else "This run has no other good one."
                    )
                ) from error

    def _newest_good(self, run_id: str, kind: str, name: str) -> str | None:
        candidates = []
        for other in KINDS:
            for directory in _children(run_directory(self._runs, run_id) / other):
                version = _newest_version(directory)
                if version is None or (other, directory.name) == (kind, name):
                    continue
                try:
                    found = self._read_manifest(version, run_id, other, directory.name)
                except (DamagedError, UnsupportedError):
                    continue
                candidates.append((found.created, version, found))
        # One that can be loaded the same way comes before a newer one of the other kind.
        candidates.sort(key=lambda candidate: (candidate[2].kind == kind, candidate[0]), reverse=True)
        for _, version, found in candidates:
            try:
                manifest.verify(version, found)
                return f"{found.kind}/{found.name}"
            except DamagedError:
                continue
        return None

    def _not_found(self, run_id: str, kind: str, name: str) -> NotFoundError:
        names = [path.name for path in _children(run_directory(self._runs, run_id) / kind) if _newest_version(path)]
        there = f"of this kind it has {', '.join(names)}" if names else "it has none of this kind"
        return NotFoundError(f"run {run_id!r} has no checkpoint {kind}/{name} under {self._runs}; {there}.")


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _versions(directory: Path) -> list[Path]:
    return [path for path in _children(directory) if path.name.isascii() and path.name.isdigit()]


def _newest_version(directory: Path) -> Path | None:
    return max(_versions(directory), key=lambda path: int(path.name), default=None)


def _record(found: Manifest) -> Record:
    return Record(
        run_id=found.run_id,
        kind=found.kind,
        name=found.name,
        created=found.created,
        size_bytes=found.size_bytes,
        metadata=dict(found.metadata),
    )


def _remove_quietly(directory: Path) -> None:
    # The commit is done: what cannot be removed now is removed by a later save.
    try:
        files.remove(directory)
    except OSError as error:
        logger.warning("the older version %s could not be removed: %s", directory, error)


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
