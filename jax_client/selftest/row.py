"""What does one check of the self-test report? A `Row`: a verdict, what was measured, its bar, what a miss means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The result of one check.

    Attributes:
        check: its name.
        verdict: FAIL is a wrong number, WARN a slow one, SKIP says in `meaning` why the check does not apply here.
        measured: for people.
        bar: what was asked of it; "" for a figure without a bar.
        meaning: what a verdict other than PASS means, and what to do.
        values: the figures, for programs.
    """

    check: str
    verdict: Verdict = "PASS"
    measured: str = ""
    bar: str = ""
    meaning: str = ""
    values: Mapping[str, object] = field(default_factory=dict)


def gap_row(check: str, gap: float, most: float, meaning: str, note: str = "") -> Row:
    """Return the row of a difference that may be at most `most`; one that is no number is more than that.

    Args:
        check: its name.
        gap: the measured difference.
        most: the bar.
        meaning: what a larger one means.
        note: on the measurement.
    """
    well = gap <= most
    return Row(
        check=check,
        verdict="PASS" if well else "FAIL",
        measured=f"off by {gap:.2g}" + (f", {note}" if note else ""),
        bar=f"at most {most:.2g}".replace("e-0", "e-"),
        meaning="" if well else meaning,
        values={"gap": float(gap) if math.isfinite(gap) else None, "most": most},
    )
