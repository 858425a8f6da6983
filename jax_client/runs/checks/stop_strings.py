"""Where does a stop string end in the tokens of a row? `StopStrings` returns how many to keep; `rows.py` cuts there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

# The most new tokens between two calls for one row. Decode blocks are far smaller.
MAX_NEW_TOKENS = 256
# A cut inside a character, and tokens without text of their own.
_MARGIN_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class StopStrings:
    """Find the first stop string in a row that grows; has no state, so that any row may call it at any time.

    Only the end of the row is decoded: its newest tokens, and as many before them as the longest stop string can
    take. So a call costs the same however long the row is. It must be called at least every `MAX_NEW_TOKENS` tokens.

    Attributes:
        stops: the stop strings, none empty.
        decode: from token ids to text.
    """

    stops: tuple[str, ...]
    decode: Callable[[list[int]], str]
    window: int = field(init=False)

    def __post_init__(self) -> None:
        # A token with text stands for one byte at least.
        longest = max(len(stop.encode("utf-8", "surrogatepass")) for stop in self.stops)
        object.__setattr__(self, "window", longest + MAX_NEW_TOKENS + _MARGIN_TOKENS)

    def __call__(self, tokens: list[int]) -> int | None:
        """Return how many tokens to keep, the one that completes the first stop string included; None without one."""
        start = max(0, len(tokens) - self.window)
        if not self._stops_in(tokens[start:]):
            return None
        below, keep = start, len(tokens)
        while keep - below > 1:
            middle = (below + keep) // 2
            if self._stops_in(tokens[start:middle]):
                keep = middle
            else:
                below = middle
        return keep

    def _stops_in(self, tokens: list[int]) -> bool:
        text = self.decode(tokens)
        return any(stop in text for stop in self.stops)
