"""Which data types does the API speak? Tinker's own: every name of `tinker.types` is here, as the same object."""

from __future__ import annotations

from tinker import types as _types
from tinker.types import *  # noqa: F403


def __getattr__(name: str) -> object:
    return getattr(_types, name)


def __dir__() -> list[str]:
    return sorted({name for name in dir(_types) if not name.startswith("__")} | set(globals()))
