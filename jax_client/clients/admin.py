"""What becomes of AdminClient? A server of the hosted kind gets the SDK's own; this process refuses it by name."""

from __future__ import annotations

from typing import Any

import tinker

from jax_client.clients.sdk_errors import register_as_sdk_class, translate
from jax_client.errors import UnsupportedError


class AdminClient:
    """The SDK's AdminClient for a `base_url`. Without one it is refused: this machine has no organisation.

    Raises:
        UnsupportedError: no `base_url`.
    """

    def __new__(cls, _holder: object = None, *, base_url: str | None = None, api_key: str | None = None) -> Any:
        """Return the SDK's client, or refuse."""
        if base_url is not None:
            return tinker.AdminClient(base_url=base_url, api_key=api_key)
        raise translate(
            UnsupportedError(
                "AdminClient (billing, audit log) is not served in-process: there is no organisation on this machine. "
                "Give base_url= for a Tinker server, or use RestClient for runs and checkpoints."
            )
        )


register_as_sdk_class(tinker.AdminClient, AdminClient)
