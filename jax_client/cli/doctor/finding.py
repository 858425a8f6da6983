"""What does a check of `jax_client doctor` say?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was looked at.
        status: FAIL is what keeps the package from working here, WARN what may cost time or data later.
        found: what is there.
        advice: what to do; "" when nothing is.
        details: the same for programs, JSON.
    """

    check: str
    status: Status = "OK"
    found: str
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Run checks by name, one after another; one that breaks is a finding of its own."""
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
