"""How does a process serve its samplers to others of its user? On a Unix socket, from the first handle on.

The socket has mode 0600 in a directory of mode 0700, and connections of other users are dropped. What is served is the
whole protocol, for the sampler's state directory: whoever may open the socket may read these files too.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import struct
import tempfile
import threading
import weakref
from functools import partial
from typing import Any

from jax_client.clients.handles import Handle
from jax_client.config import EngineConfig
from jax_client.errors import NotFoundError
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
from jax_client.runs.lifecycle.session import Session, live_sessions
from jax_client.server.app import CLIENT_CONFIG, DYNAMIC_CONFIG, build_app
from jax_client.server.state.live_objects import IN_MEMORY, Sampling
from jax_client.server.state.server import Server
from jax_client.server.wire.connections import Connection, http_server

# In each process that samples: every request in flight holds a connection, and a process may often have only 1,024.
MAX_CONCURRENT = 64
# The address holds 108 bytes on Linux and 104 on macOS, its end included.
MAX_PATH = 100


class SharedSamplers(Server):
    """The sessions of this process, as a server's, and those of their samplers that have handles. Thread-safe.

    A sampler with a handle is served for as long as its client lives. Those without a client are kept as a server keeps
    the samplers of a loop that makes one with every step: the newest few.

    Args:
        config: engine settings, of sessions that are made over the socket.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        # A user who lists the sessions of this process finds those that were made.
        live_sessions.pop(self.own.session_id, None)
        self._alive: weakref.WeakValueDictionary[str, SamplerHandle] = weakref.WeakValueDictionary()
        self._known_sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def share(self, sampler: SamplerHandle) -> None:
        """Serve a sampler, as the newest of its session."""
        session = sampler.session
        with self._lock:
            if session not in self._known_sessions:
                self._known_sessions.add(session)
                session.at_close(partial(self._forget, session.session_id))
            self._alive[sampler.sampler_id] = sampler
            self._samplers.pop(sampler.sampler_id, None)
            self.adopt(sampler)
        self._tidy(session.session_id)

    def session(self, session_id: str) -> Session:
        """Return a session of this process. Raises NotFoundError."""
        return live_sessions.get(session_id) or super().session(session_id)

    def sampling(self, sampler_id: str) -> Sampling:
        """Return a sampler that has a handle, or was made over the socket.

        Raises:
            NotFoundError: there is none of this id, or not any more.
        """
        alive = self._alive.get(sampler_id)
        if alive is not None:
            return Sampling.of(alive)
        try:
            return super().sampling(sampler_id)
        except NotFoundError:
            raise NotFoundError(
                f"process {os.getpid()} has no sampler {sampler_id!r} any more: its session is closed, or its "
                f"SamplingClient is gone and {IN_MEMORY} newer ones have handles. Keep the client for as long as "
                "others sample with it."
            ) from None


class SameUser(Connection):
    """HTTP for connections of this process's user; others are dropped unread."""

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, or drop it."""
        if _user_of(transport.get_extra_info("socket")) in (None, os.geteuid()):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection that was accepted."""
        if self in self.connections:
            super().connection_lost(exc)


def _user_of(connection: Any) -> int | None:
    """Return the user id of a Unix socket's other end, None where the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]


class Sharing:
    """A server on a socket of its own, until the process ends.

    Attributes:
        path: the socket's.
        samplers: what it serves.

    Args:
        config: engine settings.
    """

    def __init__(self, config: EngineConfig) -> None:
        roomy = len(os.fsencode(tempfile.gettempdir())) <= MAX_PATH - len("/jax_client-12345678/s")
        folder = tempfile.mkdtemp(prefix="jax_client-", dir=None if roomy else "/tmp")
        atexit.register(_remove, folder, os.getpid())
        self.path = os.path.join(folder, "s")
        self.samplers = SharedSamplers(config)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        os.chmod(self.path, 0o600)
        # From here on a connection is accepted, and waits until the thread is ready.
        self._listening.listen()
        http = http_server(build_app(self.samplers), SameUser, loop="asyncio")
        serve = partial(http.run, sockets=[self._listening])
        threading.Thread(target=serve, name="jax_client-sharing", daemon=True).start()

    def leave(self) -> None:
        """Let go of the socket in a forked process, which could not answer on it."""
        self._listening.close()


def _remove(folder: str, process: int) -> None:
    # Forked processes inherit what is to be done at exit.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


_sharing: Sharing | None = None
_lock = threading.Lock()


def _after_fork() -> None:
    global _sharing, _lock
    _lock = threading.Lock()
    if _sharing is not None:
        _sharing.leave()
        _sharing = None


os.register_at_fork(after_in_child=_after_fork)


def share(sampler: SamplerHandle) -> Handle:
    """Serve a sampler to other processes; the first call starts the server.

    Raises:
        SessionClosedError: the sampler's session is closed.
    """
    global _sharing
    sampler.session.check_open()
    with _lock:
        if _sharing is None:
            _sharing = Sharing(sampler.session.config)
        sharing = _sharing
    sharing.samplers.share(sampler)
    model = sampler.model_ref.model.source
    return Handle(
        socket=sharing.path,
        process=os.getpid(),
        session_id=sampler.session.session_id,
        sampler_id=sampler.sampler_id,
        base_model=sampler.model_ref.name,
        model_path=str(model.path),
        model_kind=model.kind,
        client_config=CLIENT_CONFIG.model_dump() | {"sample_max_concurrent_requests": MAX_CONCURRENT},
        dynamic_config=DYNAMIC_CONFIG.model_dump(),
    )
