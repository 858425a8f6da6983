"""Does the lock of a run tell the process that has it from those that look at it, however many look?"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_client.checkpoint.disk import files, run_lock
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import RequestFailedError
from support.checkpoints import RUN


def test_who_looks_is_not_taken_for_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.lock_run(RUN).release()
    (path,) = tmp_path.rglob(run_lock.FILE_NAME)
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)  # in the middle of its look
    record = store.lock_record(RUN)
    assert record is not None and not record.held and record.how == "closed" and store.lock_holder(RUN) is None
    clock = [0.0]
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += 100 * seconds
        if clock[0] > 4 * run_lock._PATIENCE_SECONDS:
            files.unlock(looking, close=False)

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    claim = store.lock_run(RUN)
    assert clock[0] > 4 * run_lock._PATIENCE_SECONDS, "it waited for those that look"
    os.close(looking)
    began = clock[0]
    with pytest.raises(RequestFailedError, match="is open in process"):
        store.lock_run(RUN)
    assert clock[0] - began < 4 * run_lock._PATIENCE_SECONDS, "an owner is not waited for as long"
    claim.release()


LOOK = """
import sys, threading
from pathlib import Path
from jax_client.checkpoint.disk import run_lock
place, stop = Path(sys.argv[1]), Path(sys.argv[2])
seen = []
def look():
    while not stop.exists():
        seen.append(run_lock.lock_record(place).held)
threads = [threading.Thread(target=look) for _ in range(3)]
[each.start() for each in threads]
print("looks", flush=True)
[each.join() for each in threads]
print(len(seen), sum(seen))
"""


def test_many_that_look_neither_open_a_run_nor_keep_its_owner_out(tmp_path: Path) -> None:
    def looked(times: int) -> list[list[int]]:
        """Have two processes look until the run was opened some times; return how often each looked, and saw it open"""
        (tmp_path / "stop").unlink(missing_ok=True)
        command = [sys.executable, "-c", LOOK, str(tmp_path), str(tmp_path / "stop")]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "looks\n"
        for _ in range(times):
            claim = run_lock.acquire(tmp_path)
            holder = run_lock.lock_holder(tmp_path)
            assert holder is not None and holder.pid == os.getpid()
            claim.release()
        seen = [run_lock.lock_record(tmp_path) for _ in range(200)]
        assert not any(record is None or record.held for record in seen), "it has ended"
        (tmp_path / "stop").touch()
        return [[int(word) for word in child.communicate(timeout=60)[0].split()] for child in children]

    run_lock.acquire(tmp_path).release()
    for looks, held in looked(0):
        assert looks > 0 and held == 0
    assert all(looks > 0 for looks, _ in looked(20))


def test_a_run_is_looked_at_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that is mounted for reading; where flock stands for fcntl's locks, an exclusive one needs writing."""
    store = CheckpointStore(tmp_path)
    store.lock_run(RUN).release()
    open_file, flock, writable = os.open, fcntl.flock, set()

    def read_only(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, flags, *mode, **more)

    def emulated(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and descriptor not in writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", emulated)
    with monkeypatch.context() as patch:
        patch.setattr("os.open", read_only)
        record = store.lock_record(RUN)
    assert record is not None and (record.held, record.how) == (False, "closed")

    def noted(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        descriptor = open_file(path, flags, *mode, **more)
        (writable.add if flags & os.O_RDWR else writable.discard)(descriptor)
        return descriptor

    monkeypatch.setattr("os.open", noted)
    (path,) = tmp_path.rglob(run_lock.FILE_NAME)
    with files.reading(path):
        assert files.is_read(path)
    assert not files.is_read(path)
    store.lock_run(RUN).release()
