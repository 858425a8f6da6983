"""Are memory, disk, clock, cache and catalogue fit for long runs? One check looks at each."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jax_client.cli.doctor.finding import Finding
from jax_client.cli.options import open_store
from jax_client.cli.output import human_size, iso_time
from jax_client.config import default_compilation_cache_dir

_GIB = 2**30
# A 135M model trains in less; with less free memory the kernel begins to kill processes.
_LOW_MEMORY = 2 * _GIB
# A rank-32 checkpoint of an 8B model with Adam's moments takes about 1 GiB.
_LOW_DISK, _NO_DISK = 5 * _GIB, _GIB // 4
_CLOCK_SECONDS = 60


def memory() -> Iterator[Finding]:
    """Report what memory the host has left; a container's limit counts."""
    from jax_client.engine.core.memory import host_memory

    _, free = host_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    low = free < _LOW_MEMORY
    yield Finding(
        check="memory",
        status="WARN" if low else "OK",
        found=f"{human_size(free)} free, the machine has {human_size(total)}",
        advice="Loading a model passes through it: end other programs, or raise the container's limit." if low else "",
        details={"free_bytes": free, "total_bytes": total},
    )


def state_directory(home: Path) -> Iterator[Finding]:
    """Check that a checkpoint can be saved, and that the disk will keep it."""
    from jax_client.host.disk import network_file_system

    nearest = _nearest(home)
    missing = "" if nearest == home else ", which does not exist yet"
    details: dict[str, object] = {"path": str(home), "exists": os.path.isdir(home)}
    elsewhere = "choose another with --state-dir or $JAX_CLIENT_HOME."
    if (problem := _write_problem(nearest, missing != "")) is not None:
        found = f"{home}{missing}: {nearest} cannot be written to ({problem})"
        advice = f"Nothing can be saved: make it writable, or {elsewhere}"
        yield Finding(check="state dir", status="FAIL", found=found, advice=advice, details=details)
    elif (network := network_file_system(nearest)) is not None:
        advice = f"Locks and fsync may not hold there: {elsewhere}"
        details["file_system"] = network
        yield Finding(
            check="state dir", status="WARN", found=f"{home} lies on {network}", advice=advice, details=details
        )
    elif stat.S_IMODE(nearest.stat().st_mode) & stat.S_IWOTH and not missing:
        advice = f"Anyone can change checkpoints: chmod o-w {home}"
        yield Finding(
            check="state dir", status="WARN", found=f"{home} is writable for all users", advice=advice, details=details
        )
    else:
        yield Finding(check="state dir", found=f"{home}{missing}", details=details)
    free = shutil.disk_usage(nearest).free
    yield Finding(
        check="disk",
        status="FAIL" if free < _NO_DISK else "WARN" if free < _LOW_DISK else "OK",
        found=f"{human_size(free)} free for checkpoints",
        advice=f"Delete checkpoints (jax_client checkpoint list), or {elsewhere}" if free < _LOW_DISK else "",
        details={"free_bytes": free},
    )


def no_state_directory(why: str) -> Iterator[Finding]:
    """Report that there is no state directory, because none is named and this user has no home directory."""
    found, _, advice = why.partition(". ")
    yield Finding(check="state dir", status="FAIL", found=found, advice=advice)


def _nearest(path: Path) -> Path:
    # Not Path.is_dir, which raises where a parent may not be entered.
    return next(place for place in (path, *path.parents) if os.path.isdir(place))


def _write_problem(directory: Path, is_parent: bool) -> str | None:
    """Return why nothing can be written, synced and locked in a directory, or None. Only `access` looks at a parent."""
    if is_parent:
        return None if os.access(directory, os.W_OK | os.X_OK) else "permission denied"
    try:
        # The file has no name where the system allows that, so that even a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return None


def compilation_cache() -> Iterator[Finding]:
    """Report where compiled programs are kept, and whether other users could put programs there."""
    path = default_compilation_cache_dir()
    details: dict[str, object] = {"path": None if path is None else str(path)}
    elsewhere = "Every start compiles: set XDG_CACHE_HOME to a directory that this user may write to."
    if path is None:
        found = "there is no home directory for compiled programs"
        yield Finding(check="compile cache", status="WARN", found=found, advice=elsewhere, details=details)
        return
    try:
        nearest = _nearest(path)
        if (problem := _write_problem(nearest, nearest != path)) is not None:
            found = f"{path}: {nearest} cannot be written to ({problem})"
            yield Finding(check="compile cache", status="WARN", found=found, advice=elsewhere, details=details)
            return
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        yield Finding(check="compile cache", found=f"{path}, nothing is in it yet", details=details)
        return
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    details |= {"mode": f"{mode:o}", "size_bytes": sum(sizes), "entries": len(sizes)}
    risky = bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
    yield Finding(
        check="compile cache",
        status="WARN" if risky else "OK",
        found=f"{path}, {len(sizes)} files, {human_size(sum(sizes))}, mode {mode:o}",
        advice=f"Others can put programs there that you would run: chmod 700 {path}" if risky else "",
        details=details,
    )


def clock_and_catalogue(home: Path) -> Iterator[Finding]:
    """Compare the clock with what was saved before, and count what is in the state directory."""
    now, store = time.time(), open_store(home)
    runs, records = store.runs(), store.list()
    # The package's own files are older than now on a right clock. In an archive they have no time of their own.
    own = Path(__file__)
    newest = max([own.stat().st_mtime if own.is_file() else 0.0, *(record.created for record in records)])
    behind = newest - now
    details = {"now": iso_time(now), "newest": iso_time(newest)}
    wrong = behind > _CLOCK_SECONDS
    yield Finding(
        check="clock",
        status="WARN" if wrong else "OK",
        found=f"it says {iso_time(now)}, but something here was written at {iso_time(newest)}"
        if wrong
        else f"{iso_time(now)}",
        advice="Set the clock (timedatectl set-ntp true): times to live and listings depend on it." if wrong else "",
        details=details,
    )
    unreadable = len(store.everything()) - len(records)
    size = sum(record.size_bytes for record in records)
    found = f"{len(runs)} runs, {len(records)} checkpoints, {human_size(size)}"
    details = {"runs": len(runs), "checkpoints": len(records), "unreadable": unreadable, "size_bytes": size}
    harmed = unreadable > 0
    yield Finding(
        check="catalogue",
        status="WARN" if harmed else "OK",
        found=f"{found}; {unreadable} more cannot be read" if harmed else found,
        advice="Run: jax_client checkpoint verify, which names the damage." if harmed else "",
        details=details,
    )
