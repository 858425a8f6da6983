"""Under which address do browsers call a server that is behind a proxy? Under its public one, which the operator says.

What a request says of it (X-Forwarded-Proto and the like) counts for nothing: anyone can send that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jax_client.errors import BadRequestError, shown

PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?/?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicUrl:
    """An address without a path.

    Attributes:
        scheme: "http" or "https".
        host: a name in small letters, or an address; an IPv6 address without its brackets.
        port: 80 or 443 where none was said.
    """

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> PublicUrl:
        """Return the parts of an address. Raises BadRequestError for one that has others: a user, a path, a query."""
        found = _URL.fullmatch(text.lower())
        port = int(found[3] or PORTS[found[1]]) if found else 0
        if found is None or not 1 <= port <= 65535:
            raise BadRequestError(f"{shown(text[:200])} is no public address; give https://NAME or https://NAME:PORT.")
        return cls(scheme=found[1], host=found[2].strip("[]"), port=port)

    @property
    def secure(self) -> bool:
        """Whether browsers reach it by TLS."""
        return self.scheme == "https"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == PORTS[self.scheme] else f":{self.port}")
