"""Do the texts of tokens join to the text, whatever the tokens cut through?"""

from __future__ import annotations

from itertools import groupby, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.server.dashboard.playground.token_texts import Alternatives, Decode, token_texts


def of_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer without merges."""
    return bytes(ids).decode("utf-8", "replace")


WORDS = ["▁the", "▁a", "b", "c", "▁", "\n"]


def of_words(ids: list[int]) -> str:
    """A tokenizer that leaves out a space at the beginning of a text."""
    return "".join(WORDS[index] for index in ids).replace("▁", " ").removeprefix(" ")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_characters_of_several_tokens_belong_to_the_last(text: str) -> None:
    ids = list(text.encode("utf-8", "replace"))
    texts = token_texts(of_bytes, ids)
    assert len(texts) == len(ids) and "".join(texts) == of_bytes(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(WORDS) - 1)))
def test_spaces_stay_where_they_are(ids: list[int]) -> None:
    assert "".join(token_texts(of_words, ids)) == of_words(ids)


def test_a_character_is_whole() -> None:
    assert token_texts(of_bytes, list("aü🙂".encode())) == ["a", "", "ü", "", "", "", "🙂"]


@pytest.mark.parametrize("ids", [[0xF0], [0xF0, 0x9F], [0x80] * 20, [0x61, 0xC3, 0x61], [0xC3] * 9 + [0x61]])
def test_broken_bytes_show(ids: list[int]) -> None:
    texts = token_texts(of_bytes, ids)
    assert len(texts) == len(ids) and "\ufffd" in "".join(texts)
    if ids[-1] == 0x61:
        assert texts[-1].endswith("a")


def of_runs(ids: list[int]) -> str:
    """A tokenizer that makes text of a run of byte tokens only where the whole run is one; above them are letters."""
    runs = ["".join(run) for _, run in groupby(map(chr, ids), lambda each: ord(each) < 256)]
    return "".join(run if ord(run[0]) > 255 else _of_run(run.encode("latin-1")) for run in runs)


def _of_run(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


PIECES = [b"a", "é".encode(), "漢".encode(), "😀".encode(), b"\xff", b"\xf0\x9f", b"\xe6"]


@pytest.mark.parametrize("decode", [of_bytes, of_runs])
def test_the_texts_join_to_the_text_after_bytes_that_are_none(decode: Decode) -> None:
    for number in range(5):
        for pieces in product(PIECES, repeat=number):
            ids = list(b"".join(pieces))
            texts = token_texts(decode, ids)
            assert len(texts) == len(ids) and "".join(texts) == decode(ids), bytes(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_the_texts_of_any_tokens_join(ids: list[int]) -> None:
    assert "".join(token_texts(of_runs, ids)) == of_runs(ids)


def test_a_character_after_broken_bytes_is_its_last_tokens() -> None:
    texts = token_texts(of_bytes, list(b"\xff\xf0\x9f" + "😀".encode()))
    assert texts == ["\ufffd", "", "", "", "", "", "\ufffd😀"]
    assert token_texts(of_bytes, [0x80] * 20) == [*["\ufffd"] * 14, "", "", "", "", "", "\ufffd" * 6]


def test_alternatives_read_as_they_would_follow() -> None:
    found = Alternatives(of_words)
    assert [found.text(index) for index in range(4)] == [" the", " a", "b", "c"]
    assert Alternatives(of_bytes).text(0xC3) == "\ufffd"
