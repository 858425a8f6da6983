"""Which part of its key's account does one request use? `Load` counts it from the first byte of the body on.

The guard opens a load for every request and closes it with the response, so no route can forget to count. What a
request keeps until its answer, `Load.keep` leaves counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from jax_client.server.wire.accounts import RETRY_SECONDS, Account, BusyError

if TYPE_CHECKING:
    from jax_client.server.wire.answers import Answer

# Where there is no room for others, a body is dropped that takes longer than this to arrive. Only then: without
# pressure a slow client is let finish.
LATE_SECONDS = 10.0
LEAST_BYTES_PER_SECOND = 2**20
# The part of the room for arriving bodies that is kept for small ones: sessions, polls and samples fit beside uploads.
SMALL_BODY = 64 * 2**10
RESERVED = 4
_SCOPE_KEY = "jax_client.load"


class Load:
    """What one request has counted in an account. As a context, it uncounts what is not kept.

    Attributes:
        account: where it counts.

    Args:
        account: where it counts.
    """

    def __init__(self, account: Account) -> None:
        self.account = account
        self._stop: Callable[[], object] | None = None
        # What is counted: bytes of the body, those of them that arrive, and the work that the body asks for.
        self._bytes = self._arriving = 0
        self._work: dict[str, int] = {}
        # What was read of the body so far.
        self._size = 0
        self._started = time.monotonic()

    def reading(self, stop: Callable[[], object] | None) -> None:
        """Note that the body is being read, and `stop()` ends that; None where it is not, or not any more."""
        self._stop = stop
        if stop is None:
            self.account.arriving.discard(self)
        else:
            self.account.arriving.add(self)

    def grow(self, size: int) -> None:
        """Count a piece of the body. Raises BusyError."""
        self._size += size
        if self._size > SMALL_BODY:
            self._check_room(size)
            self.account.take(bytes=size, arriving_bytes=size)
        else:
            # A poll or a sign of life is read however much work waits; what is work itself has to `take`.
            self.account.take(arriving_bytes=size)
            self.account.add(bytes=size)
        self._bytes += size
        self._arriving += size

    def _check_room(self, size: int) -> None:
        """Check that a large body's piece leaves the room for small ones. Raises BusyError."""
        limit = self.account.limit("arriving_bytes")
        most = limit - limit // RESERVED
        if self.account.used("arriving_bytes") + size <= most:
            return
        for body in list(self.account.arriving):
            body.drop_if_late()
        if (used := self.account.used("arriving_bytes")) + size > most:
            raise BusyError(
                f"bodies of {used / 1e6:.0f} MB arrive already, the limit for large ones is {most / 1e6:.0f} MB; send "
                f"it again in {RETRY_SECONDS} s."
            )

    def take(self, **amounts: int) -> None:
        """Count amounts of some kinds until the request ends or is answered.

        Raises:
            BusyError: one is over its quota, or the bodies that wait are.
        """
        self.account.take(bytes=0, **amounts)
        for kind, amount in amounts.items():
            self._work[kind] = self._work.get(kind, 0) + amount

    def shrink(self, size: int) -> None:
        """Uncount a part of the body that is no longer in memory."""
        self.account.give(bytes=size, arriving_bytes=size)
        self._bytes -= size
        self._arriving -= size

    def arrived(self) -> None:
        """Note that the body is whole."""
        if self._arriving:
            self.account.give(arriving_bytes=self._arriving)
            self._arriving = 0

    def drop(self) -> None:
        """Uncount the body: its pieces are no longer in memory."""
        self.account.give(bytes=self._bytes, arriving_bytes=self._arriving)
        self._bytes = self._arriving = 0

    def drop_if_late(self) -> None:
        """Stop reading the body if it takes longer than its size explains."""
        age = time.monotonic() - self._started
        if self._stop is not None and age > LATE_SECONDS + self._size / LEAST_BYTES_PER_SECOND:
            self._stop()
            self.drop()

    def keep(self, request_id: str, answer: Future[Answer]) -> None:
        """Keep what is counted until the request is answered."""
        self.arrived()
        if self.account.count_until(request_id, answer, {"bytes": self._bytes, **self._work}):
            self._bytes, self._work = 0, {}

    def __enter__(self) -> Load:
        """Return the load."""
        return self

    def __exit__(self, *_: object) -> None:
        """Uncount what is not kept."""
        if self._bytes or self._arriving or self._work:
            self.account.give(bytes=self._bytes, arriving_bytes=self._arriving, **self._work)
            self._bytes, self._arriving, self._work = 0, 0, {}

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        """Make this the load of a request."""
        scope[_SCOPE_KEY] = self


def load_of(request: Request) -> Load:
    """Return the load of a request, which the guard has opened."""
    found = request.scope[_SCOPE_KEY]
    if not isinstance(found, Load):
        raise TypeError("the request did not come through the guard")
    return found
