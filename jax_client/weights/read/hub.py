"""How does a hub name become a local directory? `huggingface_hub` finds the model in its cache, or downloads it.

Only safetensors, JSON and tokenizer files are ever fetched: no pickles, no code.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_client.errors import NotFoundError, RequestFailedError
from jax_client.host import places
from jax_client.models.families.registry import SUPPORTED_ARCHITECTURES, config_from_hf
from jax_client.weights.read import hf
from jax_client.weights.read.progress import Counter

ALLOWED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Repositories of original checkpoints hold a second copy of the weights in a folder.
IGNORED_FILES = ["*/*"]


def cache_directory() -> Path | None:
    """Return the hub cache as `HF_HOME` and `HF_HUB_CACHE` set it; None where it would be in a home that is not."""
    from huggingface_hub import constants

    return None if constants.HF_HUB_CACHE.startswith("~") else Path(constants.HF_HUB_CACHE)


def cached_snapshot(name: str) -> Path | None:
    """Return the cached directory of a hub model, None unless every weight file is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    if (cache := cache_directory()) is None:
        return None
    try:
        found = snapshot_download(
            name,
            cache_dir=cache,
            local_files_only=True,
            allow_patterns=ALLOWED_FILES,
            ignore_patterns=IGNORED_FILES,
        )
    except (LocalEntryNotFoundError, IncompleteSnapshotError, HFValidationError):
        return None
    directory = Path(str(found))
    return directory if hf.is_complete(directory) else None


def cached_models() -> list[str]:
    """Return the names of complete models of supported architectures in the local hub cache."""
    cache, names = cache_directory(), []
    for folder in [] if cache is None else sorted(cache.glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = cached_snapshot(name)
        if snapshot is None:
            continue
        try:
            config = json.loads((snapshot / "config.json").read_text())
        except (OSError, ValueError):
            continue
        architectures = config.get("architectures") if isinstance(config, dict) else None
        if isinstance(architectures, list) and set(architectures) & set(SUPPORTED_ARCHITECTURES):
            names.append(name)
    return names


def download(name: str, near: list[str]) -> Path:
    """Fetch a model into the hub cache and return its directory; its config.json comes first, and may refuse it.

    Args:
        name: organisation/model.
        near: known names like it, for the message.

    Raises:
        NotFoundError: the hub has no such model, or it cannot be reached and `near` has a close name.
        RequestFailedError: "user": no network, a gated model, a refused token, no place for it; "server": the disk is
            full.
        BadRequestError, UnsupportedError: the model is not one that loads; its weights were not fetched.
    """
    from huggingface_hub import snapshot_download

    _check_config(name, near)

    def fetch(cache: Path) -> str:
        return snapshot_download(
            name,
            cache_dir=cache,
            allow_patterns=ALLOWED_FILES,
            ignore_patterns=IGNORED_FILES,
            etag_timeout=10,
            tqdm_class=_counting_bar(),
        )

    return _fetched(name, near, fetch)


def _check_config(name: str, near: list[str]) -> None:
    """Refuse a model by its config.json, before its weights are fetched, as it would be refused after."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = config_file(name, near)
    except RequestFailedError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return  # what is there instead is said of the files that are fetched, all of them small
        raise
    hf.check_code(config := hf.read_json(found.parent, hf.CONFIG), name)
    config_from_hf(config, f"{name}: {hf.CONFIG}")


def config_file(name: str, near: list[str]) -> Path:
    """Return a hub model's config.json: the cached one, or fetched alone. Arguments and errors as of `download`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if (cache := cache_directory()) is not None:
        found = try_to_load_from_cache(name, hf.CONFIG, cache_dir=cache)
        if isinstance(found, str):
            return Path(found)
    return _fetched(name, near, lambda cache: hf_hub_download(name, hf.CONFIG, cache_dir=cache, etag_timeout=10))


def _fetched(name: str, near: list[str], fetch: Callable[[Path], str]) -> Path:
    """Return the path that `fetch(cache) -> path` of a hub model gives, and name what keeps it from that."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if (cache := cache_directory()) is None:
        raise RequestFailedError(
            f"base_model {name!r} is not on this machine; {places.needs_home('the hub cache', 'HF_HOME')}",
            category="user",
        )
    guess = f" Did you mean {near[0]!r}?" if near else ""
    try:
        return Path(str(fetch(cache)))
    except GatedRepoError:
        raise RequestFailedError(
            f"base_model {name!r} is gated: accept its licence on its hub page, then set HF_TOKEN to a token of that "
            "account, or give a local directory.",
            category="user",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        # The hub answers 404 for a private model too.
        raise NotFoundError(
            f"the hub has no model {name!r} that this user can see.{guess} If it is private, set HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        raise RequestFailedError(
            f"the hub refused {name!r}: {_first_line(error)}. Check HF_TOKEN, try again later, or give a local "
            "directory.",
            category="user",
        ) from error
    except OSError as error:
        raise _download_failed(name, cache, error, guess) from error
    except Exception as error:
        # huggingface_hub lets its HTTP client's exceptions through; which client it is depends on its version.
        if not type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub")):
            raise
        raise _unreachable(name, cache, error, guess) from error


def _counting_bar() -> Any:
    """Return huggingface_hub's own progress bar, which also counts its bytes for our observer, shown or not."""
    from huggingface_hub.utils.tqdm import tqdm

    counter = Counter("downloading")

    class Bar(tqdm):
        # There is one bar for the files, and one or two for the bytes; the library raises `total` as files begin.
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._of_bytes = kwargs.get("unit") == "B"
            self._bytes = int(kwargs.get("initial") or 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> Any:
            if self._of_bytes:
                self._bytes += int(n or 0)
                counter.set(self._bytes, int(self.total or 0))
            return super().update(n)

    return Bar


def _download_failed(name: str, cache: Path, error: OSError, guess: str) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (cache, *cache.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        return RequestFailedError(
            f"the disk is full while downloading {name!r}: {free:,} bytes are free under {cache}. Free some space, or "
            "set HF_HOME to a larger disk; a partial file is not used.",
            category="server",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return RequestFailedError(
            f"the hub cache {cache} cannot be written ({error.strerror}); set HF_HOME to a directory that can.",
            category="user",
        )
    return _unreachable(name, cache, error, guess)


def _unreachable(name: str, cache: Path, error: Exception, guess: str) -> Exception:
    message = (
        f"base_model {name!r} is not in the hub cache {cache} and the hub cannot be reached ({_first_line(error)})."
        f"{guess} Connect this machine (HF_TOKEN is needed for gated models, HF_HUB_OFFLINE must be unset), or give a "
        "local directory with config.json and .safetensors files, or a .gguf file."
    )
    return NotFoundError(message) if guess else RequestFailedError(message, category="user")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
