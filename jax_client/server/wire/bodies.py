"""How is a request's body read without trusting its length, its compression or its nesting?"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

import numpy as np
import pydantic
import zstandard
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from jax_client.errors import BadRequestError, JaxClientError
from jax_client.server.wire.admission import BusyError, Load

Model = TypeVar("Model", bound=pydantic.BaseModel)

# A chunk of the SDK's has 5 MB before compression; one datum may be larger.
MAX_BYTES = 256 * 2**20
MAX_JSON_BYTES = 64 * 2**20
MAX_NESTING = 64
# Between two pieces of a body.
STALL_SECONDS = 30.0
# A body that takes the event loop so little that handing it to another thread costs more.
SMALL = 16 * 2**10
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class TooLargeError(JaxClientError):
    """A body is larger than what is read."""


class EncodingError(JaxClientError):
    """A body is compressed in a way that is not read."""


class StalledError(JaxClientError):
    """The rest of a body does not come."""


async def read_body(request: Request, limit: int | None = None, load: Load | None = None) -> bytes:
    """Read a body, decompressed if it is zstd, as far as the limit.

    Args:
        request: whose body.
        limit: most bytes, sent or decompressed; None is MAX_BYTES.
        load: is told of every piece that is held.

    Raises:
        TooLargeError: it goes on after `limit` bytes.
        EncodingError: another compression.
        StalledError: nothing came for half a minute.
        BusyError: there is no room for it; what came of it was dropped.
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
        async with asyncio.timeout_at(newest := clock() + STALL_SECONDS) as patience:
            async for chunk in request.stream():
                if (now := clock() + STALL_SECONDS) > newest + 1:
                    patience.reschedule(newest := now)
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
                            # Read to its end: who is cut off while sending never sees the answer.
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
    """Read a JSON body into a request type of the SDK's; return it with the body.

    Raises:
        TooLargeError, EncodingError, StalledError, BusyError: as `read_body`.
        BadRequestError: no JSON, nested too deeply, or not what the type asks for.
    """
    body = await read_body(request, limit, load)
    if len(body) <= SMALL:
        return parse(body, model), body
    return await run_in_threadpool(parse, body, model), body


def parse(body: bytes, model: type[Model]) -> Model:
    """Parse JSON into a request type. Raises BadRequestError."""
    value = parse_json(body)
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))[:200] or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise BadRequestError(f"{model.__name__}: {found[:2_000]}.") from None


def parse_json(body: bytes) -> Any:
    """Parse JSON, which has no NaN and is not nested deeply. Raises BadRequestError."""
    _refuse_nesting(body)
    try:
        return _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON ({type(error).__name__}).") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


# json.loads would make one for every body.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _refuse_nesting(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    # Brackets inside of text count too, which only ever makes the limit lower for text that is made of brackets.
    brackets = np.frombuffer(body.translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if np.cumsum(np.where(opening, 1, -1)).max() > MAX_NESTING:
        raise BadRequestError(f"the body is nested more than {MAX_NESTING} deep.")
