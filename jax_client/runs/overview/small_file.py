"""How is a little JSON kept that people may have edited? In one bounded file, read anew when it has changed.

What does not parse, or has another form, counts as empty: it is worth less than the listing that reads it. What is not
finite, such as NaN, counts as null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

from jax_client.checkpoint.disk import files
from jax_client.errors import BadRequestError, RequestFailedError, first_line
from jax_client.host.disk import advice
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)
MAX_BYTES = 4 * 2**20
# A larger one was edited, or written when there was no such limit: it can be read, and be made smaller.
MAX_READ_BYTES = 128 * 2**20


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
            if stamp is None or stamp[1] > MAX_READ_BYTES:
                return {}
            if self._read[0] != stamp:
                try:
                    self._read = stamp, self._parse()
                except OSError as error:
                    logger.info("%s is not read: %s", self.path, error)
                    return {}
            return self._read[1]

    def change(self, edit: Callable[[JsonObject], JsonObject]) -> JsonObject:
        """Replace the object by `edit(object)`, which returns a new one; return that.

        Raises:
            BadRequestError: the file would become larger than MAX_BYTES; it is as it was.
            RequestFailedError: the disk failed, or the file is too large to be read.
        """
        try:
            files.make_directories(self.path.parent, self.path.parent)
            with files.locked(self.path.parent):
                size = self._size()
                changed = edit(dict(self._parse()))
                data = json.dumps(changed, allow_nan=False).encode()
                if len(data) > max(MAX_BYTES, size - 1):
                    raise BadRequestError(
                        f"{self.path} would have {len(data)} bytes of {MAX_BYTES} that it may have; shorten or clear "
                        "what is in it first."
                    )
                files.replace(self.path, data)
        except OSError as error:
            raise RequestFailedError(
                f"{self.path} was not written: {first_line(error)}. {advice(error, self.path)}"
            ) from error
        return changed

    def _size(self) -> int:
        """Return its bytes, 0 where there is none. Raises RequestFailedError for one that is too large to be read."""
        stamp = file_stamp(self.path)
        size = 0 if stamp is None else stamp[1]
        if size > MAX_READ_BYTES:
            raise RequestFailedError(
                f"{self.path} has {size} bytes of {MAX_READ_BYTES} that are read; move it away, or make it smaller.",
                category="user",
            )
        return size

    def _parse(self) -> JsonObject:
        try:
            found = json.loads(self.path.read_bytes(), parse_float=_finite, parse_constant=lambda _: None)
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            logger.info("%s is not read: %s", self.path, error)
            return {}
        return found if isinstance(found, dict) else {}


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what differs when a file is replaced or grows; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
