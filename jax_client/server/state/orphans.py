"""Which samples does no client wait for any more? Those whose client is silent, or has closed its poll's connection.

`Orphans` cancels these samples, whether memory is short or not: samples that wait never start, and running ones leave
the device at the next block. Training continues, for it changes a model. A client that does live is told to send the
request again (410), and the SDK does so.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jax_client.server.state.ledger import RequestLedger
from jax_client.server.state.live_objects import LiveObjects
from jax_client.server.state.pending import PendingRequest
from jax_client.server.wire import answers

# The SDK gives a sign of life every ten seconds, and polls for each of its samples.
SILENT_SECONDS = 60.0
CHECK_SECONDS = 5.0
# After a connection was lost, the SDK polls again within a second.
GRACE_SECONDS = 2.0

# later(seconds, f) calls f() after that time, as the event loop's `call_later`.
Later = Callable[[float, Callable[[], None]], object]


class Orphans:
    """Cancels the samples of clients that are gone. To be used on the event loop's thread.

    Args:
        live: knows the clients' signs of life.
        ledger: where the requests are.
    """

    def __init__(self, live: LiveObjects, ledger: RequestLedger) -> None:
        self._live = live
        self._ledger = ledger
        self._watching = False

    def seen(self, request: PendingRequest) -> None:
        """Note a sign of life of the client that sent a request."""
        self._live.note_sign(_session_of(request))

    def poll_began(self, request: PendingRequest) -> None:
        """Note a poll for a request, which is a sign of life too."""
        self.seen(request)
        request.polls_waiting += 1
        request.polls_begun += 1

    def poll_ended(self, request: PendingRequest, later: Later, *, connected: bool) -> None:
        """Note the end of a poll; cancel the sample if its client has closed the connection and does not poll again."""
        request.polls_waiting -= 1
        begun = request.polls_begun
        if connected:
            self.seen(request)
        elif request.kind == "sample" and not request.answer.done():
            later(GRACE_SECONDS, lambda: _cancel_unless_polled(request, begun))

    def watch(self, later: Later) -> None:
        """Look for samples of silent clients from time to time, for as long as there are samples."""
        if not self._watching:
            self._watching = True
            later(CHECK_SECONDS, lambda: self._check(later))

    def cancel_silent(self) -> bool:
        """Cancel the samples whose clients are silent; return whether there are others."""
        samples = [request for request in self._ledger.unanswered() if request.kind == "sample"]
        limit = time.monotonic() - SILENT_SECONDS
        silent = [request for request in samples if self._live.last_sign(_session_of(request)) < limit]
        for request in silent:
            _cancel(request, f"its client was silent for {SILENT_SECONDS:g} s")
        return len(silent) < len(samples)

    def _check(self, later: Later) -> None:
        self._watching = False
        if self.cancel_silent():
            self.watch(later)


def _session_of(request: PendingRequest) -> str:
    return request.request_id.partition(":")[0]


def _cancel_unless_polled(request: PendingRequest, begun: int) -> None:
    if not request.polls_waiting and request.polls_begun == begun:
        _cancel(request, "the connection of its client was closed")


def _cancel(request: PendingRequest, why: str) -> None:
    request.cancel(answers.retry_later(f"the sample was cancelled: {why}. Send the request again."))
