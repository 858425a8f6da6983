"""How does a write outlast a loss of power? It is synced, and then named by one rename.

A file is durable after an fsync of the file and one of its directory. Readers see a rename at once or not at all. Every
change that the store makes to the disk, orbax's own writing aside, goes through this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from jax_client.errors import RequestFailedError, UnsupportedError
from jax_client.host.disk import LOCAL_DISK, file_system

TEMPORARY = ".tmp-"
# What flock says where a file system has no locks. Others mean that it has them, and that they do not work now.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def make_directories(path: Path, root: Path) -> None:
    """Make a directory and its parents, for this user only, and make those durable that were there already.

    A directory that is there may have been made by a process that was killed before it waited for the disk.

    Args:
        path: absolute.
        root: of what this user keeps; entries above it that are there already are taken as durable.
    """
    for directory in (*reversed(path.parents), path):
        is_there = directory.is_dir()
        if not is_there:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
        if not is_there or directory.is_relative_to(root):
            # What lies above the root may be another user's, and closed.
            with contextlib.suppress(PermissionError):
                fsync(directory.parent)


def make_private(directory: Path, known: Callable[[str], bool]) -> int | None:
    """Let no other user read a directory, or what is in it; return the wider mode that it had, None for none.

    Args:
        directory: one that is there.
        known: `known(name) -> bool` of an entry that this package makes. A directory with others is for other uses too.

    Raises:
        UnsupportedError: it belongs to another user, or has unknown entries; nothing was changed.
    """
    status = os.stat(directory)
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o077:
        return None
    name = f"{directory} has mode {mode:04o}, so that other users may read it,"
    if status.st_uid != os.geteuid():
        raise UnsupportedError(f"{name} and belongs to another user; name a directory of your own, or one that is new.")
    unknown = sorted(entry for entry in os.listdir(directory) if not known(entry))
    if unknown:
        raise UnsupportedError(
            f"{name} and holds more than this package's files ({len(unknown)} entries, such as {unknown[0]!r}); name a "
            f"directory that is new, or close this one with chmod 700 {directory}"
        )
    os.chmod(directory, 0o700)
    for parent, folders, names in os.walk(directory):
        for entry in (*folders, *names):
            path = os.path.join(parent, entry)
            # It may go while others are looked at; a link has no mode of its own.
            with contextlib.suppress(OSError):
                found = os.lstat(path)
                if not stat.S_ISLNK(found.st_mode) and found.st_mode & 0o077:
                    os.chmod(path, stat.S_IMODE(found.st_mode) & 0o700)
    return mode


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Wait until every file below `directory` is on the disk, then every directory, from the bottom up."""
    for parent, _, files in os.walk(directory, topdown=False):
        for file in files:
            fsync(Path(parent, file))
        fsync(Path(parent))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, and wait until its bytes are on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Rename a file or directory within one file system, durably.

    A file replaces a file; a directory replaces only an empty one, else OSError.
    """
    os.rename(source, target)
    fsync(target.parent)


def replace(path: Path, data: bytes) -> None:
    """Write a file, replacing an older one: a reader sees all of the old or all of the new."""
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        write_new(temporary, data)
        move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def share(source: str, target: str) -> None:
    """Give a file, which never changes, a second name; copy it where there are no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def free_bytes(path: Path) -> int:
    """Return what the file system of a path, which need not be there, has room for."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def remove(directory: Path) -> None:
    """Remove a directory at once for readers, then its contents; leftovers of a crash are temporary ones."""
    trash = directory.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    move(directory, trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a directory for writing, against other threads and processes; yield whether it is held.

    The system gives the lock back when its holder dies.

    Raises:
        UnsupportedError: the file system has no locks.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield lock(descriptor, directory, wait=wait)
    finally:
        unlock(descriptor)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Mark a file as in use, for `is_read` in other processes. Never waits; without locks it marks nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        unlock(descriptor)


def is_read(path: Path) -> bool:
    """Return whether a process is `reading` a file; it is opened for writing, as a network's exclusive locks need."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not lock(descriptor, path, wait=False)
    finally:
        unlock(descriptor)


def lock(descriptor: int, place: Path, *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file for this descriptor, until it is closed; return False if another one has it.

    Args:
        descriptor: of the file, open for writing; for reading, if it is `shared`.
        place: what is locked, for the message.
        wait: for as long as it takes.
        shared: against a lock that is for one descriptor alone, which is the other kind; any number hold it at once.

    Raises:
        UnsupportedError: the file system has no locks.
        RequestFailedError: its locks do not work.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        kind = f"{place} lies on a file system of type {file_system(place)}"
        if error.errno in _NO_LOCKS:
            raise UnsupportedError(
                f"{kind}, which has no file locks ({error}), so that two processes could write one run. {LOCAL_DISK}"
            ) from error
        raise RequestFailedError(f"{kind}, and could not be locked: {error}. {LOCAL_DISK}") from error
    return True


def unlock(descriptor: int, *, close: bool = True) -> None:
    """Give a lock back and close its file. Closing alone would leave it to processes forked in the meantime."""
    with contextlib.suppress(OSError):  # no locks there
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    if close:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """Make a directory under `parent` to be filled and moved away; removed if it is still there at the end."""
    path = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    os.mkdir(path, 0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what crashes left under `parent`, whose lock the caller holds."""
    for path in parent.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
