"""What do the launches of all hosts tell each other? Short texts, in the key-value store that Ray's head keeps.

Host 0 writes the hosts and the exit code, each other host that it is there and which signal it received. Ray is
imported here, once several hosts are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping

# Of one call. A head that does not answer is asked again.
_SECONDS = 3.0
_NAMESPACE = b"jax_client_launch"
_HOSTS, _EXIT, _BEAT, _SIGNAL, _SEEN = "hosts", "exit", "beat", "signal", "seen"
_ALIVE = 0


class NoAnswerError(Exception):
    """Ray's head does not answer."""


class Board:
    """The texts of one launch.

    Args:
        address: of Ray's head, with its port. Something must listen there already.
        environment: variables with which Ray is spoken to.

    Raises:
        NoAnswerError: it does not answer as Ray's head does.
    """

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        # Ray's C++ reads these.
        for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
            os.environ[name] = environment[name]
        # The store's client, and no driver: a driver is a job of the cluster, and Ray ends its process with the head.
        client = importlib.import_module("ray._raylet").GcsClient
        try:
            self._gcs = client(address=address)
        except Exception as error:
            raise NoAnswerError(str(error)) from error
        self._beats = 0

    def put_hosts(self, names: tuple[str, ...]) -> None:
        """Write which hosts this launch has."""
        self._put(_HOSTS, json.dumps(names))

    def hosts(self) -> tuple[str, ...] | None:
        """Return the hosts that host 0 has written; None before that."""
        text = self._get(_HOSTS)
        return None if text is None else tuple(json.loads(text))

    def put_exit(self, code: int) -> None:
        """Write the exit code of all launches."""
        self._put(_EXIT, str(code))

    def exit_code(self) -> int | None:
        """Return the exit code; None while the program runs."""
        text = self._get(_EXIT)
        return None if text is None else int(text)

    def beat(self, index: int) -> None:
        """Write that the launch of a host is there."""
        self._beats += 1
        self._put(f"{_BEAT}:{index}", f"{os.getpid()} {self._beats}")

    def beat_of(self, index: int) -> str | None:
        """Return what the launch of a host wrote last; it is another text a second later."""
        return self._get(f"{_BEAT}:{index}")

    def put_signal(self, index: int, number: int) -> None:
        """Write that a host received a signal."""
        self._put(f"{_SIGNAL}:{index}", str(number))

    def signals(self) -> list[int]:
        """Return the signals that other hosts received."""
        return [int(text) for key in self._keys(f"{_SIGNAL}:") if (text := self._get(key)) is not None]

    def put_seen(self, index: int) -> None:
        """Write that a host has read the exit code."""
        self._put(f"{_SEEN}:{index}", "")

    def seen(self) -> set[int]:
        """Return the hosts that have read the exit code."""
        return {int(key.partition(":")[2]) for key in self._keys(f"{_SEEN}:")}

    def nodes(self) -> Counter[str]:
        """Return how many living nodes Ray has of each name: two, where one has been replaced and is not missed yet."""
        with _answered():
            nodes = self._gcs.get_all_node_info(timeout=_SECONDS).values()
            return Counter(node.node_name for node in nodes if node.state == _ALIVE)

    def _put(self, key: str, text: str) -> None:
        with _answered():
            self._gcs.internal_kv_put(key.encode(), text.encode(), True, namespace=_NAMESPACE, timeout=_SECONDS)

    def _get(self, key: str) -> str | None:
        with _answered():
            value = self._gcs.internal_kv_get(key.encode(), namespace=_NAMESPACE, timeout=_SECONDS)
        return None if value is None else value.decode()

    def _keys(self, prefix: str) -> list[str]:
        with _answered():
            found = self._gcs.internal_kv_keys(prefix.encode(), namespace=_NAMESPACE, timeout=_SECONDS)
        return [key.decode() for key in found]


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NoAnswerError(" ".join(str(error).split())) from error
