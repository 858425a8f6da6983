"""How is a little JSON kept that people may have edited? In one bounded file, read anew when it has changed.

What does not parse, or has another form, counts as empty: it is worth less than the listing that reads it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from jax_client.checkpoint.disk import files
from jax_client.errors import RequestFailedError, first_line
from jax_client.host.disk import advice
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)
MAX_BYTES = 4 * 2**20


class SmallFile:
    """A JSON object in a file of the state directory. Thread-safe; several processes may share the file.

    Args:
        path: of the file; made with the first change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int] | None, JsonObject] = (None, {})

    def read(self) -> JsonObject:
        """Return the object; {} where there is none."""
        stamp = file_stamp(self.path)
        with self._lock:
            if stamp is None or stamp[1] > MAX_BYTES:
                return {}
            if self._read[0] != stamp:
                self._read = stamp, self._parse()
            return self._read[1]

    def change(self, edit: Callable[[JsonObject], JsonObject]) -> JsonObject:
        """Replace the object by `edit(object)`, which returns a new one; return that.

        Raises:
            RequestFailedError: the disk failed.
        """
        try:
            files.make_directories(self.path.parent, self.path.parent)
            with files.locked(self.path.parent):
                changed = edit(dict(self._parse()))
                files.replace(self.path, json.dumps(changed, allow_nan=False).encode())
        except OSError as error:
            raise RequestFailedError(
                f"{self.path} was not written: {first_line(error)}. {advice(error, self.path)}"
            ) from error
        return changed

    def _parse(self) -> JsonObject:
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.info("%s is not read: %s", self.path, error)
            return {}
        return found if isinstance(found, dict) else {}


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what differs when a file is replaced or grows; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
