"""How does a client get the files of an export? By links that are signed, each for one file and one hour.

A link needs no API key, so that any HTTP client can follow it, and opens nothing else. A server's links end with it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from datetime import UTC, datetime
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from tinker import types

from jax_client.runs.listings import Listings
from jax_client.runs.paths import external_path
from jax_client.server.routes.handler import API, checked_files, route, show
from jax_client.server.wire.guard import SIGNED
from jax_client.server.wire.pools import run_work
from jax_client.values import CheckpointKey

SECONDS = 3600


class Downloads:
    """The links of one server.

    Attributes:
        secret: what the links are signed with.

    Args:
        listings: where the exports are.
        secret: of other links, which sign for the same files; None makes one.
    """

    def __init__(self, listings: Listings, secret: bytes | None = None) -> None:
        self._listings = listings
        self.secret = secret or secrets.token_bytes(32)

    def routes(self) -> list[Route]:
        """Return the route that makes links and the one that answers them."""
        make = "/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"
        return [
            route("GET", make, self._make),
            route("GET", f"{SIGNED.removeprefix(API)}{{run}}/{{name}}/{{file:path}}", self._file),
        ]

    async def _make(self, request: Request) -> Response:
        return show(await checked_files(request, lambda: self._links(request)))

    def _links(self, request: Request) -> types.ExternalWeightsUrlsResponse:
        names = request.path_params
        key = CheckpointKey.of_run(names["run"], f"{names['kind']}/{names['name']}")
        key = external_path(str(key), "get_external_weights_urls")
        files, expires_at = self._listings.exported_files(key)
        now = time.time()
        seconds = SECONDS if expires_at is None else min(SECONDS, expires_at - now)
        # By a clock that is never set; it is this server's own, as its links are.
        until = int(time.monotonic() + seconds)
        # Under the name and the scheme by which this client reaches the server.
        base = str(request.base_url).rstrip("/")
        urls = {file: f"{base}{_path(key, file)}?{self._query(key, file, until)}" for file in files}
        return types.ExternalWeightsUrlsResponse(urls=urls, expires=datetime.fromtimestamp(int(now + seconds), UTC))

    async def _file(self, request: Request) -> Response:
        names, query = request.path_params, request.query_params
        key = CheckpointKey(names["run"], "external_weights", names["name"])
        expires = query.get("expires", "")
        signature = self._signature(key, names["file"], expires)
        if not hmac.compare_digest(signature, query.get("signature", "").encode("utf-8", "replace")):
            return _refused("this link is not one of this server's; ask for new ones with get_external_weights_urls.")
        if time.monotonic() >= int(expires):
            return _refused("this link has expired; ask for new ones with get_external_weights_urls.")
        # It answers Range headers, so that a download that was cut off continues.
        path = await run_work(self._listings.exported_file, key, names["file"])
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    def _query(self, key: CheckpointKey, file: str, expires: int) -> str:
        return f"expires={expires}&signature={self._signature(key, file, str(expires)).decode()}"

    def _signature(self, key: CheckpointKey, file: str, expires: str) -> bytes:
        text = "\n".join((str(key), file, expires)).encode("utf-8", "surrogatepass")
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest().encode()


def _path(key: CheckpointKey, file: str) -> str:
    return f"{SIGNED}{quote(key.run_id)}/{quote(key.name)}/{quote(file)}"


def _refused(detail: str) -> Response:
    return JSONResponse({"detail": detail}, 403)
