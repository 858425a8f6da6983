"""What is known of a stored array before it exists? Its shape, its dtype and its logical axes, as `sharding.RULES` has.

`ParamSpec` is said of base weights and, with `LoraArray`'s shapes, of an adapter's arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpec:
    """Shape, dtype and logical axis names of one stored parameter."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


class LoraArray(NamedTuple):
    """One array of an adapter: its logical axes as in `sharding.RULES`, and the inputs of an A (0 for a B)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int
