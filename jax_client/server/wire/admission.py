"""How much may wait at once? `AdmissionLimits` counts bodies and samples, and refuses what is more with status 429.

The SDK then waits and sends the same request: a sampling request for as long as it takes, others for five minutes. So a
burst costs its client time, and never a request, the server's memory, or other clients' answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from jax_client.errors import JaxClientError
from jax_client.server.wire.answers import Answer

# The bytes of bodies that are being read, and of those whose requests have no answer yet.
MAX_BYTES = 2**30
# Sampling requests without an answer, and the samples that they ask for. The engine refuses 65,536 waiting samples for
# good, so the limit here is lower.
MAX_REQUESTS = 10_000
MAX_SAMPLES = 60_000
RETRY_SECONDS = 1


class BusyError(JaxClientError):
    """A request is over the limits now; the client may send it again."""


class AdmissionLimits:
    """Counts the bytes, sampling requests and samples that wait. Thread-safe.

    Attributes:
        bytes, requests, samples: the counts.

    Args:
        relieve: `relieve()` is called at the limit of bytes; it ends requests that wait for nothing.
        max_bytes, max_requests, max_samples: the limits.
    """

    def __init__(
        self,
        relieve: Callable[[], None] = lambda: None,
        *,
        max_bytes: int | None = None,
        max_requests: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._relieve = relieve
        self._max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self._max_requests = MAX_REQUESTS if max_requests is None else max_requests
        self._max_samples = MAX_SAMPLES if max_samples is None else max_samples
        self.bytes = 0
        self.requests = 0
        self.samples = 0
        self._counted: set[str] = set()
        self._lock = threading.Lock()

    def check_samples(self, samples: int) -> None:
        """Check that a sampling request is within the limits. Raises BusyError."""
        if self.requests >= self._max_requests or (self.samples and self.samples + samples > self._max_samples):
            raise BusyError(
                f"{self.requests} sampling requests with {self.samples} samples wait already, the limits are "
                f"{self._max_requests} and {self._max_samples}; send it again in {RETRY_SECONDS} s."
            )

    def grow(self, size: int) -> None:
        """Count bytes of a body. Raises BusyError."""
        if self._grew(size):
            return
        self._relieve()
        if not self._grew(size):
            raise BusyError(
                f"{self.bytes / 1e6:.0f} MB of requests wait, the limit is {self._max_bytes / 1e6:.0f} MB; send "
                "it again. A single call that is larger never fits: send less data with each."
            )

    def _grew(self, size: int) -> bool:
        with self._lock:
            if self.bytes + size > self._max_bytes:
                return False
            self.bytes += size
            return True

    def shrink(self, size: int) -> None:
        """Uncount bytes."""
        with self._lock:
            self.bytes -= size

    def keep(self, request_id: str, size: int, samples: int, answer: Future[Answer]) -> bool:
        """Count a request until it is answered; False if it was counted already, as the first of two repetitions."""
        with self._lock:
            if request_id in self._counted:
                return False
            self._counted.add(request_id)
            if samples:
                self.requests += 1
                self.samples += samples

        def free(_: Future[Answer]) -> None:
            with self._lock:
                self._counted.discard(request_id)
                self.bytes -= size
                if samples:
                    self.requests -= 1
                    self.samples -= samples

        answer.add_done_callback(free)
        return True


class Load:
    """The bytes of one request, counted from the first one. As a context, it uncounts them unless `keep` was called.

    Args:
        limits: where the bytes are counted.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._size = 0

    def grow(self, size: int) -> None:
        """Count a piece of the body. Raises BusyError."""
        self._limits.grow(size)
        self._size += size

    def keep(self, request_id: str, answer: Future[Answer], samples: int = 0) -> None:
        """Keep the bytes counted until the request is answered."""
        if self._limits.keep(request_id, self._size, samples, answer):
            self._size = 0

    def __enter__(self) -> Load:
        """Return the load."""
        return self

    def __exit__(self, *_: object) -> None:
        """Uncount the bytes that are not kept."""
        if self._size:
            self._limits.shrink(self._size)
