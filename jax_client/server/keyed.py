"""Which server answers the clients of which key? Each key has a `Server` of its own, on the same devices and directory.

So what one key's clients make, no other key's can name: their server does not know the id, and says so with the same
words. The servers share base models, memory, the state directory (whose store shows each owner its own), and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jax_client.server.state.request_log import RequestLog
from jax_client.server.state.server import Server
from jax_client.server.wire import keys
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.keys import Key
from jax_client.threads import Workers


class KeyedServers:
    """The servers of several keys. Thread-safe.

    Attributes:
        host: the server that has loaded the operator's models; no client asks it anything, but by signed links.
        by_name: the servers, by the names of their keys.
        keys: the keys, in the order of the file.
        whole: the account of all keys together.

    Args:
        host: a server with the settings of all, and with neither clients nor a log.
        keys: at least one.
        open_log: `open_log(name) -> log` of a key's requests, None to keep them in memory.
    """

    def __init__(
        self, host: Server, keys_: Sequence[Key], open_log: Callable[[str], RequestLog | None] = lambda _: None
    ) -> None:
        self.host = host
        self.keys = tuple(keys_)
        self.whole = Account(keys.whole(keys_))
        self.by_name: Mapping[str, Server] = {
            key.owner.name: Server(
                host.config,
                host.names,
                open_log(key.owner.name),
                base_models=host.live.own.models,
                owner=key.owner,
                account=Account(key.quota, self.whole),
                # The host's is among them: it holds the operator's models, which leave memory too when it is needed.
                peers=host.live.peers,
            )
            for key in keys_
        }

    @property
    def accounts(self) -> dict[str, Account]:
        """The accounts, by the names of their keys."""
        return {name: server.account for name, server in self.by_name.items()}

    def close(self, seconds: float) -> None:
        """End every server, all at the same time, and then the host's models; see `Server.close`."""
        with Workers("jax_client-close", len(self.by_name)) as pool:
            pool.map(lambda server: server.close(seconds), self.by_name.values())
        self.host.close(seconds)
