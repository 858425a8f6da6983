"""What does a check of `jax_client doctor` report? A `Finding`: a status, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        status: FAIL keeps the package from working on this machine, WARN may cost time or data later.
        found: the result, for people.
        advice: what to do; "" for nothing.
        details: the result as JSON, for programs.
    """

    check: str
    status: Status = "OK"
    found: str
    advice: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Run checks by name, one after another; a check that raises gives a finding of its own."""
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            yield Finding(
                check=name,
                status="FAIL",
                found=f"it could not be checked: {type(error).__name__}: {' '.join(str(error).split())}",
                advice="Report this if the package works nevertheless.",
            )
