"""How do token ids become text where a sampler is? A `Decoder` travels as its model's source, and loads it there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from jax_client.weights.read.source import ModelSource, here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Decoder:
    """Turns token ids into text. Thread-safe.

    Args:
        source: the model's files.
        tokenizer: `f() -> the model's tokenizer`, for this process; another one loads its own once.
    """

    def __init__(self, source: ModelSource, tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
        self._source = source
        self._tokenizer = tokenizer

    def __call__(self, tokens: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        text = self._tokenizer().decode(tokens)
        return text if isinstance(text, str) else "".join(text)

    def __reduce__(self) -> tuple[object, ...]:
        return _arrived, (self._source,)


@functools.cache
def _arrived(source: ModelSource) -> Decoder:
    return Decoder(source, functools.cache(functools.partial(_load, source)))


def _load(source: ModelSource) -> PreTrainedTokenizerFast:
    from jax_client.weights.read.tokenizer import load_tokenizer

    return load_tokenizer(here(source))
