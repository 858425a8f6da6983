"""Which replica has computed the beginning of a prompt? A table of hashes of full pages, the longest unused forgotten.

A replica's cache is exact; this table is only an estimate of what is there. A wrong entry costs a prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from jax_client.engine.sample.pages import PAGE

# Entries: of 2,048 tokens each, the prompts of 4,096 conversations.
MOST = 2**18
Chain = tuple[int, ...]


def chain(owner: str, version: int, tokens_T: np.ndarray) -> Chain:
    """Return a hash of whose pages they are, then one for each beginning of full pages, the shortest first.

    No two owners, and no two versions, share any.
    """
    return extended((hash((owner, version)),), tokens_T)


def extended(before: Chain, tokens_T: np.ndarray) -> Chain:
    """Return a chain with the hashes of the full pages that follow its last one."""
    hashes, data = list(before), np.ascontiguousarray(tokens_T, np.int32)
    for start in range(0, len(data) - PAGE + 1, PAGE):
        hashes.append(hash((hashes[-1], data[start : start + PAGE].tobytes())))
    return tuple(hashes)


class Prefixes:
    """The newest replica by hash. A replica that was started anew is another one: its cache is empty.

    Args:
        most: entries.
    """

    def __init__(self, most: int = MOST) -> None:
        self._replicas: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._most = most

    def find(self, hashes: Chain, alive: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Return the replica with the longest known beginning, of those that are alive; None without one.

        Args:
            hashes: the prompt's chain.
            alive: number and starts of each replica.
        """
        for each in reversed(hashes[1:]):
            if (found := self._replicas.get(each)) in alive:
                return found
        return None

    def note(self, hashes: Chain, replica: tuple[int, int]) -> None:
        """Record that a replica computes these beginnings."""
        for each in hashes[1:]:
            self._replicas[each] = replica
            self._replicas.move_to_end(each)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)
