"""What does a user import? Every top-level name of `tinker`, served here; and `EngineConfig`, `log` and `errors`.

Names are loaded on first use, so that `import jax_client` costs milliseconds and never touches a device.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker import *  # noqa: F403

    from jax_client import errors as errors
    from jax_client import types as types
    from jax_client.clients.log import log as log
    from jax_client.clients.rest import AdminClient as AdminClient
    from jax_client.clients.rest import RestClient as RestClient
    from jax_client.clients.sampling import BackcompatSamplingClientFuture as BackcompatSamplingClientFuture
    from jax_client.clients.sampling import SamplingClient as SamplingClient
    from jax_client.clients.service import ServiceClient as ServiceClient
    from jax_client.clients.training import BackcompatTrainingClientFuture as BackcompatTrainingClientFuture
    from jax_client.clients.training import TrainingClient as TrainingClient
    from jax_client.config import EngineConfig as EngineConfig

__title__ = "jax_client"

_OURS = {
    "AdminClient": "jax_client.clients.rest",
    "BackcompatSamplingClientFuture": "jax_client.clients.sampling",
    "BackcompatTrainingClientFuture": "jax_client.clients.training",
    "EngineConfig": "jax_client.config",
    "RestClient": "jax_client.clients.rest",
    "SamplingClient": "jax_client.clients.sampling",
    "ServiceClient": "jax_client.clients.service",
    "TrainingClient": "jax_client.clients.training",
    "log": "jax_client.clients.log",
}
_MODULES = ("errors", "types")


def __getattr__(name: str) -> object:
    if name in _OURS:
        value: object = getattr(importlib.import_module(_OURS[name]), name)
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("jax_client")
    elif name.startswith("_"):
        raise AttributeError(f"module 'jax_client' has no attribute {name!r}")
    # `from jax_client import process` asks here first, and must not import tinker.
    elif name in _MODULES or importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f"jax_client.{name}")
    else:
        value = _from_tinker(name)
    globals()[name] = value
    return value


def _from_tinker(name: str) -> object:
    tinker = importlib.import_module("tinker")
    if name not in tinker.__all__:
        raise AttributeError(f"module 'jax_client' has no attribute {name!r}")
    return getattr(tinker, name)


def __dir__() -> list[str]:
    tinker = importlib.import_module("tinker")
    return sorted({*globals(), *_OURS, *_MODULES, *tinker.__all__})
