"""Does the file behind a server stay within its size over restarts, and does it give space back to the disk?"""

from __future__ import annotations

import sqlite3
import stat
import time
from pathlib import Path

import pytest

from jax_client.server.state import request_log
from jax_client.server.state.request_log import FILE, RequestLog
from jax_client.server.wire.answers import Answer
from jax_client.sqlite_file import LOG, SqliteFile


def size(directory: Path) -> int:
    """The bytes of the file and of its log."""
    return sum(path.stat().st_size for path in directory.glob(f"{FILE}*") if not path.name.endswith("-shm"))


def answer(log: RequestLog, name: str, length: int) -> None:
    log.accepted(name, b"digest" * 5, "sample")
    log.answered(name, b"digest" * 5, "sample", Answer(body=name.encode().ljust(length, b".")))


def test_the_file_is_bounded_over_restarts(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --faults at full size: 200,000 answers of up to 12 KB over 20 restarts stay within 600 MB."""
    restarts, answers, limit = (20, 200_000, 600e6) if whole else (10, 3_000, 6e6)
    if not whole:
        monkeypatch.setattr(request_log, "MAX_BYTES", 5 * 2**20)
        monkeypatch.setattr(request_log, "_LOOK_EVERY", 2**18)
    largest = 0
    for life in range(restarts):
        log = RequestLog(tmp_path)
        for number in range(answers // restarts):
            name = f"session:sample:{life}:{number}"
            answer(log, name, (300, 4_200, 6_000, 12_000)[number % 4])
            if number % 500 == 499:
                log._batches.flush()
                largest = max(largest, size(tmp_path))
        log.close()
        largest = max(largest, size(tmp_path))
        found = RequestLog(tmp_path)
        newest = found.find(name)
        assert newest is not None and newest.answer is not None and newest.answer.body.startswith(name.encode())
        assert life < restarts - 1 or found.find("session:sample:0:0") is None, "the oldest are gone"
        found.close()
    assert largest < limit, f"{largest / 1e6:.0f} MB"


def test_few_answers_of_many_lives_are_pruned_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_ANSWERS", 50)
    for life in range(8):
        log = RequestLog(tmp_path)
        for number in range(40):
            answer(log, f"s:sample:{life}:{number}", 10)
        log.close()
    log = RequestLog(tmp_path)
    assert len(log._ids) == 50 and log.find("s:sample:7:39") is not None and log.find("s:sample:6:0") is None
    log.close()


def test_an_older_file_is_rewritten_once_and_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = SqliteFile(tmp_path / FILE, (request_log._SCHEMA,), busy_seconds=1.0).open()
    rows = [(f"s:sample:{i}", b"d", "sample", b"x" * 10_000, "t", 200, 0) for i in range(2_000)]
    older.executemany(
        "INSERT INTO promises (id, digest, kind, body, media_type, status, failed) VALUES (?,?,?,?,?,?,?)", rows
    )
    older.close()
    assert size(tmp_path) > 20e6
    (tmp_path / FILE).chmod(0o644)
    monkeypatch.setattr(request_log, "MAX_BYTES", 2 * 2**20)
    log = RequestLog(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 3e6, "what was deleted is given back"
    assert log.find("s:sample:1999") is not None and log.find("s:sample:0") is None
    log.close()
    database = sqlite3.connect(tmp_path / FILE)
    assert database.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)
    database.close()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_large_batch_of_answers_does_not_become_one_large_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MAX_BYTES", 8 * 2**20)
    monkeypatch.setattr(request_log, "_LOOK_EVERY", 2**20)
    log = RequestLog(tmp_path)
    for number in range(100):
        answer(log, f"s:sample:{number}", 2**20)
    log._batches.flush()
    assert (tmp_path / (FILE + LOG)).stat().st_size < 24e6
    assert size(tmp_path) < 40e6
    log.close()


def test_records_of_sessions_that_are_long_past_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog(tmp_path)
    names = [f"{i:036d}" for i in range(12)]
    for name in names:
        log.put("session", name, {"a": "x" * 100})
        log.put("sampler", f"{name}:sample:0", {"a": "x" * 100})
        time.sleep(0.002)
    log.put("model", f"{names[0]}:train:0", {"a": 1})
    log.close()
    monkeypatch.setattr(request_log, "MAX_RECORDS", 9)
    log = RequestLog(tmp_path)
    kept = [name for name in names if log.get("session", name) is not None]
    assert kept == [names[0], *names[-3:]], "those that were written to last"
    assert all(log.get("sampler", f"{name}:sample:0") is not None for name in kept)
    log.close()
