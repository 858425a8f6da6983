"""What can be done with the checkpoints under a state directory? They are saved, read, listed, copied and deleted.

The files are the truth: `writing` commits them, `reading` finds them, a listing remembers what manifests said, and a
mirror copies them. `disk/names` says where they are. None of this starts a jax backend.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import manifest, tags
from jax_client.checkpoint.disk import clock, files
from jax_client.checkpoint.disk.clock import Deadline
from jax_client.checkpoint.disk.names import checkpoint_directory, newest_version, run_directory, run_ids
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.index_cache import Row, stamp
from jax_client.checkpoint.manifest import Manifest
from jax_client.checkpoint.reading import read_manifest
from jax_client.checkpoint.record import Record
from jax_client.checkpoint.state_directory import OWNER, StateDirectory
from jax_client.checkpoint.tags import Tags
from jax_client.checkpoint.writing import CheckpointWriter, Draft, Fill
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError, UnsupportedError, first_line
from jax_client.host.disk import advice
from jax_client.values import AdapterState, CheckpointKey, JsonObject, Owner

logger = logging.getLogger(__name__)

T = TypeVar("T")
EXPORT_DIRECTORY = "files"

# Named here, because inside the class `list` is a method.
Records: TypeAlias = list[Record]
Keys: TypeAlias = list[CheckpointKey]


class CheckpointStore(StateDirectory):
    """The checkpoints under a state directory. Thread-safe; several processes may share the directory.

    Args:
        state_dir: made when something is first saved.
        mirror: an fsspec URL where every checkpoint is copied after its commit, and found again when it is gone here.
        owner: whose checkpoints there are; those of others are as if they were not there, but that public ones can be
            read. None is for all.

    Raises:
        BadRequestError: the mirror's URL cannot be opened.
    """

    def __init__(self, state_dir: Path, mirror: str | None = None, owner: Owner | None = None) -> None:
        super().__init__(state_dir, mirror, owner)
        self._writer = CheckpointWriter(self._runs, self._mirror)

    def save(
        self,
        *,
        key: CheckpointKey,
        state: AdapterState,
        metadata: JsonObject,
        overwrite: bool = False,
        ttl_seconds: float | None = None,
    ) -> Record:
        """Write a checkpoint; on return it is durable on this disk.

        Raises:
            BadRequestError: a malformed name, or arrays or metadata that cannot be saved.
            RequestFailedError: the name is taken and `overwrite` is False (category user), or the disk failed
                (category server); earlier checkpoints are as they were.
            UnsupportedError: the file system has no locks.
        """
        arrays = array_files.group_arrays(state)
        shapes = {name: array.shape for name, array in arrays.items()}
        draft = Draft(
            manifest=_manifest(key, state, self._labelled(metadata), shapes),
            fill=lambda directory: array_files.write(directory / array_files.DIRECTORY, arrays),
            size_bytes=array_files.size_bytes(arrays),
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
        )
        return self._writer.commit(draft)

    def save_files(
        self,
        *,
        key: CheckpointKey,
        state: AdapterState,
        metadata: JsonObject,
        write: Fill,
        size_bytes: int,
        ttl_seconds: float | None = None,
    ) -> Record:
        """Write an export, of kind "external_weights": whatever `write` puts into the new directory it is given.

        Args:
            key: of kind "external_weights".
            state: the adapter, for what the manifest says about it.
            metadata: JSON.
            write: called once.
            size_bytes: about as much as it will write.
            ttl_seconds: None keeps it.

        Raises:
            As `save`, and what `write` raises on purpose.
        """

        def fill(directory: Path) -> None:
            os.mkdir(directory / EXPORT_DIRECTORY, 0o700)
            write(directory / EXPORT_DIRECTORY)

        _check_export(key)
        found = _manifest(key, state, self._labelled(metadata), {})
        return self._writer.commit(Draft(manifest=found, fill=fill, size_bytes=size_bytes, ttl_seconds=ttl_seconds))

    def copy(self, key: CheckpointKey, *, to_run: str, ttl_seconds: float | None = None) -> Record:
        """Copy a checkpoint into another run, under the same name; its files are shared.

        Raises:
            As `load` and `save`.
        """

        def work(version: Path) -> Record:
            found = read_manifest(version, key)

            def fill(directory: Path) -> None:
                for part in (array_files.DIRECTORY, EXPORT_DIRECTORY):
                    if (version / part).is_dir():
                        shutil.copytree(version / part, directory / part, copy_function=files.share)
                # What was linked, and not the source, whose name another process may have taken over meanwhile.
                manifest.verify(directory, found)

            metadata = self._labelled(found.metadata)
            copied = replace(found, key=replace(key, run_id=to_run), metadata=metadata)
            size = found.size_bytes
            return self._writer.commit(Draft(manifest=copied, fill=fill, size_bytes=size, ttl_seconds=ttl_seconds))

        return self._read(key, work)

    def _read(self, key: CheckpointKey, work: Callable[[Path], T], *, others: bool = True) -> T:
        """Return `work(version)`, as the reader does, for a checkpoint that may be read.

        Without `others`, and of another owner's run, no error names the run's other checkpoints.
        """
        own = self.has_run(key.run_id)
        if not own and not self._is_public(key):
            raise self._reader.not_found(key, others=False)
        return self._reader.read(key, work, others=own and others)

    def _is_public(self, key: CheckpointKey) -> bool:
        version = newest_version(checkpoint_directory(self._runs, key))
        return version is not None and tags.read_or_none_set(version).public

    def _check_own(self, key: CheckpointKey) -> None:
        """Raise NotFoundError for a checkpoint that is another owner's, public or not."""
        if not self.has_run(key.run_id):
            raise self._reader.not_found(key, others=False)

    def load(self, key: CheckpointKey) -> tuple[AdapterState, Record]:
        """Read a checkpoint after comparing every file with its hash.

        Raises:
            BadRequestError: it is an export.
            NotFoundError: there is none of this name, here or in the mirror.
            RequestFailedError: a file is missing or damaged; the message names it and the newest good checkpoint.
            UnsupportedError: a newer version of this package wrote it.
        """
        if key.kind == "external_weights":
            raise BadRequestError(
                f"{key.in_words} is an export, which is not loaded from here. Load what "
                "save_state saved, or import the exported files as a new run."
            )

        def read(version: Path) -> tuple[AdapterState, Record]:
            with files.reading(version / manifest.FILE_NAME):
                found = read_manifest(version, key)
                manifest.verify(version, found)
                restored = array_files.read(version / array_files.DIRECTORY)
            shapes = {name: array.shape for name, array in restored.items()}
            if shapes != found.arrays or any(array.dtype != "float32" for array in restored.values()):
                raise DamagedError(f"{version / array_files.DIRECTORY} holds other arrays than its manifest lists")
            tag = tags.read_or_none_set(version)
            return array_files.ungroup_arrays(restored, found.spec, found.step), Record.of(found, tag)

        return self._read(key, read)

    def record(self, key: CheckpointKey) -> Record:
        """Return what is known of a checkpoint; its arrays are not looked at. Raises as `load` does."""
        return self._read(key, lambda version: _record(version, key))

    def verify(self, key: CheckpointKey) -> Record:
        """Compare every file of a checkpoint with its hash, without reading arrays. Raises as `load` does."""

        def check(version: Path) -> tuple[Record, str]:
            found = read_manifest(version, key)
            manifest.verify(version, found)
            try:
                return Record.of(found, tags.read(version)), ""
            except DamagedError as error:
                return Record.of(found, Tags()), str(error)

        record, problem = self._read(key, check)
        if problem:
            raise RequestFailedError(
                f"{key.in_words} can be loaded, but {problem}. Until its lifetime or "
                "visibility is set again, it is private and does not expire."
            )
        return record

    def exported_files(self, key: CheckpointKey) -> dict[str, Path]:
        """Return the files of an export after comparing them with their hashes, by name. Raises as `load` does."""
        _check_export(key)

        def check(version: Path) -> dict[str, Path]:
            found = read_manifest(version, key)
            manifest.verify(version, found)
            return {file.removeprefix(f"{EXPORT_DIRECTORY}/"): version / file for file in found.files}

        return self._read(key, check)

    def exported_file(self, key: CheckpointKey, name: str) -> Path:
        """Return where the file `name` of an export lies, as the manifest says; it is not read. Raises as `load` does.

        Raises:
            NotFoundError: the export has no such file.
        """
        _check_export(key)

        def find(version: Path) -> Path:
            file = f"{EXPORT_DIRECTORY}/{name}"
            if file not in read_manifest(version, key).files:
                raise NotFoundError(f"{key.in_words} has no file {name!r}.")
            return version / file

        # Whoever has a link to the export asks for it, without a key.
        return self._read(key, find, others=False)

    def exists(self, key: CheckpointKey) -> bool:
        """Return whether a checkpoint of this name is on this disk."""
        return newest_version(checkpoint_directory(self._runs, key)) is not None

    def list(self, run_id: str | None = None) -> Records:
        """Return the checkpoints of a run, or of all, oldest first; one with a damaged manifest is logged instead.

        With an owner, its own.
        """
        records, owner = self._all_records(run_id), self._owner
        if owner is None:
            return records
        if run_id is not None:
            return records if self.has_run(run_id) else []
        named = {each: owner.has(metadata.get(OWNER)) for each, metadata in self._all_runs()}
        return [each for each in records if named.get(each.run_id, owner.has(each.metadata.get(OWNER)))]

    def _all_records(self, run_id: str | None = None) -> Records:
        ids = run_ids(self._runs) if run_id is None else [run_id]
        keys, stamps = {}, {}
        for key, version in (found for one in ids for found in self._reader.newest_versions(one)):
            row = (key.run_id, key.kind, key.name)
            keys[row] = key
            stamps[row] = stamp(version / manifest.FILE_NAME, version / tags.FILE_NAME)

        def read(row: Row) -> JsonObject | None:
            try:
                key = keys[row]
                return self._reader.read(key, lambda version: _record(version, key)).to_json()
            except (NotFoundError, UnsupportedError, RequestFailedError) as error:
                logger.warning("%s", error)
                return None

        found = self._index.look_up("checkpoints", stamps, read, run_id)
        records = [Record.from_json(entry) for entry in found]
        return sorted(records, key=lambda record: (record.created, record.key))

    def everything(self) -> Keys:
        """Return the key of every checkpoint, those too whose manifest is damaged; only names are read."""
        return [key for run_id in run_ids(self._runs) for key, _ in self._reader.newest_versions(run_id)]

    def set_ttl(self, key: CheckpointKey, ttl_seconds: float | None) -> Record:
        """Let a checkpoint end `ttl_seconds` from now, or never (None). Raises as `delete` does."""
        expires = None if ttl_seconds is None else Deadline.after(ttl_seconds, clock.now())
        return self._set_tags(key, lambda tag: replace(tag, expires=expires, deleted=False, former=None))

    def delete_after(self, key: CheckpointKey, seconds: float) -> Record:
        """Let a checkpoint end soon, which `restore` takes back; one of which that is said stays as it is.

        The lifetime that it had is kept beside it, whichever process asks. Raises as `delete` does.
        """
        deadline = Deadline.after(seconds, clock.now())

        def change(tag: Tags) -> Tags:
            return tag if tag.deleted else replace(tag, expires=deadline, deleted=True, former=tag.expires)

        return self._set_tags(key, change)

    def restore(self, key: CheckpointKey) -> Record:
        """Take `delete_after` back; another lifetime that was set since then stays. Raises as `delete` does."""

        def change(tag: Tags) -> Tags:
            return replace(tag, expires=tag.former, deleted=False, former=None) if tag.deleted else tag

        return self._set_tags(key, change)

    def set_public(self, key: CheckpointKey, public: bool) -> Record:
        """Publish a checkpoint, or take that back. Raises as `delete` does."""
        return self._set_tags(key, lambda tag: replace(tag, public=public))

    def _set_tags(self, key: CheckpointKey, change: Callable[[Tags], Tags]) -> Record:
        self._check_own(key)
        self.record(key)
        directory = checkpoint_directory(self._runs, key)
        try:
            with files.locked(run_directory(self._runs, key.run_id)):
                version = newest_version(directory)
                if version is None:
                    raise self._reader.not_found(key)
                tags.write(version, change(tags.read_or_none_set(version)))
        except OSError as error:
            raise RequestFailedError(
                f"{key.in_words} was not changed: {first_line(error)}. {advice(error, directory)}"
            ) from error
        if self._mirror is not None:
            self._mirror.push_tags(key, version / tags.FILE_NAME)
        return self.record(key)

    def delete(self, key: CheckpointKey) -> None:
        """Delete a checkpoint, damaged or not, here and in the mirror.

        Raises:
            NotFoundError: there is none of this name.
            RequestFailedError: the disk failed.
        """
        self._check_own(key)
        directory = checkpoint_directory(self._runs, key)
        if newest_version(directory) is None:
            raise self._reader.not_found(key)
        try:
            with files.locked(run_directory(self._runs, key.run_id)):
                files.remove(directory)
        except FileNotFoundError:
            raise self._reader.not_found(key) from None
        except OSError as error:
            raise RequestFailedError(
                f"{key.in_words} was not deleted: {first_line(error)}. {advice(error, directory.parent)}"
            ) from error
        if self._mirror is not None:
            self._mirror.delete(key)

    def sweep_expired(self) -> None:
        """Delete the checkpoints whose deadline has passed for certain (see `clock`) and that no process is reading."""
        for record in self._all_records():
            if record.expires_at is None:
                continue
            directory = checkpoint_directory(self._runs, record.key)
            try:
                with files.locked(run_directory(self._runs, record.run_id), wait=False) as held:
                    if held and _ends_now(directory):
                        files.remove(directory)
                        if self._mirror is not None:
                            self._mirror.delete(record.key)
            except (OSError, RequestFailedError) as error:
                logger.warning("the expired checkpoint %s could not be deleted: %s", directory, error)

    def repair(self) -> int:
        """Make the catalogue anew from the files; return how many checkpoints there are."""
        self._index.forget_all()
        self.runs()
        return len(self.list())


def _record(version: Path, key: CheckpointKey) -> Record:
    return Record.of(read_manifest(version, key), tags.read_or_none_set(version))


def _check_export(key: CheckpointKey) -> None:
    if key.kind != "external_weights":
        raise BadRequestError(f"{key.in_words} is no export; give a key of kind external_weights.")


def _manifest(
    key: CheckpointKey, state: AdapterState, metadata: JsonObject, arrays: Mapping[str, tuple[int, ...]]
) -> Manifest:
    return Manifest(
        key=key,
        created=time.time(),
        spec=state.spec,
        step=state.step,
        arrays=arrays,
        metadata=metadata,
    )


def _ends_now(directory: Path) -> bool:
    version, moment = newest_version(directory), clock.now()
    if version is None:
        return False
    tag = tags.read_or_none_set(version)
    if tag.expires is None:
        return False
    if not tag.expires.passed(moment):
        observed = tag.expires.observed(moment)
        if observed != tag.expires:
            tags.write(version, replace(tag, expires=observed))
        return False
    return not files.is_read(version / manifest.FILE_NAME)
