"""Do clients reach a server on this machine? Not if the environment names a proxy and no exception for this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

from jax_client.cli.doctor.finding import Finding
from jax_client.host.proxies import bypassing, proxy_variables, through_proxy

_HOST = "127.0.0.1"


def proxies() -> Iterator[Finding]:
    """Report which variables name a proxy, and whether clients would ask it for a server on this machine."""
    # Their values may hold passwords.
    named, asked = proxy_variables(os.environ), through_proxy(os.environ, _HOST)
    details = {"variables": named, "asked_for_this_machine": asked}
    if not named:
        yield Finding(check="proxy", found="the environment names none", details=details)
    elif not asked:
        yield Finding(check="proxy", found=f"{', '.join(named)} set, with {_HOST} excepted", details=details)
    else:
        wanted = " ".join(f"{name}={value}" for name, value in bypassing(os.environ, _HOST, "localhost").items())
        yield Finding(
            check="proxy",
            status="WARN",
            found=f"{', '.join(asked)} set, and {_HOST} is not excepted",
            advice=f"Clients of 'jax_client serve' would ask the proxy and wait: export {wanted}. "
            "'jax_client run' sets this for its program.",
            details=details,
        )
