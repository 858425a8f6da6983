"""How are metrics written for Prometheus? As families of values, in its text format 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "jax_client_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One metric with the values of all its labels.

    Attributes:
        name: without the prefix; a counter's name ends with `_total`, after its unit.
        kind: "counter" if the values only grow.
        description: one line for people.
        values: (labels, value), no two with the same labels.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    values: Iterable[tuple[Mapping[str, str], float]]


def render(families: Iterable[Family]) -> str:
    """Return the text of all families that have values."""
    lines: list[str] = []
    for family in families:
        name, values = PREFIX + family.name, list(family.values)
        if not values:
            continue
        lines += [f"# HELP {name} {_escaped(family.description)}", f"# TYPE {name} {family.kind}"]
        lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in values]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = [f'{key}="{_quoted(value)}"' for key, value in labels.items()]
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
