"""How do this package's errors become the SDK's own, so that `except tinker.BadRequestError` works?

Each error class of `errors` is paired with the SDK's class of the same meaning, in a class that is both. The lower
floors raise their own classes and never see the SDK.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import os
import sys
import warnings
from abc import ABCMeta
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Self, TypeVar, cast

import httpx
import tinker
from tinker.types import RequestErrorCategory

from jax_client import errors

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

# First match wins.
_PAIRS: tuple[tuple[type[errors.JaxClientError], type[tinker.TinkerError]], ...] = (
    (errors.RequestFailedError, tinker.RequestFailedError),
    (errors.NotFoundError, tinker.NotFoundError),
    (errors.BadRequestError, tinker.BadRequestError),
    (errors.JaxClientError, tinker.TinkerError),
)
# The SDK's status errors carry the HTTP exchange; in-process there was none.
_REQUEST = httpx.Request("POST", "http://in-process.invalid/")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def translate(error: BaseException) -> BaseException:
    """Return the error as one that is also the SDK's; an error of another package is returned as it is.

    Message, cause, notes and traceback are kept.
    """
    if not isinstance(error, errors.JaxClientError) or isinstance(error, tinker.TinkerError):
        return error
    both = _both_classes(type(error))
    new = both.__new__(both, *error.args)
    new.__dict__.update(error.__dict__)
    if isinstance(new, tinker.RequestFailedError):
        new.category = RequestErrorCategory(new.category)
    elif isinstance(new, tinker.APIStatusError):
        message, status = str(error), type(new).status_code
        new.message, new.status_code, new.body = message, status, {"detail": message}
        new.request, new.response = _REQUEST, httpx.Response(status, json=new.body, request=_REQUEST)
    new.__cause__, new.__context__ = error.__cause__, error.__context__
    new.__suppress_context__ = error.__suppress_context__
    return new.with_traceback(error.__traceback__)


@functools.cache
def _both_classes(ours: type[errors.JaxClientError]) -> type[errors.JaxClientError]:
    theirs = next(sdk for base, sdk in _PAIRS if issubclass(ours, base))

    def reduce(self: BaseException) -> tuple[object, ...]:
        exchange = {"request", "response", "body"}
        state = {key: value for key, value in self.__dict__.items() if key not in exchange}
        return _rebuild, (ours, self.args, state)

    members = {"__module__": ours.__module__, "__doc__": ours.__doc__, "__reduce__": reduce}
    return _BothType(ours.__name__, (ours, theirs), members)


class _BothType(type):
    """The type of the paired classes, which pickle could not find by name: their name is the lower floor's."""


# torch's DataLoader, for one, pickles the class of the error that a worker raises.
def _reduce_class(both: _BothType) -> tuple[Callable[..., type], tuple[type]]:
    return _both_classes, (both.__mro__[1],)


copyreg.pickle(_BothType, _reduce_class)


def _rebuild(ours: type[errors.JaxClientError], args: tuple[object, ...], state: dict[str, object]) -> BaseException:
    error = ours.__new__(ours, *args)
    error.__dict__.update(state)
    return translate(error)


class StaysInProcess:
    """A base of what works only in the process that made it: pickling it is refused by name, and its copy is itself."""

    def __reduce__(self) -> tuple[object, ...]:
        """Raise BadTypeError, which says what can go to another process instead."""
        name = type(self).__name__
        raise translate(
            errors.BadTypeError(
                f"a {name} cannot be pickled: it works in the process that made it. Give other processes a "
                "SamplingClient, which can be pickled, or the path of a checkpoint, and send results back as values."
            )
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


def register_as_sdk_class(theirs: type, ours: type) -> None:
    """Make `isinstance(x, theirs)` true for our class: the SDK's clients are abstract base classes."""
    cast("ABCMeta", theirs).register(ours)


def sdk_errors(cls: type[T]) -> type[T]:
    """Make every public method of a class raise errors that are also the SDK's."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, staticmethod):
            setattr(cls, name, staticmethod(_translating(member.__func__)))
        elif inspect.isfunction(member):
            setattr(cls, name, _translating(member))
    return cls


def _translating(function: Callable[P, R]) -> Callable[P, R]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: P.args, **kwargs: P.kwargs) -> object:
            try:
                return await function(*args, **kwargs)
            except errors.JaxClientError as error:
                new = translate(error)
            raise new

        return cast(Callable[P, R], call_async)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Raised outside the except block: the original is not worth a "during handling of".
        try:
            return function(*args, **kwargs)
        except errors.JaxClientError as error:
            new = translate(error)
        raise new

    return call


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's program that called this package, however many frames of ours are between."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
