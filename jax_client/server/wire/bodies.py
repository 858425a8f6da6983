"""How is a request's body read without trusting its length, its compression or its nesting? In pieces, with limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

import numpy as np
import pydantic
import zstandard
from starlette.requests import ClientDisconnect, Request

from jax_client.errors import BadRequestError, JaxClientError
from jax_client.server.wire.admission import BusyError, Load
from jax_client.server.wire.pools import run_work

Model = TypeVar("Model", bound=pydantic.BaseModel)

# A chunk of the SDK's has 5 MB before compression; one datum may be larger.
MAX_BYTES = 256 * 2**20
MAX_JSON_BYTES = 64 * 2**20
MAX_NESTING = 64
# The longest pause between two pieces of a body.
STALL_SECONDS = 30.0
# The size up to which parsing a body on the event loop is cheaper than handing it to another thread.
SMALL = 16 * 2**10
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class TooLargeError(JaxClientError):
    """A body is larger than the limit."""


class EncodingError(JaxClientError):
    """A body has a compression other than zstd."""


class StalledError(JaxClientError):
    """The rest of a body did not arrive in time."""


async def read_body(request: Request, limit: int | None = None, load: Load | None = None) -> bytes:
    """Read a body, and decompress it if it is zstd.

    Args:
        request: the request.
        limit: the most bytes, sent or decompressed; None is MAX_BYTES.
        load: counts every piece that is in memory.

    Raises:
        TooLargeError: the body is longer than `limit`.
        EncodingError: it has another compression.
        StalledError: no piece arrived for STALL_SECONDS.
        BusyError: it is over the admission limits; its pieces were dropped.
        BadRequestError: it is cut short.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise EncodingError(f"content-encoding is {encoding!r}; send zstd or no compression.")
    chunks: list[bytes] = []
    limit = MAX_BYTES if limit is None else limit
    left = limit
    decompressor = zstandard.ZstdDecompressor().decompressobj() if encoding == "zstd" else None
    busy: BusyError | None = None
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout_at(newest := clock() + STALL_SECONDS) as timeout:
            async for chunk in request.stream():
                if (now := clock() + STALL_SECONDS) > newest + 1:
                    timeout.reschedule(newest := now)
                # In pieces, so that a small frame cannot become a large one before it is counted.
                for start in range(0, len(chunk), 1024) if decompressor else (0,):
                    piece = decompressor.decompress(chunk[start : start + 1024]) if decompressor else chunk
                    left -= len(piece)
                    if left < 0:
                        raise TooLargeError(f"the body has more than {limit} bytes; send less at once.")
                    if busy is None and piece:
                        try:
                            if load:
                                load.grow(len(piece))
                            chunks.append(piece)
                        except BusyError as error:
                            # Read to its end: a client that is cut off while it sends never sees the answer.
                            busy = error
                            chunks.clear()
    except TimeoutError:
        raise StalledError(f"nothing came of the body for {STALL_SECONDS:.0f} s; send it again.") from None
    except ClientDisconnect:
        raise BadRequestError("the body is cut short.") from None
    except zstandard.ZstdError:
        raise BadRequestError("the body is no zstd frame.") from None
    if busy is not None:
        raise busy
    return b"".join(chunks)


async def read_json(
    request: Request, model: type[Model], load: Load | None = None, *, limit: int = MAX_JSON_BYTES
) -> tuple[Model, bytes]:
    """Read a JSON body as one of the SDK's request types; return the request and the body.

    Raises:
        TooLargeError, EncodingError, StalledError, BusyError: as `read_body`.
        BadRequestError: the body is no JSON, is nested too deeply, or does not fit the type.
    """
    body = await read_body(request, limit, load)
    if len(body) <= SMALL:
        return parse(body, model), body
    return await run_work(parse, body, model), body


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
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    # Brackets inside of strings count too; that only lowers the limit for strings full of brackets.
    brackets = np.frombuffer(body.translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if np.cumsum(np.where(opening, 1, -1)).max() > MAX_NESTING:
        raise BadRequestError(f"the body is nested more than {MAX_NESTING} deep.")
