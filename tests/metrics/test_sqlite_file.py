"""Does a SQLite file migrate once, and is it moved away only when it is damaged?"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jax_client.sqlite_file import LOG, OtherVersionError, SqliteFile, is_damage, reclaim, transaction, used_bytes

FIRST = "CREATE TABLE items (name TEXT NOT NULL);"
SECOND = "ALTER TABLE items ADD COLUMN size INTEGER; INSERT INTO items VALUES ('second', 2);"


def file_at(path: Path, *migrations: str, **changes: Any) -> SqliteFile:
    options: dict[str, Any] = {"busy_seconds": 5.0, "unused": "nothing is noted", "damaged": ".damaged"} | changes
    return SqliteFile(path, migrations or (FIRST,), **options)


def add(file: SqliteFile, name: str) -> bool:
    def work(database: sqlite3.Connection) -> bool:
        database.execute("INSERT INTO items (name) VALUES (?)", (name,))
        return True

    return file.use(work, False)


def names(file: SqliteFile) -> list[str]:
    return file.use(lambda database: [row[0] for row in database.execute("SELECT name FROM items ORDER BY rowid")], [])


def test_an_older_file_is_migrated_with_its_rows(tmp_path: Path) -> None:
    assert add(file_at(tmp_path / "f"), "old")
    newer = file_at(tmp_path / "f", FIRST, SECOND)
    assert names(newer) == ["old", "second"] == names(newer)
    with contextlib.closing(newer.open()) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_migration_happens_once_whoever_comes_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: names(file_at(tmp_path / "f", FIRST, SECOND)), range(16)))
    assert found == [["second"]] * 16


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    assert add(file_at(tmp_path / "f"), "old")
    with pytest.raises(sqlite3.OperationalError):
        file_at(tmp_path / "f", FIRST, f"{SECOND} nonsense").open()
    assert names(file_at(tmp_path / "f")) == ["old"]


def test_a_file_that_is_written_while_it_is_read_as_it_is_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = file_at(tmp_path / "f")
    add(file, "old")

    def refused() -> sqlite3.Connection:
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    def read(database: sqlite3.Connection) -> list[str]:
        found = [row[0] for row in database.execute("SELECT name FROM items")]
        if "another" in found_by:
            found_by.clear()
            add(file_at(tmp_path / "f"), "more " * 1_000)
        return found

    found_by = ["one"]
    with monkeypatch.context() as patch:
        patch.setattr(file, "open", refused)
        assert file.read(read, []) == ["old"] and not caplog.records
        found_by.append("another")
        assert file.read(read, []) == [] and "It was written meanwhile" in caplog.text
        with pytest.raises(ZeroDivisionError):
            file.read(lambda database: 1 // 0, 0)
        assert file.read(lambda database: database.execute("DELETE FROM items").rowcount, -1) == -1
    assert len(file.read(read, [])) == 2 and not (tmp_path / "f.damaged").exists()


def test_a_full_disk_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = file_at(tmp_path / "f")
    add(file, "kept")

    def fill(database: sqlite3.Connection) -> bool:
        database.execute("PRAGMA max_page_count = 1")
        with transaction(database):
            database.executemany("INSERT INTO items (name) VALUES (?)", [("x" * 1000,)] * 100)
        return True

    assert [file.use(fill, False) for _ in range(3)] == [False] * 3
    assert [record.message for record in caplog.records] == [
        f"nothing is noted: {tmp_path / 'f'}: database or disk is full. Make room there, or set EngineConfig.state_dir "
        "(or JAX_CLIENT_HOME, or --state-dir) to a directory with more of it."
    ], "once"
    assert names(file) == ["kept"] and not (tmp_path / "f.damaged").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_damaged_file_makes_room_for_a_new_one(tmp_path: Path, keep: bool, caplog: pytest.LogCaptureFixture) -> None:
    file = file_at(tmp_path / "f", damaged=".damaged" if keep else None)
    add(file, "lost")
    (tmp_path / "f").write_bytes(b"no database" * 1000)
    assert add(file, "new") and names(file) == ["new"]
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    left = {path.name: path.read_bytes() for path in tmp_path.glob("f.damaged*")}
    assert left == ({"f.damaged": b"no database" * 1000} if keep else {})


def test_a_file_is_set_aside_with_its_own_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "f").write_text(text)
        if text == "first":
            (tmp_path / f"f{LOG}").write_text("its log")
        assert file_at(tmp_path / "f").set_aside("f.old").read_text() == text
        log = tmp_path / f"f.old{LOG}"
        assert log.exists() == (text == "first"), "a log of another file would be read into this one"
    assert [path.name for path in tmp_path.iterdir()] == ["f.old"]


def test_what_cannot_be_read_back_is_damage(tmp_path: Path) -> None:
    file = file_at(tmp_path / "f")
    add(file, "no number")
    assert file.use(lambda database: [float(row[0]) for row in database.execute("SELECT name FROM items")], None) == []
    assert names(file) == [] and (tmp_path / "f.damaged").exists()


def test_a_later_version_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(file_at(tmp_path / "f", FIRST, SECOND), "later")
    before, file = (tmp_path / "f").read_bytes(), file_at(tmp_path / "f")
    assert names(file) == [] and not add(file, "earlier")
    assert "it has version 2, this package knows 1" in caplog.text
    with pytest.raises(OtherVersionError) as raised:
        file.open()
    assert is_damage(raised.value), "only to a caller that has to open it, such as a server"
    assert (tmp_path / "f").read_bytes() == before


def test_a_transaction_writes_all_or_nothing(tmp_path: Path) -> None:
    file = file_at(tmp_path / "f")
    with contextlib.closing(file.open()) as database:
        with pytest.raises(ZeroDivisionError), transaction(database):
            database.execute("INSERT INTO items VALUES ('a')")
            raise ZeroDivisionError
        with transaction(database):
            database.execute("INSERT INTO items VALUES ('b')")
    assert names(file) == ["b"]


def test_a_file_is_for_its_user_only(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        add(file_at(tmp_path / "new"), "a")
        (tmp_path / "old").touch(0o644)
        with contextlib.closing(file_at(tmp_path / "old").open()) as database:
            database.execute("INSERT INTO items (name) VALUES ('b')")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {"new", "old", "old-wal", "old-shm"} and set(modes.values()) == {0o600}


def test_a_file_that_shrinks_gives_space_back(tmp_path: Path) -> None:
    with contextlib.closing(file_at(tmp_path / "f", shrinks=True).open()) as database:
        with transaction(database):
            database.executemany("INSERT INTO items (name) VALUES (?)", [("x" * 3_000,)] * 1_000)
        full = used_bytes(database)
        database.execute("DELETE FROM items WHERE rowid > 100")
        assert used_bytes(database) < full / 5
        reclaim(database)
    assert (tmp_path / "f").stat().st_size < full / 5


def test_a_file_without_room_for_a_copy_works_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(file_at(tmp_path / "f"), "old")
    with contextlib.closing(sqlite3.connect(tmp_path / "f")) as holder:
        holder.execute("BEGIN")
        holder.execute("SELECT * FROM items").fetchall()
        shrinking = file_at(tmp_path / "f", shrinks=True, busy_seconds=0.1)
        assert names(shrinking) == ["old"] and add(shrinking, "new")
    assert names(file_at(tmp_path / "f", shrinks=True)) == ["old", "new"]
