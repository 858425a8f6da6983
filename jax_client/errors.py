"""Which errors can a call raise, and what does each guarantee?

The classes carry the SDK's names but do not import it: `clients/` turns each of them into a class that is also the
SDK's own (see `clients/sdk_errors.py`), so `except tinker.BadRequestError` works and the engine stays free of `tinker`.
Every message says what was wrong (index, field, value, limit) and then what to do.
"""

from __future__ import annotations

from typing import Literal

Category = Literal["unknown", "server", "user"]


class JaxClientError(Exception):
    """Base class of every error that this package raises on purpose."""


class BadRequestError(JaxClientError, ValueError):
    """A value in the call is wrong; nothing was changed. Raised at the call."""


class BadTypeError(BadRequestError, TypeError):
    """An argument has the wrong type; nothing was changed. Raised at the call."""


class NotFoundError(JaxClientError, LookupError):
    """A model, run, checkpoint or sampler does not exist."""


class UnsupportedError(BadRequestError):
    """A feature of the API, an architecture or a file format that this package refuses by name."""


class RequestFailedError(JaxClientError, RuntimeError):
    """An accepted request could not be carried out; state is as it was before the request.

    Attributes:
        message: what happened and what to do.
        request_id: the request as the log names it.
        category: "user" if another input would succeed, "server" if the machine or this package failed.
    """

    def __init__(self, message: str, request_id: str = "", category: Category = "server") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category: Category = category

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.request_id, self.category), self.__dict__


class DoesNotFitError(RequestFailedError):
    """The device has too little free memory for a model or an adapter. Unload something and retry."""


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shown(value: object, limit: int = 80) -> str:
    """Return `repr(value)`, cut to `limit` characters, for use in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
