"""How much may the clients of one key have at once? An `Account` counts what they have, each kind within its `Quota`.

A key is what authenticates; where there is none, all clients share one account. An account may belong to another one,
which counts what all keys have together. What is over a quota is refused with status 429: the SDK then waits and sends
the same request, a sampling request for as long as it takes, others for five minutes. So a burst costs its client time,
and never a request, the server's memory, or other clients' answers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from jax_client.errors import JaxClientError

RETRY_SECONDS = 1


class BusyError(JaxClientError):
    """A request is over a quota now; the client may send it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """The most that an account may have at once.

    Attributes:
        bytes: of bodies that are being read, and of those whose requests have no answer yet.
        arriving_bytes: of bodies that are being read or decompressed; they hold no work yet.
        sampling_requests: without an answer.
        samples: that these requests ask for, also the most for one of them. The engine refuses 65,536 waiting samples
            for good, so this is lower.
        training_requests: without an answer.
        polls: that wait for an answer.
        loads: of samplers and models that have not ended.
        file_checks: comparisons of all files of a checkpoint with their hashes, for links to an export or a copy.
        sessions: that are open.
        records: that these sessions keep, one for each model and each sampler.
        record_bytes: of the records, and of what clients say of their sessions.
    """

    bytes: int = 2**30
    arriving_bytes: int = 96 * 2**20
    sampling_requests: int = 10_000
    samples: int = 60_000
    training_requests: int = 10_000
    polls: int = 8_192
    loads: int = 128
    file_checks: int = 8
    sessions: int = 2_048
    records: int = 200_000
    record_bytes: int = 16 * 2**20


_ADVICE = {
    "bytes": "A single call that is larger never fits: send less data with each.",
    "arriving_bytes": "They are read as others arrive.",
    "sessions": "Close the ServiceClients that are not used any more.",
    "records": "Close the ServiceClients that are not used any more, or make fewer samplers in each.",
    "record_bytes": "Close the ServiceClients that are not used any more, or give them less metadata.",
}


_WHOLE_BUSY = f"the clients of all keys together are at a limit of this server; send it again in {RETRY_SECONDS} s."


class Arriving(Protocol):
    """A body that is being read."""

    def drop_if_late(self) -> None:
        """Stop reading the body if it takes longer than its size explains."""
        ...


class Account:
    """What the clients of one key have in use. Thread-safe.

    Args:
        quota: its limits.
        whole: the account that counts what all keys have, None for an account of its own.
        relieve: `relieve()` is called where bytes or requests are over the quota; it ends requests that wait for
            nothing.
    """

    def __init__(
        self, quota: Quota | None = None, whole: Account | None = None, relieve: Callable[[], None] = lambda: None
    ) -> None:
        self._quota: dict[str, int] = asdict(quota or Quota())
        self._used = dict.fromkeys(self._quota, 0)
        self._whole = whole
        self.relieve = relieve
        # What its clients have sent and got so far, for the operator.
        self.totals: Counter[str] = Counter()
        # Of requests that are counted until they are answered: the first of two repetitions counts.
        self.counted: set[str] = set()
        self.arriving: set[Arriving] = set()
        self._lock = threading.Lock()

    def used(self, kind: str) -> int:
        """Return how much of one kind, a field of `Quota`, is in use."""
        return self._used[kind]

    def note(self, **amounts: int) -> None:
        """Add to the totals of what its clients have sent and got."""
        with self._lock:
            for kind, amount in amounts.items():
                self.totals[kind] += amount

    def limit(self, kind: str) -> int:
        """Return the quota of one kind."""
        return self._quota[kind]

    def take(self, **amounts: int) -> None:
        """Count amounts of some kinds, all or none of them.

        Raises:
            BusyError: one is over its quota; nothing was counted.
        """
        refused = self._refused(amounts)
        if refused is not None and {"bytes", "arriving_bytes", "training_requests"} & set(amounts):
            for body in list(self.arriving):
                body.drop_if_late()
            self.relieve()
            refused = self._refused(amounts)
        if refused is not None:
            raise BusyError(refused)
        if self._whole is not None:
            try:
                self._whole.take(**amounts)
            except BusyError:
                self._uncount(amounts)
                # Not the message, which has the numbers of all keys.
                raise BusyError(_WHOLE_BUSY) from None

    def add(self, **amounts: int) -> None:
        """Count amounts, whatever the quota: what is in memory is counted."""
        with self._lock:
            for kind, amount in amounts.items():
                self._used[kind] += amount
        if self._whole is not None:
            self._whole.add(**amounts)

    def give(self, **amounts: int) -> None:
        """Uncount amounts."""
        self._uncount(amounts)
        if self._whole is not None:
            self._whole.give(**amounts)

    def _uncount(self, amounts: dict[str, int]) -> None:
        with self._lock:
            for kind, amount in amounts.items():
                self._used[kind] -= amount

    def _refused(self, amounts: dict[str, int]) -> str | None:
        """Count the amounts and return None, or return why not."""
        with self._lock:
            for kind, amount in amounts.items():
                used, limit = self._used[kind], self._quota[kind]
                if used + amount > limit:
                    return _message(kind, used, limit)
            for kind, amount in amounts.items():
                self._used[kind] += amount
        return None

    def count_until(self, request_id: str, answer: Any, amounts: dict[str, int]) -> bool:
        """Uncount amounts that were taken for a request when it is answered; False if another has the same id."""
        with self._lock:
            if request_id in self.counted:
                return False
            self.counted.add(request_id)

        def free(_: Any) -> None:
            with self._lock:
                self.counted.discard(request_id)
            self.give(**amounts)

        answer.add_done_callback(free)
        return True


def _message(kind: str, used: int, limit: int) -> str:
    name = kind.replace("_", " ")
    if kind.endswith("bytes"):
        have = f"{used / 1e6:.0f} MB of {'requests' if kind == 'bytes' else name.removesuffix(' bytes') + ' data'}"
        most = f"{limit / 1e6:.0f} MB"
    else:
        have, most = f"{used:,} {name}", f"{limit:,}"
    advice = _ADVICE.get(kind)
    return f"the clients of this key have {have} already, the limit is {most}; send it again in {RETRY_SECONDS} s." + (
        f" {advice}" if advice else ""
    )
