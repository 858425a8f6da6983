"""What should a user do about a disk that refuses to lock, sync or write? `advice` says it for every error.

A network's file system may have no locks, no fsync or no shared memory for SQLite, and it has many errors for that.
The advice for all of them is a local disk. A full disk and a directory of another user's have their own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "fuse.", "beegfs", "gpfs")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_SETTINGS = "EngineConfig.state_dir (or JAX_CLIENT_HOME, or --state-dir)"
LOCAL_DISK = f"Set {_SETTINGS} to a local disk, and EngineConfig.mirror to keep copies elsewhere."
# SQLite's codes for what it cannot open or write: forbidden, or on a disk that does not do what SQLite needs.
_SQLITE_CLOSED = (sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def advice(error: BaseException, place: Path) -> str:
    """Return what to do after an error of the disk, as one or two sentences.

    Args:
        error: an OSError, an error of SQLite, or another one whose cause or text names the system's error.
        place: the file or directory in question.
    """
    code = _code(error, place)
    if code in (errno.EMFILE, errno.ENFILE):
        return "This process has too many files open: raise its limit (ulimit -n 4096) and start it again."
    if code in _FULL:
        return f"Make room there, or set {_SETTINGS} to a directory with more of it."
    if code in _FORBIDDEN:
        return f"User id {os.geteuid()} cannot write to {place}: set {_SETTINGS} to a directory that it may write to."
    kind = file_system(place)
    weak = ", which may not lock or sync" if kind.startswith(NETWORK_FILE_SYSTEMS) else ", perhaps a network's"
    return f"{place} lies on a file system of type {kind}{weak}. {LOCAL_DISK}"


def free_share(place: Path) -> float | None:
    """Return the free share of the disk of a path, None where that is not known."""
    try:
        found = os.statvfs(place)
    except OSError:
        return None
    return found.f_bavail / found.f_blocks if found.f_blocks else None


def _code(error: BaseException, place: Path) -> int | None:
    """Return the system's number of an error: its own, its causes', or of the text that it quotes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if isinstance(seen, sqlite3.Error):
            # The last byte is the kind. Python raises some errors itself, without a code.
            kind = (getattr(seen, "sqlite_errorcode", None) or 0) & 0xFF
            closed = kind in _SQLITE_CLOSED and not os.access(place.parent, os.W_OK | os.X_OK)
            return errno.EACCES if closed else errno.ENOSPC if kind == sqlite3.SQLITE_FULL else None
        seen = seen.__cause__ or seen.__context__
    # Writers in C++ report the system's text alone.
    return next((code for code in (*_FULL, *_FORBIDDEN) if os.strerror(code) in str(error)), None)


def file_system(path: Path) -> str:
    """Return the type of the file system that holds a path, such as "ext4" or "nfs4"; "unknown" where nothing tells."""
    path = Path(os.path.realpath(path))  # a link may lead to another file system
    found, length = "unknown", -1
    with contextlib.suppress(OSError, ValueError):
        for line in MOUNTS.read_text().splitlines():
            left, right = line.split(" - ", 1)
            mounted = Path(left.split()[4].replace("\\040", " "))
            # The last of several mounts in one place is the one that is seen.
            if path.is_relative_to(mounted) and len(mounted.parts) >= length:
                found, length = right.split()[0], len(mounted.parts)
    return found


def network_file_system(path: Path) -> str | None:
    """Return the type of the file system that holds a path if it is a network's, else None."""
    found = file_system(path)
    return found if found.startswith(NETWORK_FILE_SYSTEMS) else None
