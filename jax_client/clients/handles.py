"""Which samplers of this process have handles? Here a handle leads back to the sampler itself."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from jax_client import process

if TYPE_CHECKING:
    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle

# By the samplers' ids.
here: weakref.WeakValueDictionary[str, SamplerHandle] = weakref.WeakValueDictionary()
process.register("handles", "the samplers of this process that have handles", after_fork=here.clear)
