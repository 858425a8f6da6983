"""Where are compiled programs kept between processes? In one directory or at one URL, as jax has one per process."""

from __future__ import annotations

import functools
import logging
import os
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

from jax_client.host.places import expand, needs_home

logger = logging.getLogger(__name__)
_CACHE_SETTINGS = "EngineConfig.compilation_cache_dir (or XDG_CACHE_HOME)"


def enable_compilation_cache(directory: str | os.PathLike[str] | None) -> None:
    """Keep compiled programs in `directory` between processes; it is made readable for its owner only.

    Write access to the directory is the right to run code in this process, hence the mode. A URL, such as
    "gs://bucket/path", is jax's to read and write; who may write there is set at the bucket. Where the directory is
    another user's, cannot be written or is None, a warning says so once, and jax's own setting stays as it is.
    """
    if directory is None:
        why = needs_home("compiled programs", _CACHE_SETTINGS)
        _warn_once(f"{why} Until then every start compiles.")
        return
    try:
        place = _made(directory)
    except OSError as error:
        _warn_once(
            f"compiled programs cannot be kept in {os.fspath(directory)} ({error}): every start compiles. Set "
            f"{_CACHE_SETTINGS} to a directory that belongs to this user."
        )
        return
    if jax.config.jax_compilation_cache_dir != place:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", place)
        compilation_cache.reset_cache()  # jax would keep the directory that it used first
    # Everything: a second start should compile nothing at all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _made(directory: str | os.PathLike[str]) -> str:
    """Return a directory, once it is there, or a URL, as jax takes it.

    Raises:
        OSError: it cannot be made or written.
    """
    place = os.fspath(directory)
    if "://" in place:
        return place  # jax warns at the first compile if it cannot
    path = expand(place, "EngineConfig.compilation_cache_dir")
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    with tempfile.TemporaryFile(dir=path):
        pass
    return str(path)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
