"""Which routes list checkpoints and act on them? Verify, delete and its undo, lifetime, export."""

from __future__ import annotations

import asyncio
import io
import shlex
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, UnsupportedError, shown
from jax_client.runs.lifetimes import ttl
from jax_client.server.dashboard.answers import API, api_route, json_answer, object_of, text_of
from jax_client.server.dashboard.deleted import Deleted
from jax_client.server.dashboard.source import Source
from jax_client.server.queries import number
from jax_client.server.wire.admission import load_of
from jax_client.server.wire.logins import HEADERS
from jax_client.server.wire.pools import run_on_files, run_work
from jax_client.values import CheckpointKey, JsonObject

MOST_ROWS = 1_000
# Of an adapter that is sent as one file, with what it takes in memory meanwhile.
MAX_DOWNLOAD = 256 * 2**20
# After a deletion's last moment.
_GRACE = 2.0

Verify = Callable[[CheckpointKey], JsonObject]


class Checkpoints:
    """The checkpoints of one owner, as the page shows and changes them.

    Args:
        source: what is shown.
        store: what is changed.
        home: the state directory, for commands to copy.
        verify: `verify(key) -> {"ok", "error", "time"}` compares files with their hashes.
    """

    def __init__(self, source: Source, store: CheckpointStore, home: Path, verify: Verify) -> None:
        self._source, self._store, self._home, self._verify_files = source, store, home, verify
        self.deleted = Deleted(store)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            api_route("GET", "/checkpoints", self._list),
            api_route("POST", "/checkpoints/verify", self._verify),
            api_route("POST", "/checkpoints/delete", self._delete),
            api_route("POST", "/checkpoints/undelete", self._undelete),
            api_route("POST", "/checkpoints/lifetime", self._lifetime),
            api_route("POST", "/checkpoints/export", self._export),
            api_route("GET", "/checkpoints/download", self._download),
        ]

    async def _list(self, request: Request) -> Response:
        limit, offset = number(request, "limit", 200, 1, MOST_ROWS), number(request, "offset", 0, 0, 2**31)
        run = request.query_params.get("run")
        rows = await run_work(lambda: [row.to_json() for row in self._source.checkpoints(run)])
        found = self.deleted.shown(rows)
        page = found[offset : offset + limit]
        return json_answer({"checkpoints": page, "total": len(found), "deleted": self.deleted.listed()})

    async def _verify(self, request: Request) -> Response:
        key = _key(await object_of(request))
        load_of(request).take(file_checks=1)
        return json_answer({"path": str(key), "verified": await run_on_files(self._verify_files, key)})

    async def _delete(self, request: Request) -> Response:
        key = _key(await object_of(request))
        until = await run_work(self.deleted.delete, key)
        asyncio.get_running_loop().call_later(self.deleted.seconds + _GRACE, self._sweep_soon)
        return json_answer({"path": str(key), "until": until})

    def _sweep_soon(self) -> None:
        # Held, because a loop keeps only weak references to its tasks.
        self._sweeping = asyncio.ensure_future(run_work(self.deleted.sweep))

    async def _undelete(self, request: Request) -> Response:
        key = _key(await object_of(request))
        await run_work(self.deleted.undelete, key)
        return json_answer({"path": str(key)})

    async def _lifetime(self, request: Request) -> Response:
        fields = await object_of(request)
        key, seconds = _key(fields), ttl(fields.get("seconds"), "seconds")
        record = await run_work(self._store.set_ttl, key, seconds)
        return json_answer({"path": str(key), "expires_at": record.expires_at})

    async def _export(self, request: Request) -> Response:
        fields = await object_of(request)
        key, form = _key(fields), text_of(fields, "format")
        if form not in ("peft", "merged"):
            raise BadRequestError(f"format is {shown(form)}; give peft or merged.")
        record = await run_work(self._store.record, key)
        if key.kind == "external_weights":
            raise BadRequestError(f"{key} is an export already; 'jax_client checkpoint download' fetches its files.")
        home, output = shlex.quote(str(self._home)), shlex.quote(f"{key.name}-{form}")
        # An adapter on an output projection that may be the embedding: other programs than peft would leave it out.
        alone = form == "peft" and record.metadata.get("spec", {}).get("train_unembed", True)
        options = "--for peft" if alone else f"--format {form}"
        command = f"jax_client --state-dir {home} checkpoint export {shlex.quote(str(key))} {options}"
        small = form == "peft" and record.size_bytes <= MAX_DOWNLOAD
        link = f"{API}/checkpoints/download?path={quote(str(key), safe='')}" if small else None
        return json_answer({"path": str(key), "command": f"{command} --output {output}", "download": link})

    async def _download(self, request: Request) -> Response:
        key = _key({"path": request.query_params.get("path")})
        load_of(request).take(file_checks=1)
        data = await run_on_files(partial(zipped_adapter, self._store, key))
        name = f'attachment; filename="{key.name}-peft.zip"'
        return Response(data, headers={**HEADERS, "Content-Disposition": name}, media_type="application/zip")


def _key(fields: JsonObject) -> CheckpointKey:
    return CheckpointKey.parse(fields.get("path"))


def zipped_adapter(store: CheckpointStore, key: CheckpointKey) -> bytes:
    """Return an adapter in the form of peft as a zip file; it is written, and not loaded again to be checked.

    Raises:
        NotFoundError: there is no such checkpoint, or its base model is not on this machine.
        UnsupportedError: it is too large, or peft has no form for it.
    """
    record = store.record(key)
    if key.kind == "external_weights" or record.size_bytes > MAX_DOWNLOAD:
        limit = MAX_DOWNLOAD >> 20
        raise UnsupportedError(f"{key} is not sent as one file: that is for adapters up to {limit} MiB; export it.")
    # Imported here: reading a model's configuration needs the model registry, and with it jax.
    from jax_client.runs.results import api_records
    from jax_client.weights.read.load import read_config
    from jax_client.weights.read.source import local_models, resolve
    from jax_client.weights.write.peft import write_adapter

    base = api_records.base_model(record.metadata)
    if not Path(base).exists() and base not in local_models():
        raise NotFoundError(f"the base model {base} of {key} is not on this machine; export it where it is.")
    state, _ = store.load(key)
    with tempfile.TemporaryDirectory(prefix="jax_client-") as folder:
        write_adapter(Path(folder), state, read_config(resolve(base)), base, "peft")
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(folder))
    return data.getvalue()


def verify_in(store: CheckpointStore, key: CheckpointKey, now: Callable[[], float]) -> JsonObject:
    """Compare a checkpoint's files with their hashes. Raises NotFoundError; damage is in the answer."""
    try:
        store.verify(key)
    except NotFoundError:
        raise
    except JaxClientError as error:
        return {"time": now(), "ok": False, "error": str(error)}
    return {"time": now(), "ok": True, "error": None}
