"""What does each token say? The texts of a sequence's tokens join to its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What stands for bytes that are no whole character.
BROKEN = "\ufffd"
# So many tokens at most make up one character, or decide how one is shown.
_CONTEXT = 6

Decode = Callable[[list[int]], str]


def token_texts(decode: Decode, ids: Sequence[int]) -> list[str]:
    """Return the text of each token.

    A character that several tokens make up is the text of the last of them, and "" is that of the others. Bytes that
    never become a character show as U+FFFD.

    Args:
        decode: `decode(ids) -> text`, special tokens included.
        ids: of a whole sequence.
    """
    texts: list[str] = []
    # Texts up to `read` are given out; decoding begins at `start`, so that a token's neighbours are known.
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, after = decode(list(ids[start:read])), decode(list(ids[start:end]))
        whole = after.startswith(before) and not after.endswith(BROKEN)
        if whole or end == len(ids) or end - read >= _CONTEXT:
            texts.append(after[len(before) :])
            start, read = read, end
        else:
            texts.append("")
    return texts


class Alternatives:
    """The texts of tokens that were not drawn, each as it would follow another one.

    Args:
        decode: as of `token_texts`.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def text(self, index: int) -> str:
        """Return the text of a token."""
        if index not in self._texts:
            # Behind another one: some tokenizers leave out a space at the beginning of a text.
            before = self._decode([index])
            both = self._decode([index, index])
            self._texts[index] = both[len(before) :] if both.startswith(before) and len(both) > len(before) else before
        return self._texts[index]
