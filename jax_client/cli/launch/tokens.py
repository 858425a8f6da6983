"""How do the hosts know each other? By Ray's token, a secret that every host has before `launch` starts.

A Ray cluster without a token runs the code of everyone who reaches it. `launch` has no channel on which a secret could
be handed out that no one else reads, so it takes the one that is there and makes none.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from jax_client.cli.launch.finding.addresses import is_private
from jax_client.cli.launch.messages import say
from jax_client.errors import BadRequestError
from jax_client.host import places

# Where Ray looks, in this order, and then in the home directory.
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_MAKE = (
    "umask 077; mkdir -p ~/.ray; python3 -c 'import secrets; print(secrets.token_hex(32))' > ~/.ray/auth_token; "
    "for host in {others}; do ssh $host 'umask 077; mkdir -p ~/.ray; cat > ~/.ray/auth_token' < ~/.ray/auth_token; done"
)


def authentication(environ: Mapping[str, str], others: tuple[str, ...]) -> dict[str, str]:
    """Return the variables with which Ray asks for the token of this host.

    Args:
        environ: variables of this process.
        others: names of the other hosts, for the message.

    Raises:
        BadRequestError: there is no token; the message has the command that makes one and copies it.
    """
    if not environ.get(TOKEN):
        path = token_file(environ)
        if path is None or not _has_text(path):
            where = (
                f"{TOKEN_PATH} is {environ[TOKEN_PATH]!r}, which" if environ.get(TOKEN_PATH) else "~/.ray/auth_token"
            )
            command = _MAKE.format(others=" ".join(others))
            raise BadRequestError(
                f"the hosts have no common secret: {TOKEN} is not set, and {where} cannot be read or is empty. Make a "
                f"token once, on one host, and copy it to the others: {command} (see docs/clusters.md; --no-auth runs "
                "without one on a network of your own)."
            )
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            say(f"warning: other users of this host may read {path} (mode {mode:04o}); chmod 600 {path}")
    return {"RAY_AUTH_MODE": "token"}


def token_file(environ: Mapping[str, str]) -> Path | None:
    """Return where Ray reads the token of this host from; None for a user without a home."""
    if chosen := environ.get(TOKEN_PATH):
        return Path(chosen).expanduser()
    home = places.home()
    return None if home is None else home / ".ray" / "auth_token"


def shown_token(environ: Mapping[str, str]) -> str:
    """Return how a message names the place of this host's token."""
    return TOKEN if environ.get(TOKEN) else str(token_file(environ) or TOKEN)


def no_authentication(address: str) -> dict[str, str]:
    """Return the variables with which Ray lets everyone in.

    Raises:
        BadRequestError: the address is of the internet.
    """
    if not is_private(address):
        raise BadRequestError(
            f"--no-auth: this host's address {address} is not of a private network, so anyone could run code on it. "
            "Use a token, or give the hosts' private addresses as --hosts."
        )
    return {"RAY_AUTH_MODE": "disabled"}


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text("utf-8").strip())
    except (OSError, ValueError):
        return False
