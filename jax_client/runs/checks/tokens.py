"""Which ModelInputs can a text model read, and what are their token ids?

`text_tokens` returns the ids of an input of text chunks, and refuses images and other chunks by name.
"""

from __future__ import annotations

import numpy as np
from tinker import types

from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.runs.checks.numbers import shown
from jax_client.runs.checks.tensors import token_ids

TOKENS_OF_TEXT = "a model reads token ids. Encode it: types.ModelInput.from_ints(client.get_tokenizer().encode(text))."


def text_tokens(model_input: object, where: str, vocab_size: int, max_context: int) -> np.ndarray:
    """Return the token ids of a ModelInput, int32 (T,), with 1 <= T <= max_context.

    Args:
        model_input: the API's ModelInput.
        where: its name for messages, such as "data[3].model_input".
        vocab_size: ids are below it.
        max_context: the longest input.

    Raises:
        BadTypeError: not a ModelInput, or a token is not an integer.
        UnsupportedError: an image, audio or asset chunk; the message names its index.
        BadRequestError: empty, too long, or an id out of range.
    """
    if isinstance(model_input, str):
        raise BadTypeError(f"{where} is text; {TOKENS_OF_TEXT}")
    if not isinstance(model_input, types.ModelInput):
        raise BadTypeError(
            f"{where} is {type(model_input).__name__}, expected ModelInput; use ModelInput.from_ints(tokens)."
        )
    parts = [_chunk_tokens(chunk, f"{where}.chunks[{i}]") for i, chunk in enumerate(model_input.chunks)]
    length = sum(map(len, parts))
    if length == 0:
        raise BadRequestError(f"{where} is empty (length 0); give at least one token.")
    if length > max_context:
        raise BadRequestError(
            f"{where} has length {length}; the limit is {max_context} tokens, the model's context window. "
            "Shorten or split it; a recipe cuts data at max_length= and answers at max_tokens=."
        )
    return token_ids(np.concatenate(parts), where, vocab_size)


def _chunk_tokens(chunk: object, where: str) -> np.ndarray:
    if isinstance(chunk, types.EncodedTextChunk):
        return _integers(chunk.tokens, where)
    if isinstance(chunk, types.ImageAssetPointerChunk):
        raise UnsupportedError(
            f"{where} is an image_asset_pointer to {shown(chunk.location)}: the server does not fetch URLs or files, "
            "and only text is read here, of models with a vision tower, too. Remove the chunk."
        )
    kind = getattr(chunk, "type", type(chunk).__name__)
    if kind in ("image", "dmel"):
        raise UnsupportedError(
            f"{where} is of type {kind!r}; only text is read here, of models with a vision tower, too. Remove the "
            "chunk."
        )
    raise BadTypeError(f"{where} is {type(chunk).__name__}, expected EncodedTextChunk(tokens=...).")


def _integers(tokens: object, where: str) -> np.ndarray:
    if isinstance(tokens, str):
        raise BadTypeError(f"{where}.tokens is text; {TOKENS_OF_TEXT}")
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise BadTypeError(f"{where}.tokens is not a flat list of integers ({error}).") from None
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind in "Ou" and all(isinstance(token, int) for token in array.tolist()):
        # NumPy goes over to uint64 and then to objects for integers beyond 63 bits, which no vocabulary has.
        at = next((i for i, token in enumerate(array.tolist()) if not 0 <= token < 2**63), None)
        if at is not None:
            raise BadRequestError(f"{where}.tokens[{at}] is {shown(int(array[at]))}, which is not a token id.")
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind != "i":
        advice = TOKENS_OF_TEXT if array.dtype.kind == "U" else "give a flat list of token ids."
        raise BadTypeError(f"{where}.tokens has dtype {array.dtype} and {array.ndim} dimensions; {advice}")
    return array
