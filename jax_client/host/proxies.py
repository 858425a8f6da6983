"""How does a client reach a server on its own machine where the environment names a proxy? `NO_PROXY` excepts it.

Without that, HTTP clients send requests for 127.0.0.1 to the proxy, which answers with an error or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# Clients differ in which spelling they prefer.
_EXCEPTIONS = ("no_proxy", "NO_PROXY")


def proxy_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that name a proxy, as they are spelled in the environment."""
    return sorted(name for name, value in environment.items() if name.lower() in _PROXIES and value)


def bypassing(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """Return the variables that except hosts from every proxy, beside what is excepted already.

    Args:
        environment: the variables as they are.
        hosts: names or addresses, such as "127.0.0.1".
    """
    return dict.fromkeys(_EXCEPTIONS, ",".join(dict.fromkeys([*_excepted(environment), *hosts])))


def through_proxy(environment: Mapping[str, str], host: str) -> list[str]:
    """Return the variables whose proxy clients would ask for `host`; none where it is excepted."""
    covers = [entry in ("*", host) or host.endswith("." + entry.lstrip(".")) for entry in _excepted(environment)]
    return [] if any(covers) else proxy_variables(environment)


def _excepted(environment: Mapping[str, str]) -> list[str]:
    entries = [entry.strip() for name in _EXCEPTIONS for entry in environment.get(name, "").split(",")]
    return [entry for entry in entries if entry]
