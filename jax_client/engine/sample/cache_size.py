"""How large is a sampler's cache? Places for states first, where a model is recurrent, and then pages.

Sizes are of one way of the mesh that rows are split; bytes are of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from jax_client.engine.sample.pages import PAGE, Pages
from jax_client.models.config import ModelConfig
from jax_client.models.parts.gated_delta.layer import DELTA
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import count

CACHE_SHARE = 0.4  # of the free memory that the cache may take
STATES_SHARE = 0.5  # of that, for states
# For each row: its state, that behind its last full page, and one that is kept of another row.
STATES_PER_ROW = 3
FEWEST_PAGES = 16


def page_bytes(c: ModelConfig, dtype: DTypeLike) -> int:
    """Return the bytes of one page, all layers together, on all devices that share it."""
    return 2 * count(c, ATTENTION) * c.n_kv_heads * c.head_dim * PAGE * np.dtype(dtype).itemsize


def state_bytes(c: ModelConfig, dtype: DTypeLike) -> int:
    """Return the bytes of what a row leaves behind in recurrent layers, on all devices that share it; 0 without any."""
    if (delta := c.delta) is None:
        return 0
    state = 4 * delta.value_heads * delta.key_dim * delta.value_dim
    return count(c, DELTA) * (state + (delta.taps - 1) * delta.channels * np.dtype(dtype).itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """What a cache is made of.

    Attributes:
        page_bytes, state_bytes: of a page, and of a state.
        most_pages: that are of use.
        states: places for states, the scratch place included; 0 for a model that is not recurrent.
    """

    page_bytes: int
    state_bytes: int
    most_pages: int
    states: int

    @classmethod
    def of(cls, c: ModelConfig, dtype: DTypeLike, tensor: int, rows: int, tokens_per_row: int, free: int) -> CacheSize:
        """Return the sizes for a model.

        Args:
            c: the model.
            dtype: the matmul type.
            tensor: ways that heads are split.
            rows: that run at once, if there is memory.
            tokens_per_row: that pages are made for, if there is memory; a single row may have all of them.
            free: bytes that are free before there is a cache.
        """
        state, states = state_bytes(c, dtype) // tensor, 0
        if state:
            most = rows
            # Halves, here and below, so that what was compiled for one size is found again by later processes.
            while most > 1 and (1 + STATES_PER_ROW * most) * state > STATES_SHARE * CACHE_SHARE * free:
                most //= 2
            states = 1 + STATES_PER_ROW * most
        return cls(
            page_bytes=page_bytes(c, dtype) // tensor,
            state_bytes=state,
            most_pages=max(-(-c.max_context // PAGE), rows * tokens_per_row // PAGE),
            states=states,
        )

    def pages(self, free: int) -> int:
        """Return how many pages fit beside the states where these bytes are free."""
        pages = self.most_pages
        while self.bytes(pages) > CACHE_SHARE * free and pages > FEWEST_PAGES:
            pages //= 2
        return pages

    def bytes(self, pages: int) -> int:
        """Return what a cache with this number of pages takes."""
        return pages * self.page_bytes + self.states * self.state_bytes

    def described(self, ways: Sequence[Pages], tensor: int) -> dict[str, float]:
        """Return the size of a cache and what of it is in use, by the names under which these are shown.

        Args:
            ways: of the cache; empty where there is none.
            tensor: ways that heads are split.
        """
        return {
            "cache_tokens": sum(way.count for way in ways) * PAGE,
            "cache_bytes": tensor * sum(self.bytes(way.count) for way in ways),
            "pages_used": sum(way.used for way in ways),
            "states_used": sum(way.states.used for way in ways),
            "states_kept": sum(way.states.kept for way in ways),
        }
