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
        whole = end == len(ids) or (after.startswith(before) and not after.endswith(BROKEN))
        texts.append(after[len(before) :] if whole else "")
        if whole:
            start, read = read, end
        elif end - read >= _CONTEXT:
            # The first of so many tokens belongs to no character that is still to come; the others may.
            first = decode(list(ids[start : read + 1]))
            if after.startswith(first):
                texts[read] = first[len(before) :]
                start, read = read, read + 1
            else:
                texts[-1] = after[len(before) :]
                start, read = read, end
    return _joined(texts, decode(list(ids)))


def _joined(texts: list[str], whole: str) -> list[str]:
    """Return the texts with what differs from the whole replaced: some decoders judge a run of bytes by its end."""
    found = "".join(texts)
    if found == whole:
        return texts
    head = _shared(found, whole)
    tail = _shared(found[head:][::-1], whole[head:][::-1])
    end, middle = len(found) - tail, whole[head : len(whole) - tail]
    right: list[str] = []
    place = 0
    for text in texts:
        new = text[: max(0, head - place)]
        if place + len(text) >= end:
            new, middle = new + middle, ""
        right.append(new + text[max(0, end - place) :])
        place += len(text)
    return right


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


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
