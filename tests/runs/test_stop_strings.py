"""Is a stop string found at the token that completes it, at the same cost in a row of any length?"""

from __future__ import annotations

import pytest

from jax_client.runs.checks.stop_strings import MAX_NEW_TOKENS, StopStrings


def decode(tokens: list[int]) -> str:
    return "".join(chr(token) for token in tokens)


@pytest.mark.parametrize(
    ("stops", "row", "keep"),
    [
        (("END",), "abcENDx", 6),
        (("END",), "abcEN", None),
        (("END",), "END", 3),
        (("END", "c"), "abcENDc", 3),
        (("D", "END"), "abENDc", 5),
        (("END",), "", None),
        (("END",), "x" * 5000 + "END" + "y" * 100, 5003),
        (("E" * 300,), "x" * 1000 + "E" * 300 + "y", 1300),
    ],
)
def test_stop_strings_end_with_the_completing_token(stops: tuple[str, ...], row: str, keep: int | None) -> None:
    assert StopStrings(stops=stops, decode=decode)([ord(char) for char in row]) == keep


def test_stop_strings_across_tokens_bytes_and_blocks() -> None:
    # Tokens are bytes: "é" and the flag take several, and a token may have no text at all.
    def decode_bytes(tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    row = [300, *"aé".encode(), *"🇫🇷".encode(), 300, *b"!"]
    find = StopStrings(stops=("🇫🇷!",), decode=decode_bytes)
    assert [find(row[:n]) for n in range(len(row))] == [None] * len(row) and find(row) == len(row)
    assert StopStrings(stops=("é",), decode=decode_bytes)(row) == 4
    pieces = {0: "<|", 1: "stop", 2: "|> tail", 3: "x"}
    find = StopStrings(stops=("stop|>",), decode=lambda tokens: "".join(pieces[token] for token in tokens))
    assert find([3, 0, 1, 2, 3]) == 4


def test_stop_strings_cost_the_same_in_a_long_row() -> None:
    decoded: list[int] = []

    def counting(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return decode(tokens)

    find = StopStrings(stops=("END",), decode=counting)
    row = [ord("x")] * 20_000
    for n in range(0, len(row), 32):
        assert find(row[:n]) is None
    assert max(decoded) < MAX_NEW_TOKENS + 64
    row[19_990:19_993] = [ord(char) for char in "END"]
    decoded.clear()
    assert find(row) == 19_993 and len(decoded) < 12
