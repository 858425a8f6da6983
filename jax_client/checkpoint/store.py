"""How does each call leave the checkpoints under a state directory whole? `names` says where they are.

A save fills a temporary directory, writes the manifest last, waits for the disk, and then renames the directory to
the next number: this rename is the commit. Only after it is an older version removed, so that a kill at any point
leaves the old or the new one whole. The files are the truth: a listing remembers what manifests said, a mirror copies
them. None of this starts a jax backend.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import manifest, tags
from jax_client.checkpoint.disk import clock, files, sealed
from jax_client.checkpoint.disk.clock import Deadline
from jax_client.checkpoint.disk.hashes import EarlyHashes
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.index_cache import Key
from jax_client.checkpoint.manifest import Manifest, split_key
from jax_client.checkpoint.names import checkpoint_directory, children, newest_version, run_directory, versions
from jax_client.checkpoint.state_directory import StateDirectory, first_line, stamp
from jax_client.checkpoint.tags import Tags
from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, RequestFailedError, UnsupportedError
from jax_client.values import KINDS, AdapterState, CheckpointKey, Kind, is_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXPORT_DIRECTORY = "files"
# Manifest, directories, and what the file system needs for itself.
_SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One checkpoint.

    Attributes:
        key: its run, kind and name.
        created: unix seconds.
        step: optimizer steps taken.
        size_bytes: on disk.
        metadata: what the saver gave, JSON.
        expires_at: unix seconds, None for never.
        public: as `set_public` left it.
    """

    key: CheckpointKey
    created: float
    step: int
    size_bytes: int
    metadata: dict[str, Any]
    expires_at: float | None = None
    public: bool = False

    @property
    def run_id(self) -> str:
        """The run of the key."""
        return self.key.run_id

    @property
    def kind(self) -> Kind:
        """The kind of the key."""
        return self.key.kind

    @property
    def name(self) -> str:
        """The name of the key."""
        return self.key.name

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, its key as three fields."""
        fields = asdict(self)
        return fields.pop("key") | fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Record:
        """Undo `to_json`."""
        key, others = split_key(fields)
        return cls(key=key, **others)


# Named here, because inside the class `list` is a method.
Records: TypeAlias = list[Record]
Keys: TypeAlias = list[CheckpointKey]
Fill: TypeAlias = Callable[[Path], None]


class CheckpointStore(StateDirectory):
    """The checkpoints under a state directory. Thread-safe; several processes may share the directory.

    Args:
        state_dir: made when something is first saved.
        mirror: an fsspec URL where every checkpoint is copied after its commit, and found again when it is gone here.

    Raises:
        BadRequestError: the mirror's URL cannot be opened.
    """

    def __init__(self, state_dir: Path, mirror: str | None = None) -> None:
        super().__init__(state_dir, mirror)
        self._swept = False

    def save(
        self,
        *,
        key: CheckpointKey,
        state: AdapterState,
        metadata: dict[str, Any],
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
        arrays = array_files.flatten(state)
        draft = _draft(key, state, metadata)
        draft = replace(draft, arrays={name: array.shape for name, array in arrays.items()})
        fill = lambda directory: array_files.write(directory / array_files.DIRECTORY, arrays)  # noqa: E731
        return self._commit(draft, fill, array_files.size_bytes(arrays), overwrite, ttl_seconds)

    def save_files(
        self,
        *,
        key: CheckpointKey,
        state: AdapterState,
        metadata: dict[str, Any],
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
        draft = _draft(key, state, metadata)
        return self._commit(draft, fill, size_bytes, overwrite=False, ttl_seconds=ttl_seconds)

    def copy(self, key: CheckpointKey, *, to_run: str, ttl_seconds: float | None = None) -> Record:
        """Copy a checkpoint into another run, under the same name; its files are shared.

        Raises:
            As `load` and `save`.
        """

        def work(version: Path) -> Record:
            found = self._read_manifest(version, key)

            def fill(directory: Path) -> None:
                for part in (array_files.DIRECTORY, EXPORT_DIRECTORY):
                    if (version / part).is_dir():
                        shutil.copytree(version / part, directory / part, copy_function=files.share)
                # What was linked, and not the source, whose name another process may have taken over meanwhile.
                manifest.verify(directory, found)

            draft = replace(found, key=replace(key, run_id=to_run))
            return self._commit(draft, fill, found.size_bytes, False, ttl_seconds)

        return self._reading(key, work)

    def _commit(
        self, draft: Manifest, fill: Fill, size_bytes: int, overwrite: bool, ttl_seconds: float | None
    ) -> Record:
        key = draft.key
        directory = checkpoint_directory(self._runs, key)
        run_place = run_directory(self._runs, key.run_id)
        sealed.seal({"metadata": draft.metadata}, "metadata")
        try:
            self._make(run_place)
            self._sweep_once()
            with files.locked(run_place):
                if not overwrite:
                    self._refuse_taken(directory, draft)
                record = self._write_version(directory, draft, fill, size_bytes, ttl_seconds)
        except (JaxClientError, DamagedError):
            raise
        except Exception as error:
            # Orbax reports a failed write as ValueError, the system as OSError.
            raise RequestFailedError(
                f"{key.in_words} was not saved: {first_line(error)}. It needs about "
                f"{size_bytes} bytes under {self._runs}, {files.free_bytes(self._runs)} are free. "
                "Earlier checkpoints are as they were; make room or check the disk, and save again."
            ) from error
        version = newest_version(directory)
        if self._mirror is not None and version is not None:
            self._mirror.push(key, version)
        return record

    def _refuse_taken(self, directory: Path, draft: Manifest) -> None:
        version = newest_version(directory)
        if version is None:
            return
        try:
            taken = manifest.read(version)
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken.created))
            state = f"from step {taken.step}, saved {when}"
        except (DamagedError, UnsupportedError) as error:
            state = f"but cannot be read: {error}"
        raise RequestFailedError(
            f"{draft.key.in_words} exists already ({state}); pass overwrite=True "
            "where the call takes it, or choose another name.",
            category="user",
        )

    def _write_version(
        self, directory: Path, draft: Manifest, fill: Fill, size_bytes: int, ttl_seconds: float | None
    ) -> Record:
        self._make(directory)
        need, free = size_bytes + _SPARE_BYTES, files.free_bytes(directory)
        if need > free:
            raise OSError(f"{need} bytes are needed, {free} are free")
        older = versions(directory)
        number = int(older[-1].name) + 1 if older else 1
        expires = None if ttl_seconds is None else Deadline.after(ttl_seconds, clock.now())
        # An overwrite is the same checkpoint to those it was published to.
        tag = Tags(expires=expires, public=bool(older) and tags.read_or_none_set(older[-1]).public)
        with files.temporary_directory(directory) as temporary:
            with EarlyHashes(temporary) as hashes:
                fill(temporary)
            written = manifest.write(temporary, draft, hashes)
            if tag != Tags():
                tags.write(temporary, tag)
            files.fsync_tree(temporary)
            version = directory / f"{number:06d}"
            try:
                files.move(temporary, version)
            except OSError:
                # Renamed perhaps, but not durably: what is reported as not saved must not be there.
                if version.exists():
                    _remove_quietly(version)
                raise
        for path in older:
            _remove_quietly(path)
        return _record(written, tag)

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
                    places = [directory]
                    for kind in KINDS:
                        for child in children(directory / kind):
                            places += [child, *versions(child)]
                        places.append(directory / kind)
                    for place in places:
                        files.sweep(place)

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
                found = self._read_manifest(version, key)
                manifest.verify(version, found)
                restored = array_files.read(version / array_files.DIRECTORY)
            shapes = {name: array.shape for name, array in restored.items()}
            if shapes != found.arrays or any(array.dtype != "float32" for array in restored.values()):
                raise DamagedError(f"{version / array_files.DIRECTORY} holds other arrays than its manifest lists")
            tag = tags.read_or_none_set(version)
            return array_files.unflatten(restored, found.spec, found.step), _record(found, tag)

        return self._reading(key, read)

    def record(self, key: CheckpointKey) -> Record:
        """Return what is known of a checkpoint; its arrays are not looked at. Raises as `load` does."""

        def read(version: Path) -> Record:
            found = self._read_manifest(version, key)
            return _record(found, tags.read_or_none_set(version))

        return self._reading(key, read)

    def verify(self, key: CheckpointKey) -> Record:
        """Compare every file of a checkpoint with its hash, without reading arrays. Raises as `load` does."""

        def check(version: Path) -> tuple[Record, str]:
            found = self._read_manifest(version, key)
            manifest.verify(version, found)
            try:
                return _record(found, tags.read(version)), ""
            except DamagedError as error:
                return _record(found, Tags()), str(error)

        record, problem = self._reading(key, check)
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
            found = self._read_manifest(version, key)
            manifest.verify(version, found)
            return {file.removeprefix(f"{EXPORT_DIRECTORY}/"): version / file for file in found.files}

        return self._reading(key, check)

    def exists(self, key: CheckpointKey) -> bool:
        """Return whether a checkpoint of this name is on this disk."""
        return newest_version(checkpoint_directory(self._runs, key)) is not None

    def list(self, run_id: str | None = None) -> Records:
        """Return the checkpoints of a run, or of all, oldest first; one with a damaged manifest is logged instead."""
        ids = self._run_ids() if run_id is None else [run_id]
        places = {key: version for one in ids for key, version in self._newest_versions(one)}
        stamps = {
            astuple(key): stamp(version / manifest.FILE_NAME, version / tags.FILE_NAME)
            for key, version in places.items()
        }

        def read(row: Key) -> Mapping[str, Any] | None:
            try:
                return self.record(CheckpointKey(*row)).to_json()
            except (NotFoundError, UnsupportedError, RequestFailedError) as error:
                logger.warning("%s", error)
                return None

        found = self._catalogue.look_up("checkpoints", stamps, read, run_id)
        records = [Record.from_json(entry) for entry in found]
        return sorted(records, key=lambda record: (record.created, record.key))

    def everything(self) -> Keys:
        """Return the key of every checkpoint, those too whose manifest is damaged; only names are read."""
        return [key for run_id in self._run_ids() for key, _ in self._newest_versions(run_id)]

    def set_ttl(self, key: CheckpointKey, ttl_seconds: float | None) -> Record:
        """Let a checkpoint end `ttl_seconds` from now, or never (None). Raises as `delete` does."""
        expires = None if ttl_seconds is None else Deadline.after(ttl_seconds, clock.now())
        return self._relabel(key, lambda tag: replace(tag, expires=expires))

    def set_public(self, key: CheckpointKey, public: bool) -> Record:
        """Publish a checkpoint, or take that back. Raises as `delete` does."""
        return self._relabel(key, lambda tag: replace(tag, public=public))

    def _relabel(self, key: CheckpointKey, change: Callable[[Tags], Tags]) -> Record:
        self.record(key)
        directory = checkpoint_directory(self._runs, key)
        try:
            with files.locked(run_directory(self._runs, key.run_id)):
                version = newest_version(directory)
                if version is None:
                    raise self._not_found(key)
                tags.write(version, change(tags.read_or_none_set(version)))
        except OSError as error:
            raise RequestFailedError(
                f"{key.in_words} was not changed: {first_line(error)}. Check that {directory} is writable and has room."
            ) from error
        if self._mirror is not None:
            self._mirror.push_label(key, version / tags.FILE_NAME)
        return self.record(key)

    def delete(self, key: CheckpointKey) -> None:
        """Delete a checkpoint, damaged or not, here and in the mirror.

        Raises:
            NotFoundError: there is none of this name.
            RequestFailedError: the disk failed.
        """
        directory = checkpoint_directory(self._runs, key)
        if newest_version(directory) is None:
            raise self._not_found(key)
        try:
            with files.locked(run_directory(self._runs, key.run_id)):
                files.remove(directory)
        except FileNotFoundError:
            raise self._not_found(key) from None
        except OSError as error:
            raise RequestFailedError(
                f"{key.in_words} was not deleted: {first_line(error)}. Check that {directory.parent} is writable."
            ) from error
        if self._mirror is not None:
            self._mirror.delete(key)

    def sweep_expired(self) -> None:
        """Delete the checkpoints whose deadline has passed for certain (see `clock`) and that no process is reading."""
        for record in self.list():
            if record.expires_at is None:
                continue
            directory = checkpoint_directory(self._runs, record.key)
            try:
                with files.locked(run_directory(self._runs, record.run_id), wait=False) as held:
                    if held and self._ends_now(directory):
                        files.remove(directory)
                        if self._mirror is not None:
                            self._mirror.delete(record.key)
            except OSError as error:
                logger.warning("the expired checkpoint %s could not be deleted: %s", directory, error)

    def _ends_now(self, directory: Path) -> bool:
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

    def repair(self) -> int:
        """Make the catalogue anew from the files; return how many checkpoints there are."""
        self._catalogue.forget_all()
        self.runs()
        return len(self.list())

    def _newest_versions(self, run_id: str) -> Iterator[tuple[CheckpointKey, Path]]:
        try:
            for kind in KINDS:
                for directory in children(run_directory(self._runs, run_id) / kind):
                    version = newest_version(directory) if is_name(directory.name) else None
                    if version is not None:
                        yield CheckpointKey(run_id, kind, directory.name), version
        except OSError as error:  # such as another user's run; the others are no worse for it
            logger.warning("the checkpoints of run %s could not be listed: %s", run_id, first_line(error))

    def _read_manifest(self, version: Path, key: CheckpointKey) -> Manifest:
        found = manifest.read(version)
        if found.key != key:
            raise DamagedError(
                f"{version / manifest.FILE_NAME} is that of {found.key.checkpoint_id} of run {found.key.run_id}"
            )
        return found

    def _reading(self, key: CheckpointKey, read: Callable[[Path], T]) -> T:
        directory = checkpoint_directory(self._runs, key)
        while True:
            version = newest_version(directory) or self._restored(directory, key)
            if version is None:
                raise self._not_found(key)
            identity = _identity(version)
            try:
                found = read(version)
                # A name that was deleted and saved again has the same numbers; parts of both may have been read.
                if _identity(version) in (identity, None):
                    return found
            except JaxClientError:
                raise
            except Exception as error:
                # An overwrite or delete by another thread or process takes files away under a reader.
                if newest_version(directory) != version or _identity(version) != identity:
                    continue
                good = self._newest_good(key)
                raise RequestFailedError(
                    f"{key.in_words} cannot be loaded: {first_line(error)}. "
                    + (
                        f"The newest good checkpoint of this run is {good}."
                        if good
                        else "This run has no other good one."
                    )
                ) from error

    def _restored(self, directory: Path, key: CheckpointKey) -> Path | None:
        """Bring a checkpoint back from the mirror; None if it has none."""
        if self._mirror is None:
            return None
        try:
            self._make(directory)
            with (
                files.locked(run_directory(self._runs, key.run_id)),
                files.temporary_directory(directory) as temporary,
            ):
                # Another process may have brought it back while this one waited.
                if (version := newest_version(directory)) is not None:
                    return version
                if not self._mirror.fetch(key, temporary):
                    return None
                manifest.verify(temporary, self._read_manifest(temporary, key))
                files.fsync_tree(temporary)
                files.move(temporary, directory / "000001")
        except Exception as error:
            raise RequestFailedError(
                f"{key.in_words} is not on this disk and could not be brought back from "
                f"{self._mirror.url}: {first_line(error)}."
            ) from error
        finally:
            # Neither a name that is nowhere nor a failure leaves an empty directory.
            for place in (directory, directory.parent):
                with contextlib.suppress(OSError):
                    os.rmdir(place)
        logger.info("%s was brought back from %s", key.in_words, self._mirror.url)
        return directory / "000001"

    def _newest_good(self, key: CheckpointKey) -> str | None:
        candidates = []
        for other, version in self._newest_versions(key.run_id):
            if other == key:
                continue
            try:
                candidates.append((version, self._read_manifest(version, other)))
            except (DamagedError, UnsupportedError):
                continue
        # One that can be loaded the same way comes before a newer one of the other kind.
        candidates.sort(key=lambda candidate: (candidate[1].key.kind == key.kind, candidate[1].created), reverse=True)
        for version, found in candidates:
            try:
                manifest.verify(version, found)
                return found.key.checkpoint_id
            except DamagedError:
                continue
        return None

    def _not_found(self, key: CheckpointKey) -> NotFoundError:
        places = children(run_directory(self._runs, key.run_id) / key.kind)
        names = [path.name for path in places if newest_version(path)]
        others = f"of this kind it has {', '.join(names)}" if names else "it has none of this kind"
        return NotFoundError(f"run {key.run_id!r} has no checkpoint {key.checkpoint_id} under {self._runs}; {others}.")


def _check_export(key: CheckpointKey) -> None:
    if key.kind != "external_weights":
        raise BadRequestError(f"{key.in_words} is no export; give a key of kind external_weights.")


def _draft(key: CheckpointKey, state: AdapterState, metadata: dict[str, Any]) -> Manifest:
    return Manifest(
        key=key,
        created=time.time(),
        spec=state.spec,
        step=state.step,
        arrays={},
        metadata=metadata,
    )


def _record(found: Manifest, tag: Tags) -> Record:
    return Record(
        key=found.key,
        created=found.created,
        step=found.step,
        size_bytes=found.size_bytes,
        metadata=dict(found.metadata),
        expires_at=None if tag.expires is None else tag.expires.wall,
        public=tag.public,
    )


def _identity(version: Path) -> tuple[int, int] | None:
    """Return what tells a version from another one of the same number, None if it is gone."""
    try:
        found = os.stat(version / manifest.FILE_NAME)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _remove_quietly(directory: Path) -> None:
    # The commit is done: what cannot be removed now is removed by a later save.
    try:
        files.remove(directory)
    except OSError as error:
        logger.warning("the older version %s could not be removed: %s", directory, error)
