"""Which samplers of this process have handles? Here a handle leads back to the sampler itself."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle

# By the samplers' ids. A fork can use none of them.
here: weakref.WeakValueDictionary[str, SamplerHandle] = weakref.WeakValueDictionary()
os.register_at_fork(after_in_child=here.clear)
