"""Where may metrics and alerts go besides the metrics file? To trackers by name, and to one address on a named host."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from jax_client.errors import BadRequestError

# Each tracker, with the packages any one of which it needs.
TRACKERS: dict[str, tuple[str, ...]] = {
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboardX", "torch.utils.tensorboard"),
}
_ALSO_NEEDS = {"torch.utils.tensorboard": "tensorboard"}


def tracker_names(value: object, where: str) -> tuple[str, ...]:
    """Return the trackers of a setting: a name, several with commas between them, a list of names, or None.

    Raises:
        BadRequestError: it names another one; `where` is the setting.
    """
    if value is None:
        return ()
    names = re.split(r"[,\s]+", value) if isinstance(value, str) else value
    if not isinstance(names, Sequence):
        raise BadRequestError(f"{where} is {value!r}; give names such as 'wandb,tensorboard'.")
    known = ", ".join(TRACKERS)
    for name in names:
        if name and name not in TRACKERS:
            raise BadRequestError(f"{where} has {name!r}; choose from {known}.")
    return tuple(dict.fromkeys(name for name in names if name))


def package_of(tracker: str) -> str | None:
    """Return the module that serves a tracker, None if no package that has one is installed."""
    return next((name for name in TRACKERS[tracker] if _is_there(name)), None)


def check_installed(trackers: Sequence[str]) -> None:
    """Raise BadRequestError unless a package of each tracker is installed."""
    for tracker in trackers:
        if package_of(tracker) is None:
            package = TRACKERS[tracker][0]
            raise BadRequestError(
                f"export_metrics names {tracker!r}, but {package} is not installed: pip install {package}, or leave "
                f"{tracker} out."
            )


def _is_there(module: str) -> bool:
    root = module.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        return False
    other = _ALSO_NEEDS.get(module)
    return other is None or importlib.util.find_spec(other) is not None


def webhook_url(url: object, hosts: object, where: str) -> str | None:
    """Return the address that alerts are posted to, None for none.

    Args:
        url: https://HOST/..., or http:// to this machine itself.
        hosts: the hosts that are allowed, as `tracker_names` takes names; this machine itself always is.
        where: the setting, for messages.

    Raises:
        BadRequestError: another scheme, a host that is not allowed, or no address.
    """
    if url is None or url == "":
        return None
    allowed = [name for name in re.split(r"[,\s]+", hosts) if name] if isinstance(hosts, str) else list(_texts(hosts))
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        host = None if parts is None else parts.hostname
        _ = None if parts is None else parts.port  # raises for a port that is none
    except ValueError:
        parts = host = None
    if parts is None or host is None or parts.scheme not in ("http", "https") or parts.username is not None:
        raise BadRequestError(f"{where} is {url!r}; give an address such as https://hooks.example.org/path.")
    if _is_loopback(host):
        return str(url)
    if parts.scheme != "https":
        raise BadRequestError(f"{where} is {url!r}; only https:// leaves this machine.")
    if host not in {name.lower() for name in allowed}:
        raise BadRequestError(
            f"{where} goes to {host!r}, which alert_hosts does not allow; add the host there (or to "
            "JAX_CLIENT_ALERT_HOSTS)."
        )
    return str(url)


def _texts(values: object) -> Sequence[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list | tuple) else ()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
