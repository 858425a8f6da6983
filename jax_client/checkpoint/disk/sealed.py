"""How does a reader know that a JSON file is whole? Its last field is the sha256 of the bytes before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from jax_client.errors import BadRequestError
from jax_client.values import JsonObject

_KEY = b',\n "sha256": "'
_END = b'"\n}\n'


class DamagedError(Exception):
    """A file of a checkpoint is missing or not as it was written; the message names it. Never leaves the store."""


def seal(content: Mapping[str, object], subject: str) -> bytes:
    """Return `content`, which is not empty, as JSON that ends with its own hash.

    Raises:
        BadRequestError: it holds something that JSON cannot; `subject` names it.
    """
    head = _dump(content, subject).removesuffix("\n}").encode() + _KEY
    return head + hashlib.sha256(head).hexdigest().encode() + _END


def check_json(value: object, subject: str) -> None:
    """Raise BadRequestError unless JSON can hold a value; `subject` names it."""
    _dump(value, subject)


def unseal(data: bytes, where: str) -> JsonObject:
    """Return the content of sealed JSON.

    Raises:
        DamagedError: it is not exactly what `seal` made.
    """
    head, digest = data[: -len(_END) - 64], data[-len(_END) - 64 : -len(_END)]
    if not data.endswith(_END) or not head.endswith(_KEY) or hashlib.sha256(head).hexdigest().encode() != digest:
        raise DamagedError(f"{where} is damaged: its sha256 does not fit its contents")
    content = json.loads(data)
    del content["sha256"]
    return content


def _dump(value: object, subject: str) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRequestError(
            f"{subject} cannot be written as JSON ({error}); keep text, finite numbers, lists, dicts."
        ) from error
