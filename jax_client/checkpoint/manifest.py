"""How is damage to a checkpoint noticed? A manifest lists every file of the checkpoint with its size and sha256.

The manifest is sealed JSON and is written last: a directory without a whole manifest is no checkpoint. Orbax has no
checksum of the data, so that a flipped bit would be read as another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from jax_client.checkpoint.disk import files, sealed
from jax_client.checkpoint.disk.hashes import EarlyHashes
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.errors import UnsupportedError
from jax_client.threads import Workers
from jax_client.values import CheckpointKey, JsonObject, LoraSpec

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
WORKERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint is, and its files.

    Attributes:
        key: which checkpoint it is; a directory that was moved is noticed.
        created: unix seconds.
        spec: of the adapter.
        step: optimizer steps taken.
        arrays: name to shape; all are float32. An export has none.
        metadata: the caller's, JSON.
        files: path below the checkpoint's directory to [size in bytes, sha256].
    """

    key: CheckpointKey
    created: float
    spec: LoraSpec
    step: int
    arrays: Mapping[str, tuple[int, ...]]
    metadata: JsonObject
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the checkpoint's files, the manifest aside."""
        return sum(size for size, _ in self.files.values())


def write(directory: Path, draft: Manifest, hashes: EarlyHashes) -> Manifest:
    """Write the manifest of `directory`, which is `draft` with every file that is there; return it.

    Its own bytes are durable then; those of the other files, and the directories' entries, as far as they were before.

    Args:
        directory: with everything else in it.
        draft: what it is.
        hashes: of the files so far.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    # Hashing leaves the interpreter alone.
    with Workers("jax_client-hash", WORKERS) as pool:
        listed = pool.map(hashes.of, paths)
    names = [path.relative_to(directory).as_posix() for path in paths]
    written = replace(draft, files=dict(zip(names, listed, strict=True)))
    files.write_new(directory / FILE_NAME, sealed.seal(_to_json(written), "metadata"))
    return written


def read(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; its files are not looked at.

    Raises:
        DamagedError: it is missing or damaged.
        UnsupportedError: a newer version of this package wrote it.
    """
    path = directory / FILE_NAME
    try:
        content = sealed.unseal(path.read_bytes(), str(path))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
    version = content.pop("format")
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}. "
            "Upgrade jax_client to the version that wrote it, or a later one."
        )
    key, content = split_key(content)
    content["spec"] = LoraSpec.from_json(content["spec"])
    content["arrays"] = {name: tuple(shape) for name, shape in content["arrays"].items()}
    content["files"] = {name: (size, digest) for name, (size, digest) in content["files"].items()}
    return Manifest(key=key, **content)


def split_key(fields: JsonObject) -> tuple[CheckpointKey, JsonObject]:
    """Return the key that JSON has as run_id, kind and name, and the other fields."""
    others = dict(fields)
    return CheckpointKey(others.pop("run_id"), others.pop("kind"), others.pop("name")), others


def _to_json(manifest: Manifest) -> JsonObject:
    fields = asdict(manifest)
    return {"format": FORMAT_VERSION, **fields.pop("key"), **fields}


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest, the whole bytes.

    Raises:
        DamagedError: the first file that is missing or differs.
    """
    with Workers("jax_client-hash", WORKERS) as pool:
        pool.map(lambda entry: _verify_file(directory, entry[0], *entry[1]), manifest.files.items())


def _verify_file(directory: Path, name: str, size: int, digest: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DamagedError(f"{directory / FILE_NAME} lists {name!r}, which is outside of the checkpoint")
    path = directory / name
    try:
        found = path.stat().st_size
        if found != size:
            raise DamagedError(f"{path} has {found} bytes instead of {size}")
        if files.sha256(path) != digest:
            raise DamagedError(f"{path} is damaged: its sha256 is not the one in {FILE_NAME}")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
