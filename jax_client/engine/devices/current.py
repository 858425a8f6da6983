"""Which leader has this process? One at most: jax's runtime of several hosts is one per process."""

from __future__ import annotations

from jax_client.engine.devices.leader import Leader

_current: Leader | None = None


def leads() -> Leader | None:
    """Return the leader of this process; None where it leads no other hosts."""
    return _current


def lead(leader: Leader | None) -> None:
    """Make a leader that of this process."""
    global _current
    _current = leader


def current() -> Leader:
    """Return the leader of this process.

    Raises:
        RuntimeError: it leads no other hosts.
    """
    if _current is None:
        raise RuntimeError("an array spans several hosts, but this process leads none; this is a bug.")
    return _current
