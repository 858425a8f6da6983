"""How does a phase write down what it measures? One JSON line for each measurement, at once; an error is one, too."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Where one phase writes, and until when it may run.

    Attributes:
        out: the folder of all results.
        phase: its name begins the name of each row.
        began: unix seconds, when the whole command did.
        until: unix seconds, after which the phase is killed.
        tiny: whether this is a rehearsal with a toy on a CPU.
    """

    out: Path
    phase: str
    began: float
    until: float
    tiny: bool

    def write(self, name: str, /, **values: Any) -> None:
        """Append one row, and print its beginning."""
        line = {"row": f"{self.phase}/{name}", "at_s": round(time.time() - self.began, 1)}
        line |= {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        text = json.dumps(line, default=str)
        with (self.out / FILE).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text[:200], flush=True)

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Give a dict to fill, and write it at the end; an exception is written into it and ends there."""
        values: dict[str, Any] = {}
        try:
            yield values
        except Exception as error:
            values["error"] = f"{type(error).__name__}: {error}"[:600]
            traceback.print_exc()
        self.write(name, **values)

    def has_time(self, name: str, seconds: float) -> bool:
        """Return whether the phase has this long left; if not, write what is left out."""
        left = self.until - time.time()
        if left < seconds:
            self.write(name, skipped=f"{left:.0f} s left, {seconds:.0f} wanted")
        return left >= seconds


def read(out: Path) -> list[dict[str, Any]]:
    """Return all rows that were written; a line that a kill cut off is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found
