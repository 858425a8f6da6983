"""Is a file of keys read as it was meant, refused by line, field and value, and does nothing keep a key itself?"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from jax_client.errors import BadRequestError
from jax_client.server.wire import keys
from jax_client.server.wire.accounts import Quota

HASH = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def test_a_line_says_whose_a_key_is_and_what_it_may_have(tmp_path: Path) -> None:
    made = keys.new_key()
    file = tmp_path / "keys"
    file.write_text(f"# the team\n\n{keys.line_of('vision', made, ['admin', 'sessions=7'])}  # May\naudio\t{HASH}\n")
    vision, audio = keys.read_keys(file)
    assert vision.owner.name == "vision" and vision.owner.admin and not audio.owner.admin
    assert vision.digest == hashlib.sha256(made.encode()).digest() and audio.digest == bytes.fromhex("ab" * 32)
    assert vision.quota.sessions == 7 and audio.quota.sessions == Quota().sessions // 2
    assert re.fullmatch(r"tml-[\w-]{43}", made) and made not in file.read_text() and made != keys.new_key()


@pytest.mark.parametrize(
    ("content", "words"),
    {
        "nothing": ("# no one\n\n", ["has no key", "jax_client key NAME"]),
        "a path for a name": (f"../a {HASH}", ["line 1", "'../a'", "[a-z0-9]"]),
        "capitals": (f"\nVision {HASH}", ["line 2", "'Vision'"]),
        "no hash": ("vision", ["line 1", "of vision", "sha256:"]),
        "another hash": (f"vision {HASH[:-1]}", ["line 1", "64 digits"]),
        "an unknown option": (f"vision {HASH} root", ["line 1", "'root'", "sessions", "admin"]),
        "an unknown limit": (f"vision {HASH} session=4", ["line 1", "'session=4'", "sessions"]),
        "no number": (f"a {OTHER}\nvision {HASH} sessions=many", ["line 2", "sessions is 'many'", "from 1 to"]),
        "none": (f"vision {HASH} sessions=0", ["sessions is '0'"]),
        "too many samples": (f"vision {HASH} samples=60001", ["samples is '60001'", "60,000"]),
        "a limit twice": (f"vision {HASH} polls=1 polls=2", ["polls is there twice"]),
        "admin twice": (f"vision {HASH} admin admin", ["admin is there twice"]),
        "a name twice": (f"vision {HASH}\n# other\nvision {OTHER}", ["line 3", "name of vision", "line 1"]),
        "a key twice": (f"vision {HASH}\naudio {HASH}", ["line 2", "key of audio", "line 1"]),
    }.values(),
)
def test_a_wrong_line_is_refused_by_its_number_field_and_value(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(BadRequestError) as refused:
        keys.read_keys(file)
    assert all(word in str(refused.value) for word in [str(file), *words]), refused.value


@pytest.mark.parametrize("hidden", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r", "\x00", "\x1b"])
def test_no_comment_hides_a_key(tmp_path: Path, hidden: str) -> None:
    """These break no line, or not for every reader, so no editor shows what is behind them as a line."""
    file = tmp_path / "keys"
    file.write_bytes(f"audio {OTHER}\nvision {HASH} # the team{hidden}evil {HASH} admin\n".encode())
    with pytest.raises(BadRequestError) as refused:
        keys.read_keys(file)
    assert all(
        word in str(refused.value)
        for word in ("line 2", f"character {len(f'vision {HASH} # the team') + 1}", repr(hidden))
    )
    with pytest.raises(BadRequestError, match="the line: character"):
        keys.line_of("vision", keys.new_key(), [f"sessions=1{hidden}admin"])


def test_lines_may_end_as_windows_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"vision\t{HASH}\r\n\r\n# é – 日本\r\naudio {OTHER}\r\n".encode())
    assert [key.owner.name for key in keys.read_keys(file)] == ["vision", "audio"]


def test_what_may_be_a_key_is_not_repeated(tmp_path: Path) -> None:
    """Someone who writes the key itself in place of its hash does not find it in a log."""
    file = tmp_path / "keys"
    for content in ("vision tml-secret", f"vision tml-secret {HASH}", "vision sha256:tml-secret"):
        file.write_text(content)
        with pytest.raises(BadRequestError) as refused:
            keys.read_keys(file)
        assert "secret" not in str(refused.value)
    file.write_bytes(b"a " + HASH.encode() + b"\n\xff")
    with pytest.raises(BadRequestError, match="line 2 is no UTF-8"):
        keys.read_keys(file)
    file.write_bytes(b"#" * (keys.MAX_FILE_BYTES + 1))
    with pytest.raises(BadRequestError, match="more than"):
        keys.read_keys(file)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_no_key_can_use_up_what_is_another_keys(tmp_path: Path, count: int) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(keys.line_of(f"k{i}", keys.new_key()) + "\n" for i in range(count)))
    found = keys.read_keys(file)
    whole, alone = keys.whole(found), Quota()
    for field in keys.DEFAULTS:
        parts = [getattr(key.quota, field) for key in found]
        assert sum(parts) <= getattr(whole, field) and min(parts) >= 1, field
        assert parts[0] == getattr(alone, field) if count == 1 else parts[0] <= getattr(alone, field)
    assert whole.samples == alone.samples, "an engine takes no more"
    assert found[0].quota.arriving_bytes == alone.arriving_bytes, "the largest body fits"
