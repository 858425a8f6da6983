"""Which pages of the cache hold what, and which states of recurrent layers? Allocation, shared prefixes, and eviction.

A page holds the keys and values of `PAGE` successive tokens. A published page stays after its last user and is found by
its contents: its owner and the weights' number, then page by page the tokens from the start. So a prompt that begins as
an earlier one of its owner did is not computed again. Of a recurrent model, a known beginning ends at a page behind
which a state was kept. Nothing here touches a device.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

PAGE = 32
SCRATCH = 0  # where the writes of padding go; never handed out

_Key = tuple[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """The published beginning of a prompt.

    Attributes:
        pages: in order; all of them full but perhaps the last.
        tokens: how many tokens they hold.
        node: names the last full page, for `publish`.
        state: of a recurrent model, the place of what the tokens leave behind; 0 where there are none.
    """

    pages: list[int]
    tokens: int
    node: int
    state: int = 0


class States:
    """The places of the states of one pool.

    A place has users: the row whose state it is, tiles that read it or write to it, and the page behind which it is
    kept. What only a page uses is found by later prompts, and goes, the longest unused first, where places run out.

    Args:
        count: places in the pool, the scratch place included; 0 for a model that is not recurrent.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, SCRATCH, -1))
        self._users = [0] * count
        self._behind: dict[int, int] = {}  # to the place of the state behind a page
        self._kept_for: dict[int, int] = {}  # the inverse
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def used(self) -> int:
        """Places that rows and tiles use."""
        return max(0, self.count - 1) - len(self._free) - len(self._idle)

    @property
    def kept(self) -> int:
        """Places that pages keep."""
        return len(self._behind)

    def take(self, count: int) -> list[int] | None:
        """Return places with one user each, evicting what is kept the longest; None if there are too few."""
        if count > len(self._free) + len(self._idle):
            return None
        while len(self._free) < count:
            self.forget(self._kept_for[next(iter(self._idle))])
        taken = [self._free.pop() for _ in range(count)]
        self.use(taken)
        return taken

    def use(self, places: Iterable[int]) -> None:
        """Give each place, but scratch, one more user."""
        for place in places:
            if place != SCRATCH:
                self._users[place] += 1
                self._idle.pop(place, None)

    def drop(self, places: Iterable[int]) -> None:
        """Take one user from each place, but scratch."""
        for place in places:
            if place == SCRATCH:
                continue
            self._users[place] -= 1
            if not self._users[place]:
                self._free.append(place)
            elif self._users[place] == 1 and place in self._kept_for:
                self._idle[place] = None

    def behind(self, page: int) -> int:
        """Return the place of the state that is kept behind a page; 0 if there is none."""
        return self._behind.get(page, SCRATCH)

    def keep(self, page: int, place: int) -> None:
        """Have a page, which keeps none, be a user of a place: what is left there once its tokens have run."""
        self.use([place])
        self._behind[page], self._kept_for[place] = place, page

    def forget(self, page: int) -> None:
        """Keep nothing behind a page any more."""
        if (place := self._behind.pop(page, None)) is not None:
            del self._kept_for[place]
            self._idle.pop(place, None)
            self.drop([place])


class Pages:
    """The pages of one pool.

    Args:
        count: pages in the pool, the scratch page included.
        states: places of states in the pool; 0 for a model that is not recurrent.
    """

    def __init__(self, count: int, states: int = 0):
        self.count = count
        self.states = States(states)
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
        exactly where the prompt does. Where there are states, it ends at a page that keeps one, or is empty. The pages,
        and the state, gain a user.

        Args:
            of: whose prompt it is and of which weights, as one name.
            tokens_T: int32, the prompt.
        """
        node, pages, at, last = self.root(of), [], 0, 0
        nodes = [node]
        while at < len(tokens_T) and (known := self._page_of.get((node, tokens_T[at : at + PAGE].tobytes()))):
            pages.append(known[0])
            at += PAGE
            if at <= len(tokens_T):
                node = known[1]
            nodes.append(node)
            if self.states.behind(known[0]):
                last = len(pages)
        state = SCRATCH
        if self.states:
            pages, at, node = pages[:last], last * PAGE, nodes[last]
            state = self.states.behind(pages[-1]) if pages else SCRATCH
            self.states.use([state])
        self.use(pages)
        return Prefix(pages=pages, tokens=min(at, len(tokens_T)), node=node, state=state)

    def release(self, prefix: Prefix) -> None:
        """Take from the pages and the state of a beginning the user that `find` gave them."""
        self.drop(prefix.pages)
        self.states.drop([prefix.state])

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

    def keep_state(self, node: int, tokens_S: np.ndarray, place: int) -> None:
        """Keep the state at a place behind the published page of these tokens, unless one is kept there.

        Args:
            node, tokens_S: as `publish` was given them.
            place: of the state once the tokens have run.
        """
        page, _ = self._page_of[node, tokens_S.tobytes()]
        if not self.states.behind(page):
            self.states.keep(page, place)

    def new_state_behind(self, node: int, tokens_S: np.ndarray) -> int:
        """Return a place for a state that is kept behind a published page, of which only that is a user yet.

        0 if one is kept there already, or rows and tiles use all places.
        """
        page, _ = self._page_of[node, tokens_S.tobytes()]
        if self.states.behind(page) or (taken := self.states.take(1)) is None:
            return SCRATCH
        self.states.keep(page, taken[0])
        self.states.drop(taken)
        return taken[0]

    def withdraw(self, page: int) -> None:
        """Make a page not findable any more: what it was published to hold will not be computed."""
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]
            self.states.forget(page)

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
            self.states.forget(page)
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
