"""How does an adapter come from a server to this machine? Over signed links; one that breaks continues where it was."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import httpx
import tinker

from jax_client.checkpoint.disk import files
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.host import places
from jax_client.runs.lifecycle.export import refuse_taken
from jax_client.values import CheckpointKey

# A server that is started anew is back within these attempts, with longer and longer waits between them.
ATTEMPTS = 6
TEMPORARY_EXPORT_SECONDS = 3600
TIMEOUT_SECONDS = 60.0


def download_adapter(url: str, key: CheckpointKey, output: Path) -> dict[str, int]:
    """Fetch a checkpoint as the files of a PEFT adapter.

    Args:
        url: of the server; its API key is `$TINKER_API_KEY`.
        key: of kind external_weights, or of kind weights, which is loaded into a run of its own there and exported.
        output: a directory that is not there, or is empty.

    Returns:
        The bytes of each file, by its name.

    Raises:
        BadRequestError: another kind, or `output` is taken.
        RequestFailedError: the server does not send the files.
        tinker.TinkerError: the server refuses the request.

    Whichever it is, nothing is left at `output`.
    """
    if key.kind == "sampler_weights":
        raise BadRequestError(
            f"{key} is of kind sampler_weights, which is not exported; give the path of save_state or of "
            "save_weights_external."
        )
    output = places.expand(output, "output").absolute()
    refuse_taken(output)
    with tinker.ServiceClient(base_url=url) as service:
        if key.kind == "external_weights":
            return _fetch(service.create_rest_client(), str(key), output)
        training = service.create_training_client_from_state(str(key)).result()
        export = training.save_weights_external("download", ttl_seconds=TEMPORARY_EXPORT_SECONDS).result().path
        rest = service.create_rest_client()
        try:
            return _fetch(rest, export, output)
        finally:
            rest.delete_checkpoint_from_tinker_path(export).result()


def _fetch(rest: tinker.RestClient, path: str, output: Path) -> dict[str, int]:
    urls = rest.get_external_weights_urls(path).result().urls
    for name in urls:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise RequestFailedError(f"{path}: the server names a file {name!r}, which is no plain name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_directory(output.parent) as temporary:
        # One more level: the temporary directory is closed to others, the files are as open as the user's are.
        directory = temporary / output.name
        os.mkdir(directory)
        with httpx.Client(timeout=TIMEOUT_SECONDS) as http:
            sizes = {name: _fetch_file(http, urls[name], directory / name) for name in sorted(urls)}
        files.fsync_tree(directory)
        files.move(directory, output)
    return sizes


def _fetch_file(http: httpx.Client, url: str, file: Path) -> int:
    """Write what a link gives; continue after the bytes that are there when the connection breaks."""
    for attempt in itertools.count(1):
        done = file.stat().st_size if file.exists() else 0
        try:
            with http.stream("GET", url, headers={"Range": f"bytes={done}-"} if done else {}) as response:
                if response.status_code == 416:  # nothing lies behind the bytes that are there
                    break
                if response.status_code not in (200, 206):
                    detail = response.read().decode("utf-8", "replace")
                    raise RequestFailedError(f"{file.name} was answered with {response.status_code}: {detail:.300}")
                with file.open("ab" if response.status_code == 206 else "wb") as target:
                    for chunk in response.iter_bytes():
                        target.write(chunk)
            break
        except httpx.TransportError as error:
            if attempt == ATTEMPTS:
                raise RequestFailedError(
                    f"{file.name} was not received: {error or type(error).__name__}. Run the command again."
                ) from error
            time.sleep(2 ** (attempt - 1))
    return file.stat().st_size
