"""Does every error of a network's disk lead to the same advice, and cost nothing but what cannot be saved?"""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import JaxClientError, RequestFailedError, UnsupportedError
from jax_client.host import disk
from jax_client.metrics.store import MetricsStore, Point
from jax_client.sqlite_file import LOG
from support.checkpoints import RUN, save
from support.faults.fault_child import Calls

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
NETWORK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.EPROTO)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, refused)


@pytest.mark.parametrize("code", [*NO_LOCKS, *NETWORK, *FORBIDDEN], ids=errno.errorcode.get)
def test_every_error_of_a_lock_names_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None, code: int
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, "kept")
    with monkeypatch.context() as patch:
        refuse(patch, "fcntl.flock", code)
        for call in (lambda: save(store, "a"), lambda: store.lock_run(RUN), lambda: store.put_run(RUN, {})):
            with pytest.raises(JaxClientError) as caught:
                call()
            assert isinstance(caught.value, UnsupportedError if code in NO_LOCKS else RequestFailedError)
            assert str(caught.value).endswith(disk.LOCAL_DISK) and os.strerror(code) in str(caught.value)
        store.sweep_expired()
    assert [record.name for record in store.list()] == ["kept"]
    save(store, "a")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, *NETWORK, *FULL], ids=errno.errorcode.get)
def test_every_error_of_a_sync_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None, code: int
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, "kept")
    with monkeypatch.context() as patch:
        refuse(patch, "os.fsync", code)
        for call in (lambda: save(store, "a"), lambda: store.put_run(RUN, {}), lambda: store.lock_run("1:train:0")):
            with pytest.raises(RequestFailedError) as caught:
                call()
            said = str(caught.value)
            assert ("Make room there, or set EngineConfig.state_dir" if code in FULL else disk.LOCAL_DISK) in said
    assert [record.name for record in store.list()] == ["kept"]
    save(store, "a")


SQLITE = """
import logging, pathlib, sys
from jax_client.sqlite_file import SqliteFile

logging.basicConfig(format="%(message)s")
file = SqliteFile(pathlib.Path(sys.argv[1]), ("CREATE TABLE t (x INTEGER)",), busy_seconds=0.01, unused="not recorded")
for _ in range(2):
    print(file.use(lambda database: database.execute("INSERT INTO t VALUES (1)").rowcount, "nothing"))
"""


@pytest.mark.parametrize(
    ("calls", "code"),
    [(Calls.LOCKS, errno.ENOLCK), (Calls.LOCKS, errno.EIO), (Calls.SYNCS, errno.EIO), (Calls.CREATES, errno.ESTALE)],
)
def test_every_error_of_sqlite_is_reported_once_with_the_advice(
    tmp_path: Path, library: Path, calls: Calls, code: int
) -> None:
    refused = {"LD_PRELOAD": str(library), "FAULT_PLAN": f"{tmp_path} {int(calls)} {code}"}
    child = [sys.executable, "-c", textwrap.dedent(SQLITE), str(tmp_path / "metrics.sqlite")]
    done = subprocess.run(child, env=os.environ | refused, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["nothing", "nothing"], done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("not recorded: ") and line.endswith(disk.LOCAL_DISK)


READING = """
import logging, pathlib, sys
from jax_client.metrics.store import MetricsStore

logging.basicConfig(format="%(message)s")
store = MetricsStore(pathlib.Path(sys.argv[1]))
for _ in range(2):
    print(store.summaries()["r"].step if store.summaries() else "nothing", len(store.read("r").points))
"""


@pytest.mark.parametrize(("calls", "code"), [(Calls.CREATES, errno.EROFS), (Calls.ALL, errno.ENOSPC)])
def test_metrics_are_read_where_nothing_can_be_written(tmp_path: Path, library: Path, calls: Calls, code: int) -> None:
    path = tmp_path / "metrics #1?.sqlite"
    store = MetricsStore(path)
    assert store.add([Point(run="r", kind="step", step=step, time=1.0, metrics={"a": 1.0}) for step in (1, 2)])
    refused = {"LD_PRELOAD": str(library), "FAULT_PLAN": f"{tmp_path} {int(calls)} {code}"}
    child = [sys.executable, "-c", textwrap.dedent(READING), str(path)]

    def read() -> tuple[list[str], list[str]]:
        done = subprocess.run(child, env=os.environ | refused, capture_output=True, text=True, timeout=60)
        return done.stdout.splitlines(), done.stderr.splitlines()

    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert read() == (["2 2", "2 2"], [])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # What a process that was killed left in the log cannot be left out.
    database, log = sqlite3.connect(path, isolation_level=None), path.with_name(path.name + LOG)
    database.execute("UPDATE points SET time = 2.0")
    kept = log.read_bytes()
    database.close()
    log.write_bytes(kept)
    said, (line,) = read()
    assert said == ["nothing 0", "nothing 0"]
    assert line.startswith(f"a file is not read: {path}: ") and f"Some of it is in {log.name}, which" in line
    assert "not recorded" not in line, "it only reads"


def test_advice_finds_the_systems_error_wherever_it_is_said(tmp_path: Path) -> None:
    cause = OSError(errno.EDQUOT, "quota")
    wrapped = ValueError("could not write")
    wrapped.__cause__ = cause
    for full in (cause, wrapped, ValueError(f"writer: {os.strerror(errno.ENOSPC)}")):
        assert disk.advice(full, tmp_path).startswith("Make room there")
    for forbidden in (OSError(errno.EROFS, "read-only"), ValueError(os.strerror(errno.EACCES))):
        assert f"User id {os.geteuid()} cannot write to {tmp_path}" in disk.advice(forbidden, tmp_path)
    assert "ulimit -n" in disk.advice(OSError(errno.EMFILE, "too many"), tmp_path)
    assert disk.advice(ValueError("odd"), tmp_path).endswith(disk.LOCAL_DISK)
