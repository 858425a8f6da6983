"""How is a request's body read without trusting its length, its compression or its nesting?"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import pydantic
import zstandard
from starlette.requests import ClientDisconnect, Request

from jax_client.errors import BadRequestError, JaxClientError

Model = TypeVar("Model", bound=pydantic.BaseModel)

# A chunk of the SDK's has 5 MB before compression; one datum may be larger.
MAX_BYTES = 256 * 2**20
MAX_JSON_BYTES = 64 * 2**20
MAX_NESTING = 64


class TooLargeError(JaxClientError):
    """A body is larger than what is read."""


class EncodingError(JaxClientError):
    """A body is compressed in a way that is not read."""


async def read_body(request: Request, limit: int = MAX_BYTES) -> bytes:
    """Read a body, decompressed if it is zstd, as far as the limit.

    Raises:
        TooLargeError: it goes on after `limit` bytes, sent or decompressed.
        EncodingError: another compression.
        BadRequestError: it is cut short.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise EncodingError(f"content-encoding is {encoding!r}; send zstd or no compression.")
    chunks: list[bytes] = []
    left = limit
    decompressor = zstandard.ZstdDecompressor().decompressobj() if encoding == "zstd" else None
    try:
        async for chunk in request.stream():
            # In pieces, so that a small frame cannot become a large one before it is counted.
            for start in range(0, len(chunk), 1024) if decompressor else (0,):
                piece = decompressor.decompress(chunk[start : start + 1024]) if decompressor else chunk
                left -= len(piece)
                if left < 0:
                    raise TooLargeError(f"the body has more than {limit} bytes; send less at once.")
                chunks.append(piece)
    except ClientDisconnect:
        raise BadRequestError("the body is cut short.") from None
    except zstandard.ZstdError:
        raise BadRequestError("the body is no zstd frame.") from None
    return b"".join(chunks)


async def read_json(request: Request, model: type[Model]) -> tuple[Model, bytes]:
    """Read a JSON body into a request type of the SDK's; return it with the body.

    Raises:
        TooLargeError, EncodingError: as `read_body`.
        BadRequestError: no JSON, nested too deeply, or not what the type asks for.
    """
    body = await read_body(request, MAX_JSON_BYTES)
    return parse(body, model), body


def parse(body: bytes, model: type[Model]) -> Model:
    """Parse JSON into a request type. Raises BadRequestError."""
    _refuse_nesting(body)
    try:
        return model.model_validate(json.loads(body, parse_constant=_refuse_constant))
    except pydantic.ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise BadRequestError(f"{model.__name__}: {found}.") from None
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON ({type(error).__name__}).") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _refuse_nesting(body: bytes) -> None:
    # Brackets inside of text count too, which only ever makes the limit lower for text that is made of brackets.
    depth = deepest = 0
    for byte in body if body.count(b"[") + body.count(b"{") > MAX_NESTING else b"":
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    if deepest > MAX_NESTING:
        raise BadRequestError(f"the body is nested more than {MAX_NESTING} deep.")
