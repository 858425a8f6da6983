"""How does another process sample from a handle? Through the SDK's client, over a Unix socket.

The client speaks the hosted service's protocol. It needs neither weights nor a device, and nothing here imports jax.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import tinker
from tinker import types

from jax_client import process
from jax_client.clients.sdk_errors import sdk_errors
from jax_client.runs.sampler_address import SamplerAddress
from jax_client.runs.sdk import AuthTokenProvider, ClientConnectionPool, InternalClientHolder
from jax_client.weights.read.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer

# The SDK wants a URL and a key. Neither is used: every connection goes to the socket, which asks for no key.
URL, KEY = "http://owner.invalid", "tml-none"
# Shorter than the server's, so that a connection is never used at the moment in which the server closes it.
KEEPALIVE_SECONDS = 30.0


class OwnerTransport(httpx.AsyncBaseTransport):
    """HTTP over the socket of a process of the same user.

    That the process has ended is an answer, 410, which the SDK reports at once. Refused connections it would try again
    for minutes.

    Args:
        handle: whose socket.
    """

    def __init__(self, handle: SamplerAddress) -> None:
        self._handle = handle
        # Unlimited: the SDK limits its requests, and one that waited here for a connection would count as timed out.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.AsyncHTTPTransport(uds=handle.socket, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, or answer that the process to send it to has ended."""
        if self._is_ours():
            try:
                return await self._http.handle_async_request(request)
            except httpx.ConnectError as error:
                if not _was_refused(error):
                    raise
        detail = (
            f"process {self._handle.process}, which has the weights of this SamplingClient, has ended or belongs to "
            f"another user ({self._handle.socket}). Keep it running while others sample."
        )
        return httpx.Response(410, json={"detail": detail}, request=request)

    def _is_ours(self) -> bool:
        # After the owner's end anybody could make a directory of the same name.
        try:
            return os.stat(self._handle.socket).st_uid == os.geteuid()
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


class OwnerHolder(InternalClientHolder):
    """The SDK's connections, of one session, to the process that has it.

    Args:
        handle: of any sampler of the session.
    """

    def __init__(self, handle: SamplerAddress) -> None:
        self._handle = handle
        super().__init__(
            session_id=handle.session_id,
            base_url=URL,
            api_key=KEY,
            _client_config=dict(handle.client_config),
            _client_dynamic_config=dict(handle.dynamic_config),
        )

    def _create_client_connection_pool(
        self,
        max_requests_per_client: int,
        auth: AuthTokenProvider,
        *,
        client_config: types.ClientConfigResponse | None = None,
    ) -> ClientConnectionPool:
        http_client = httpx.AsyncClient(transport=OwnerTransport(self._handle), trust_env=False)
        arguments = {**self._constructor_kwargs, "_auth": auth, "http_client": http_client}
        return ClientConnectionPool(self.get_loop(), max_requests_per_client, arguments)

    def get_telemetry(self) -> None:
        """Return None: an error is raised at once, not after it was reported."""


_holders: weakref.WeakValueDictionary[tuple[str, str], OwnerHolder] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    """Forget the parent's connections, whose event loop does not run here."""
    global _lock
    _lock = threading.Lock()
    _holders.clear()


process.register("remote samplers", "the connections to other processes, by session", after_fork=_after_fork)


def _holder(handle: SamplerAddress) -> OwnerHolder:
    """Return the connections of a session, which all its clients in this process share."""
    key = handle.socket, handle.session_id
    with _lock:
        found = _holders.get(key)
        if found is None:
            found = _holders[key] = OwnerHolder(handle)
        return found


@sdk_errors
class RemoteSamplingClient(tinker.SamplingClient):
    """A sampling client whose weights are in another process of this machine, and give the same numbers here as there.

    Made by unpickling a SamplingClient, or by `SamplingClient.from_sampler_handle`. It can be pickled on. Its requests
    fail within seconds once the other process has ended or closed its session.

    Args:
        handle: of the sampler.
    """

    def __init__(self, handle: SamplerAddress) -> None:
        super().__init__(
            _holder(handle), sampling_session_id=handle.sampler_id, base_model=handle.base_model, shadow=True
        )
        self._handle = handle

    def get_tokenizer(self) -> PreTrainedTokenizer:
        """Return the base model's tokenizer, from the files that the other process loaded."""
        return _tokenizer(self._handle.model_path, self._handle.model_kind)

    def get_sampler_handle(self) -> str:
        """Return the handle from which this client was made."""
        return self._handle.encode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> tinker.SamplingClient:
        """Make a client from a handle, as `jax_client.SamplingClient.from_sampler_handle`."""
        return _from_sampler_handle()(handle, api_key=api_key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_sampler_handle(), (self.get_sampler_handle(),)


def _from_sampler_handle() -> Callable[..., tinker.SamplingClient]:
    # Imported here: that module imports this one.
    from jax_client.clients.sampling import SamplingClient

    return SamplingClient.from_sampler_handle


@functools.cache
def _tokenizer(path: str, kind: Any) -> Any:
    from jax_client.weights.read.tokenizer import read_tokenizer

    return read_tokenizer(ModelSource(name=path, path=Path(path), kind=kind))
