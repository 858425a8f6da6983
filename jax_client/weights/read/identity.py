"""Are a model's files what they were? Their inodes, sizes, times and contents are compared."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TypeAlias

from jax_client.weights.read import hf, safetensors
from jax_client.weights.read.gguf import present_parts, read_gguf
from jax_client.weights.read.source import ModelSource

Stamp: TypeAlias = tuple[tuple[str | int, ...], ...]

# Blocks of a file that its fingerprint covers.
SAMPLES, SAMPLE_BYTES = 64, 4096
# File systems keep times in steps of up to two seconds: a file may change again within its newest time.
COARSEST_TIME_NS = 2 * 10**9
# How the names begin of what is read beside the weights: here, and by transformers for the tokenizer.
_READ = (
    hf.CONFIG,
    "generation_config",
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
)


def stamp(source: ModelSource) -> Stamp | None:
    """Return name, device, inode, bytes and times of every file of a model; equal stamps mean equal files.

    None where a file has changed within the last two seconds: it may change again without another stamp.
    """
    entries: list[tuple[str | int, ...]] = []
    for path in _files(source):
        status = path.stat()
        if abs(time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)) < COARSEST_TIME_NS:
            return None
        place = (status.st_dev, status.st_ino, status.st_size)
        entries.append((path.name, *place, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(entries)


def identity(source: ModelSource) -> str:
    """Return a name for the files of a model as they are now.

    Weights written anew have another identity, even where their `fingerprint` is the same: it covers a sample of them.
    The configuration and the tokenizer count by every byte, so a copy of equal files makes no difference.
    """
    digest = hashlib.sha256(fingerprint(source).encode())
    for path in _files(source):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} ".encode())
        if path.suffix in (".safetensors", ".gguf"):
            digest.update(f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} ".encode())
        else:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint(source: ModelSource) -> str:
    """Return a name for the weights: equal for copies of the files anywhere, different for other weights.

    It is a sha256 over each file's size, header and 64 evenly spaced blocks of 4 KiB, not over all bytes: two
    fine-tunes differ in nearly every block, while a full hash would take as long as loading.
    """
    if source.kind == "gguf":
        files = list(read_gguf(source.path).parts)
    else:
        files = [(s, min(e.begin for e in safetensors.read_header(s).values())) for s in hf.shards(source.path)]
    digest = hashlib.sha256()
    for path, header_bytes in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(header_bytes))
            for i in range(SAMPLES):
                file.seek(header_bytes + (size - header_bytes) * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files(source: ModelSource) -> list[Path]:
    """Return the files that a load may read: weights, configuration, tokenizer; no other file beside them."""
    if source.kind == "gguf":
        return present_parts(source.path)
    names = [name for name in sorted(os.listdir(source.path)) if name == hf.INDEX or name.startswith(_READ)]
    beside = [path for name in names if (path := source.path / name).is_file()]
    return [*hf.shards(source.path), *beside, *sorted((source.path / hf.NAMED_TEMPLATES).glob("*.jinja"))]
