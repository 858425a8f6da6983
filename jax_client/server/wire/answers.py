"""Which bytes does a client get for a request? An `Answer`: a response of the protocol, or an error."""

from __future__ import annotations

import json
import logging
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pydantic
from tinker import types

from jax_client.errors import JaxClientError, RequestFailedError
from jax_client.server.wire import protocol

logger = logging.getLogger(__name__)

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer as it is sent.

    Attributes:
        body: the encoded response.
        media_type: the body's media type.
        status: 200, for failures too: the SDK raises the error in the body. 410 makes the SDK send a sampling request
            again.
        failed: whether the body is an error.
    """

    body: bytes
    media_type: str = JSON
    status: int = 200
    failed: bool = False


def success(value: Any) -> Answer:
    """Encode a response of a run or a sampler: tensors as protobuf, everything else as JSON."""
    if isinstance(value, types.ForwardBackwardOutput):
        return Answer(body=protocol.forward_backward_answer(value), media_type=PROTOBUF)
    if isinstance(value, types.SampleResponse):
        return Answer(body=protocol.sample_answer(value), media_type=PROTOBUF)
    content = value.model_dump(mode="json", exclude_none=True) if isinstance(value, pydantic.BaseModel) else value
    return Answer(body=json.dumps(content).encode())


def failure(error: BaseException) -> Answer:
    """Encode an error. The client sees errors that this package raises on purpose; others are only logged."""
    if isinstance(error, RequestFailedError):
        return refusal(error.message, error.category)
    if isinstance(error, JaxClientError | ValueError | TypeError):
        return refusal(str(error), "user")
    if isinstance(error, CancelledError):
        return refusal("the request was cancelled.", "user")
    logger.error("a request failed", exc_info=error)
    return refusal("the server failed at this request; its log says why.", "server")


def refusal(message: str, category: str) -> Answer:
    """Encode an error by its message and category ("user" or "server")."""
    return Answer(body=json.dumps({"error": message, "category": category}).encode(), failed=True)


def retry_later(message: str) -> Answer:
    """Encode a 410: the SDK sends the sampling request again."""
    return Answer(body=json.dumps({"detail": message}).encode(), status=410, failed=True)
