"""Which pages of the key/value cache hold what? Allocation, shared prefixes, and eviction.

A page holds the keys and values of `PAGE` successive tokens. A published page stays after its last user and is found by
its contents: its owner and the weights' number, then page by page the tokens from the start. So a prompt that begins as
an earlier one of its owner did is not computed again. Nothing here touches a device.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from jax_client.models.config import ModelConfig
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import count

PAGE = 32
CACHE_SHARE = 0.4  # of the free memory that the pages may take
FEWEST_PAGES = 16
SCRATCH = 0  # where the writes of padding go; never handed out

_Key = tuple[int, bytes]


def page_bytes(c: ModelConfig, dtype: DTypeLike) -> int:
    """Return the bytes of one page, all layers together, on all devices that share it."""
    return 2 * count(c, ATTENTION) * c.n_kv_heads * c.head_dim * PAGE * np.dtype(dtype).itemsize


def most_pages(max_context: int, tokens: int) -> int:
    """Return how many pages a way's pool has where there is memory for all: for `tokens`, and for one longest row."""
    return max(-(-max_context // PAGE), tokens // PAGE)


def fitting_pages(most: int, size: int, free: int) -> int:
    """Return how many pages, at most `most`, a way's pool has.

    Args:
        most: that are of use.
        size: of a page on each device, in bytes.
        free: bytes of each device.
    """
    pages = most
    # Halves, so that what was compiled for one size is found again by later processes.
    while pages * size > CACHE_SHARE * free and pages > FEWEST_PAGES:
        pages //= 2
    return pages


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """The published beginning of a prompt.

    Attributes:
        pages: in order; all of them full but perhaps the last.
        tokens: how many tokens they hold.
        node: names the last full page, for `publish`.
    """

    pages: list[int]
    tokens: int
    node: int


class Pages:
    """The pages of one pool.

    Args:
        count: pages in the pool, the scratch page included.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, SCRATCH, -1))
        self._users = [0] * count
        self._page_of: dict[_Key, tuple[int, int]] = {}  # to (page, node)
        self._key_of: dict[int, _Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published pages without users, the longest unused first
        self._roots: dict[Hashable, int] = {}
        self._nodes = itertools.count()

    @property
    def available(self) -> int:
        """Pages that `take` could give: free ones, and published ones that no row uses."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that rows use."""
        return self.count - 1 - self.available

    def is_shared(self, page: int) -> bool:
        """Whether more than one row uses a page."""
        return self._users[page] > 1

    def last_of(self, users: Mapping[int, int]) -> int:
        """Return how many pages no row would use any more without these users of each."""
        return sum(self._users[page] == count for page, count in users.items())

    def find(self, of: Hashable, tokens_T: np.ndarray) -> Prefix:
        """Return the longest known beginning of a prompt, page by page; its last page may be a partial one that ends
        exactly where the prompt does. The pages gain a user.

        Args:
            of: whose prompt it is and of which weights, as one name.
            tokens_T: int32, the prompt.
        """
        node, pages, at = self.root(of), [], 0
        while at < len(tokens_T) and (known := self._page_of.get((node, tokens_T[at : at + PAGE].tobytes()))):
            pages.append(known[0])
            at += PAGE
            if at <= len(tokens_T):
                node = known[1]
        self.use(pages)
        return Prefix(pages=pages, tokens=min(at, len(tokens_T)), node=node)

    def publish(self, node: int, page: int, tokens_S: np.ndarray) -> int:
        """Make a page findable by what it holds; return its node, the parent of the page that follows.

        Where the same was published before, that page stays the known one.

        Args:
            node: of the full page before it, or the root (`Prefix.node`).
            tokens_S: int32, at most `PAGE` of them.
        """
        key = (node, tokens_S.tobytes())
        if key not in self._page_of:
            self._page_of[key] = (page, next(self._nodes))
            self._key_of[page] = key
        return self._page_of[key][1]

    def withdraw(self, page: int) -> None:
        """Make a page not findable any more: what it was published to hold will not be computed."""
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]

    def root(self, of: Hashable) -> int:
        """Return the node of an owner and weights, before the first page."""
        if of not in self._roots:
            self._roots[of] = next(self._nodes)
        return self._roots[of]

    def take(self, count: int) -> list[int] | None:
        """Return pages with one user each, evicting those unused the longest; None if there are too few."""
        if count > self.available:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        self.use(taken)
        return taken

    def use(self, pages: Iterable[int]) -> None:
        """Give each page one more user."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def drop(self, pages: Iterable[int]) -> None:
        """Take one user from each page. The last page is evicted before those that lead to it."""
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
