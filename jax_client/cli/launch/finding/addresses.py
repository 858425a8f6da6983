"""By which address do the other hosts reach this one, and does something answer at an address?

Ray has to be told: by itself it takes the interface of the default route, which need not be the one between the hosts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from jax_client.errors import BadRequestError

_CONNECT_SECONDS = 3.0


def resolve(name: str) -> str | None:
    """Return the address of a host, of IPv4 if it has one; None while the name is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return addresses[0] if addresses else None


def is_loopback(address: str) -> bool:
    """Return whether no other machine is reached by an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_private(address: str) -> bool:
    """Return whether an address is of a network that is not part of the internet."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_global


def is_here(name: str) -> bool:
    """Return whether a host's name or address is this machine's."""
    if name in (socket.gethostname(), socket.getfqdn()):
        return True
    address = resolve(name)
    return address is not None and can_bind(address, 0)


def can_bind(address: str, port: int) -> bool:
    """Return whether an address is this machine's, and its port (0 for any) is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that a port that was closed a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return True
    return False


def answers(address: str, port: int) -> bool:
    """Return whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), _CONNECT_SECONDS):
        return True
    return False


def refuses(address: str, port: int) -> bool:
    """Return whether the machine is there, and nothing listens on the port; False where no answer comes at all."""
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def own_address(names: tuple[str, ...], index: int) -> str | None:
    """Return the address of this host that the others reach; None while that cannot be known.

    Where this host's name stands for a loopback address here (/etc/hosts often says so), or for one that another
    machine translates, it is the address from which packets to another host leave.

    Raises:
        BadRequestError: the other hosts' names stand for loopback addresses here, and this one's for another.
    """
    others = [address for i, name in enumerate(names) if i != index and (address := resolve(name)) is not None]
    own = resolve(names[index])
    if own is not None and can_bind(own, 0) and (not is_loopback(own) or (others and all(map(is_loopback, others)))):
        return own
    outside = [address for address in others if not is_loopback(address)]
    if outside:
        return _source_towards(outside[0])
    if index != 0 and resolve(names[0]) is not None:
        raise BadRequestError(
            f"host 0 ({names[0]}) has the address {resolve(names[0])} on this host, by which it is not reached; give "
            "the hosts' addresses as --hosts."
        )
    return None


def _source_towards(address: str) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return None


def joined(address: str, port: int) -> str:
    """Return an address and a port as one text."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
