"""How is a request's body read without trusting its length, its compression or its nesting? In pieces, with limits.

Every piece counts in the request's `Load`. A compressed body is decompressed when it is whole, so that a body that is
never finished holds what was sent of it. Few bodies are decompressed and parsed at the same time, off the event loop.
"""

from __future__ import annotations

import asyncio
import io
import json
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pydantic
import zstandard
from starlette.requests import ClientDisconnect, Request

from jax_client.errors import BadRequestError, JaxClientError
from jax_client.server.wire.accounts import BusyError
from jax_client.server.wire.admission import Load, load_of
from jax_client.server.wire.connections import WHOLE_BODY
from jax_client.server.wire.pools import run_on_body

Model = TypeVar("Model", bound=pydantic.BaseModel)

# A chunk of the SDK's has 5 MB before compression; one datum may be larger.
MAX_BYTES = 64 * 2**20
MAX_JSON_BYTES = 16 * 2**20
MAX_NESTING = 64
# A value of JSON takes up to ten times its text in memory. A prompt has a value for each token.
MAX_VALUES = 2 * 2**20
MAX_CONTAINERS = 2**17
# The longest pause between two pieces of a body.
STALL_SECONDS = 30.0
# The size up to which parsing a body on the event loop is cheaper than handing it to another thread.
SMALL = 16 * 2**10
# Of what is decompressed in order to count it.
PIECE = 2**20
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class TooLargeError(JaxClientError):
    """A body is larger than the limit."""


class EncodingError(JaxClientError):
    """A body has a compression other than zstd."""


class StalledError(JaxClientError):
    """The rest of a body did not arrive in time."""


async def read_body(request: Request, limit: int | None = None) -> bytes:
    """Read a body, and decompress it if it is zstd; it is counted in the request's load.

    Args:
        request: the request.
        limit: the most bytes, sent or decompressed; None is MAX_BYTES.

    Raises:
        TooLargeError: the body is longer than `limit`.
        EncodingError: it has another compression.
        StalledError: no piece arrived for STALL_SECONDS, or there is room for faster ones only.
        BusyError: it is over the account's quota; its pieces were dropped.
        BadRequestError: it is cut short.
    """
    encodings = [value.strip().lower() for name, value in request.scope["headers"] if name == b"content-encoding"]
    if encodings not in ([], [b"identity"], [b"zstd"]):
        found = b", ".join(encodings).decode("latin-1")[:80]
        raise EncodingError(f"content-encoding is {found!r}; send zstd or no compression.")
    limit = MAX_BYTES if limit is None else limit
    load = load_of(request)
    sent = await (_whole if request.scope.get(WHOLE_BODY) else _received)(request, limit, load)
    body = sent
    if sent and encodings == [b"zstd"]:
        decompress = partial(_decompressed, sent, limit, load)
        size = _content_size(sent)
        # The size that a frame claims is what its decompression allocates.
        body = decompress() if 0 <= size <= SMALL else await run_on_body(size, decompress)
        load.shrink(len(sent))
    load.arrived()
    return body


async def _whole(request: Request, limit: int, load: Load) -> bytes:
    """Return a body that has arrived: nothing is waited for, so it needs no timer and cannot be late."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise _cut_short()
    body = message.get("body", b"")
    if len(body) > limit:
        raise _too_large(limit)
    if body:
        load.grow(len(body))
    return body


async def _received(request: Request, limit: int, load: Load) -> bytes:
    chunks: list[bytes] = []
    left = limit
    busy: BusyError | None = None
    loop = asyncio.get_running_loop()
    late = False
    try:
        async with asyncio.timeout_at(newest := loop.time() + STALL_SECONDS) as timeout:

            def expire() -> None:
                nonlocal late
                late = True
                if not timeout.expired():
                    timeout.reschedule(loop.time())

            load.reading(lambda: loop.call_soon_threadsafe(expire))
            async for chunk in request.stream():
                if not late and (now := loop.time() + STALL_SECONDS) > newest + 1:
                    timeout.reschedule(newest := now)
                left -= len(chunk)
                if left < 0:
                    raise _too_large(limit)
                if busy is None and chunk:
                    try:
                        load.grow(len(chunk))
                        chunks.append(chunk)
                    except BusyError as error:
                        # Read to its end: a client that is cut off while it sends never sees the answer.
                        busy = error
                        chunks.clear()
                        load.drop()
    except TimeoutError:
        if late:
            raise StalledError("the body came too slowly while others had no room; send it again.") from None
        raise StalledError(f"nothing came of the body for {STALL_SECONDS:.0f} s; send it again.") from None
    except ClientDisconnect:
        raise _cut_short() from None
    finally:
        load.reading(None)
    if busy is not None:
        raise busy
    return b"".join(chunks)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the body has more than {limit} bytes; send less at once.")


def _cut_short() -> BadRequestError:
    return BadRequestError("the body is cut short.")


def _content_size(frame: bytes) -> int:
    """Return the size that a zstd frame gives for its content, -1 if it gives none. Raises BadRequestError."""
    try:
        return zstandard.frame_content_size(frame)
    except zstandard.ZstdError:
        raise BadRequestError("the body is no zstd frame.") from None


def _decompressed(frame: bytes, limit: int, load: Load) -> bytes:
    """Return the content of a zstd frame, in one block of memory, which is counted before it is made."""
    decompressor = zstandard.ZstdDecompressor()
    try:
        size = _content_size(frame)
        if size < 0:
            # Decompressed twice: the first time to count.
            size = 0
            with decompressor.stream_reader(io.BytesIO(frame)) as reader:
                while size <= limit and (piece := reader.read(PIECE)):
                    size += len(piece)
        if size > limit:
            raise TooLargeError(f"the decompressed body has more than {limit} bytes; send less at once.")
        load.grow(size)
        return decompressor.decompress(frame, max_output_size=size) if size else b""
    except zstandard.ZstdError:
        raise BadRequestError("the body is no zstd frame.") from None


async def read_json(request: Request, model: type[Model], *, limit: int | None = None) -> tuple[Model, bytes]:
    """Read a JSON body of at most `limit` bytes, None for MAX_JSON_BYTES, as one of the SDK's request types.

    Returns:
        The request and the body.

    Raises:
        TooLargeError, EncodingError, StalledError, BusyError: as `read_body`.
        BadRequestError: the body is no JSON, is nested too deeply, or does not fit the type.
    """
    body = await read_body(request, MAX_JSON_BYTES if limit is None else limit)
    if len(body) <= SMALL:
        return parse(body, model), body
    return await run_on_body(len(body), partial(parse, body, model)), body


def parse(body: bytes, model: type[Model]) -> Model:
    """Parse JSON as a request type. Raises BadRequestError."""
    value = parse_json(body)
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))[:200] or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise BadRequestError(f"{model.__name__}: {problems[:2_000]}.") from None


def parse_json(body: bytes) -> Any:
    """Parse JSON without NaN and without deep nesting. Raises BadRequestError."""
    _refuse_nesting(body)
    try:
        return _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON ({type(error).__name__}).") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


# For every body: json.loads would make a decoder each time.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _refuse_nesting(body: bytes) -> None:
    # Brackets and commas inside of strings count too; that only lowers the limits for strings full of them.
    containers, values = body.count(b"[") + body.count(b"{"), body.count(b",")
    if containers <= MAX_NESTING and values <= MAX_VALUES:
        return
    for plural, count, most in (("arrays and objects", containers, MAX_CONTAINERS), ("values", values, MAX_VALUES)):
        if count > most:
            raise BadRequestError(f"the body has {count:,} {plural}, the limit is {most:,}; send less at once.")
    brackets = np.frombuffer(body.translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if np.cumsum(np.where(opening, 1, -1)).max() > MAX_NESTING:
        raise BadRequestError(f"the body is nested more than {MAX_NESTING} deep.")
