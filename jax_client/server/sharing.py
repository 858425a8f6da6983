"""How does a process serve its samplers to others of its user? On a Unix socket, from the first handle on.

The socket has mode 0600 in a directory of mode 0700, and connections of other users are dropped. The whole
protocol is served, for the sampler's state directory: a user who may open the socket may read these files too.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
import weakref
from functools import partial
from typing import Any

from jax_client import process
from jax_client.config import EngineConfig
from jax_client.process import Step
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
from jax_client.runs.lifecycle.session import Session, live_sessions
from jax_client.runs.sampler_address import SamplerAddress
from jax_client.server.app import build_app
from jax_client.server.routes.sessions import CLIENT_CONFIG, DYNAMIC_CONFIG
from jax_client.server.state.live_objects import ClientObjects
from jax_client.server.state.server import Server
from jax_client.server.wire.connections import Connection, http_server
from jax_client.threads import start_thread

# In each process that samples: every request in flight holds a connection, and a process may often have only 1,024.
MAX_CONCURRENT = 64
# The address holds 108 bytes on Linux and 104 on macOS, its end included.
MAX_PATH = 100


class SharedSamplers:
    """A server of this process's sessions, and of those of their samplers that have handles. Thread-safe.

    The server can reach a sampler with a handle for as long as its client lives. Without its client the sampler stays
    while it is among the newest of its session, as a server keeps the samplers of a loop that makes one every step.

    Attributes:
        server: what answers on the socket.

    Args:
        config: engine settings of sessions that are made over the socket.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._samplers: weakref.WeakValueDictionary[str, SamplerHandle] = weakref.WeakValueDictionary()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.server = Server(config, clients=ClientObjects(sessions=live_sessions, samplers=self._samplers))
        # The server's own session is not one that a user made, so that listings leave it out.
        live_sessions.pop(self.server.live.own.session_id, None)

    def share(self, sampler: SamplerHandle) -> None:
        """Serve a sampler, as the newest of its session."""
        session, live = sampler.session, self.server.live
        with self._lock:
            new = session not in self._sessions
            self._sessions.add(session)
            self._samplers[sampler.sampler_id] = sampler
        if new:
            session.at_close(partial(live.forget_session, session.session_id))
        live.adopt(sampler)


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
        samplers: the samplers that are served.

    Args:
        config: engine settings.
    """

    def __init__(self, config: EngineConfig) -> None:
        roomy = len(os.fsencode(tempfile.gettempdir())) <= MAX_PATH - len("/jax_client-12345678/s")
        folder = tempfile.mkdtemp(prefix="jax_client-", dir=None if roomy else "/tmp")
        self.path = os.path.join(folder, "s")
        self.samplers = SharedSamplers(config)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        os.chmod(self.path, 0o600)
        # From here on a connection is accepted, and waits until the thread is ready.
        self._listening.listen()
        self._http = http_server(build_app(self.samplers.server), SameUser, loop="asyncio")
        start_thread("jax_client-sharing", partial(self._http.run, sockets=[self._listening]))

    def stop(self) -> None:
        """Accept no more connections, cut those that are open, and remove the socket."""
        self._http.should_exit = self._http.force_exit = True
        shutil.rmtree(os.path.dirname(self.path), ignore_errors=True)

    def leave(self) -> None:
        """Close the socket in a forked process, which could not answer on it."""
        self._listening.close()


_sharing: Sharing | None = None
_lock = threading.Lock()


def _after_fork() -> None:
    global _sharing, _lock
    _lock = threading.Lock()
    if _sharing is not None:
        _sharing.leave()
        _sharing = None


def _at_exit() -> None:
    if _sharing is not None:
        _sharing.stop()


process.register(
    "sharing", "the Unix socket for other processes' samplers", at_exit={Step.INTAKE: _at_exit}, after_fork=_after_fork
)


def share(sampler: SamplerHandle) -> SamplerAddress:
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
    return SamplerAddress(
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
