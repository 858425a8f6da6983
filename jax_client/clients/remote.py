"""How does a client reach the process that has its weights? Over a Unix socket, through the SDK's own connections.

The SDK speaks the hosted service's protocol there. Nothing here imports jax.
"""

from __future__ import annotations

import os
import threading
import weakref

import httpx
from tinker import types

from jax_client import process
from jax_client.runs.sampler_address import SamplerAddress
from jax_client.runs.sdk import AuthTokenProvider, ClientConnectionPool, InternalClientHolder

# The SDK wants a URL and a key. Neither is used: every connection goes to the socket, which asks for no key.
URL, KEY = "http://owner.invalid", "tml-none"
# Shorter than the server's, so that a connection is never used at the moment in which the server closes it.
KEEPALIVE_SECONDS = 30.0


class OwnerTransport(httpx.AsyncBaseTransport):
    """HTTP over the socket of a process of the same user.

    When that process has ended, the transport answers 410, which the SDK reports at once. A refused connection the SDK
    would retry for minutes.

    Args:
        address: whose socket.
    """

    def __init__(self, address: SamplerAddress) -> None:
        self._address = address
        # Unlimited: the SDK limits its requests, and one that waited here for a connection would count as timed out.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.AsyncHTTPTransport(uds=address.socket, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, or answer that the process to send it to has ended."""
        if self._is_ours():
            try:
                return await self._http.handle_async_request(request)
            except httpx.ConnectError as error:
                if not _was_refused(error):
                    raise
        detail = (
            f"process {self._address.process}, which has the weights of this SamplingClient, has ended or belongs to "
            f"another user ({self._address.socket}). Keep it running while others sample."
        )
        return httpx.Response(410, json={"detail": detail}, request=request)

    def _is_ours(self) -> bool:
        # Once the owner has ended, another user could make a directory of the same name.
        try:
            return os.stat(self._address.socket).st_uid == os.geteuid()
        except OSError:
            return False

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _was_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


class OwnerConnections(InternalClientHolder):
    """The SDK's connections to the process that has a session.

    Args:
        address: of any sampler of the session.
    """

    def __init__(self, address: SamplerAddress) -> None:
        self._address = address
        super().__init__(
            session_id=address.session_id,
            base_url=URL,
            api_key=KEY,
            _client_config=dict(address.client_config),
            _client_dynamic_config=dict(address.dynamic_config),
        )

    def _create_client_connection_pool(
        self,
        max_requests_per_client: int,
        auth: AuthTokenProvider,
        *,
        client_config: types.ClientConfigResponse | None = None,
    ) -> ClientConnectionPool:
        http_client = httpx.AsyncClient(transport=OwnerTransport(self._address), trust_env=False)
        arguments = {**self._constructor_kwargs, "_auth": auth, "http_client": http_client}
        return ClientConnectionPool(self.get_loop(), max_requests_per_client, arguments)

    def get_telemetry(self) -> None:
        """Return None: an error is raised at once, and not reported first."""


_connections: weakref.WeakValueDictionary[tuple[str, str], OwnerConnections] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    """Forget the parent's connections, whose event loop does not run here."""
    global _lock
    _lock = threading.Lock()
    _connections.clear()


process.register("remote samplers", "the connections to other processes, by session", after_fork=_after_fork)


def connection(address: SamplerAddress) -> OwnerConnections:
    """Return the connections to a sampler's session, which all its clients in this process share."""
    key = address.socket, address.session_id
    with _lock:
        found = _connections.get(key)
        if found is None:
            found = _connections[key] = OwnerConnections(address)
        return found
