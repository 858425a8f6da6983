"""Which checkpoints were compared with their hashes, and were they whole? STATE/verified.json has the results."""

from __future__ import annotations

import json
import time
from pathlib import Path

from jax_client.checkpoint.disk.clock import unix_seconds
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import JaxClientError, NotFoundError
from jax_client.runs.overview import small_file
from jax_client.runs.overview.small_file import SmallFile
from jax_client.values import CheckpointKey, JsonObject

FILE_NAME = "verified.json"
MAX_RESULTS = 5_000
MAX_ERROR = 500


class Verified:
    """The results of a state directory. Thread-safe.

    Args:
        state_dir: where they are.
    """

    def __init__(self, state_dir: Path) -> None:
        self._file = SmallFile(state_dir / FILE_NAME)

    def of(self, path: str, created: float) -> JsonObject | None:
        """Return {"time", "ok", "error"} of a checkpoint's newest check, None if there was none since `created`."""
        found = self._file.read().get(path)
        if not isinstance(found, dict) or (when := unix_seconds(found.get("time"))) is None or when < created:
            return None
        error = found.get("error")
        return {"time": when, "ok": found.get("ok") is True, "error": error if isinstance(error, str) else None}

    def record(self, path: str, error: str | None) -> None:
        """Keep the result of a check made now; `error` is None for a whole checkpoint.

        Raises:
            RequestFailedError: the disk failed.
        """
        self.record_all({path: error})

    def record_all(self, results: dict[str, str | None]) -> None:
        """Keep several results at once. Raises as `record`."""

        def edit(known: JsonObject) -> JsonObject:
            for path, error in results.items():
                known.pop(path, None)
                text = None if error is None else error[:MAX_ERROR]
                known[path] = {"time": time.time(), "ok": error is None, "error": text}
            for path in list(known)[: max(0, len(known) - MAX_RESULTS)]:
                del known[path]
            while len(json.dumps(known)) > small_file.MAX_BYTES:
                for path in list(known)[: 1 + len(known) // 10]:
                    del known[path]
            return known

        self._file.change(edit)


def verify(store: CheckpointStore, state_dir: Path, key: CheckpointKey) -> JsonObject:
    """Compare a checkpoint with its hashes, record the result, and return it as {"time", "ok", "error"}.

    Raises:
        NotFoundError: there is no such checkpoint; nothing is recorded.
        RequestFailedError: the result could not be written.
    """
    try:
        store.verify(key)
        error = None
    except NotFoundError:
        raise
    except JaxClientError as problem:
        error = str(problem)
    known = Verified(state_dir)
    known.record(str(key), error)
    return known.of(str(key), 0.0) or {"time": time.time(), "ok": error is None, "error": error}
