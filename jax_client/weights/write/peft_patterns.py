"""Which linear layers do the patterns of an adapter_config.json mean? They match names as peft matches them.

A file from elsewhere may hold a regular expression that takes years to fail, so that only simple ones are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jax_client.errors import BadRequestError, UnsupportedError

# A module's name, or the end of one; "^" as peft writes it before a whole name.
PLAIN_NAME = re.compile(r"\^?[\w.]+")
# The time to match grows with the power of the number of repetitions, and with the product of the alternatives.
LIMITS = {
    "characters": (re.compile(r".", re.DOTALL), 2048),
    "repetitions": (re.compile(r"(?<!\\)(?:[*+]|\{|(?<![(*+}])\?)"), 6),
    "groups": (re.compile(r"(?<!\\)\("), 16),
    "alternatives": (re.compile(r"\|"), 40),
    "repeated groups": (re.compile(r"(?<!\\)\)[*+{]"), 0),
}
# peft's word for every linear layer but the output projection.
ALL_LINEAR = "all-linear"
HEAD = "lm_head"


def compiled(where: str, text: str, form: str = "({})") -> re.Pattern[str]:
    """Compile a regular expression.

    Args:
        where: file and field, for messages.
        text: the expression.
        form: what it is a part of.

    Raises:
        BadRequestError: not a regular expression.
        UnsupportedError: one that could take too long.
    """
    for noun, (part, limit) in LIMITS.items():
        if (count := len(part.findall(text))) > limit:
            raise UnsupportedError(
                f"{where} is the pattern {text!r:.80} with {count} {noun}; read are up to {limit}, because more can "
                "take for ever to match. Write the names of the modules out."
            )
    try:
        return re.compile(form.format(text))
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRequestError(f"{where} is {text!r:.80}, which is no regular expression ({error}).") from None


class NamePatterns:
    """The keys of rank_pattern or alpha_pattern with their values; the first key that matches a name holds."""

    def __init__(self, where: str, values: Mapping[str, float]) -> None:
        """Compile the keys. Raises as `compiled`."""
        self._values = [
            (key if PLAIN_NAME.fullmatch(key) else compiled(f"{where}[{key!r:.80}]", key, r"(?:.*\.)?({})\Z"), value)
            for key, value in values.items()
        ]

    def value(self, linear: str, default: float) -> float:
        """Return what the first matching key has for a linear layer."""
        for key, value in self._values:
            if key.match(linear) if isinstance(key, re.Pattern) else _ends_in(linear, key):
                return value
        return default


class Targets:
    """The linear layers that target_modules, exclude_modules and layers_to_transform mean together."""

    def __init__(
        self,
        where: str,
        targets: Sequence[str] | str,
        excluded: Sequence[str] | str,
        layers: Sequence[int] | None,
        layers_pattern: Sequence[str],
    ) -> None:
        """Compile the patterns. Raises as `compiled`."""
        self._targets = _name_set(f"{where}: target_modules", targets)
        self._excluded = _name_set(f"{where}: exclude_modules", excluded)
        self._layers = layers
        field, form = f"{where}: layers_pattern", r"(?:.*?\.)?(?:{})\.(?P<layer>\d+)\."
        # As in peft, the first number of a name is the layer's where nothing else is said.
        self._numbers = [compiled(field, name, form) for name in layers_pattern or [r"[^.]*"]]

    def among(self, linears: Iterable[str]) -> set[str]:
        """Return those of `linears`, names such as "model.layers.0.self_attn.q_proj", that the adapter covers."""
        return {name for name in linears if self._covers(name)}

    def _covers(self, name: str) -> bool:
        if _is_one_of(name, self._excluded) or not _is_one_of(name, self._targets):
            return False
        # As in peft, the layers narrow a list down, but neither a pattern nor a whole name.
        if self._layers is None or not isinstance(self._targets, tuple) or name in self._targets:
            return True
        found = next((match for pattern in self._numbers if (match := pattern.match(name))), None)
        return found is not None and int(found["layer"]) in self._layers


def _name_set(where: str, names: Sequence[str] | str) -> tuple[str, ...] | re.Pattern[str] | None:
    if not isinstance(names, str):
        return tuple(names)
    return None if names.lower() == ALL_LINEAR else compiled(where, names, r"(?:{})\Z")


def _is_one_of(name: str, names: tuple[str, ...] | re.Pattern[str] | None) -> bool:
    if names is None:
        return name != HEAD
    if isinstance(names, tuple):
        return any(_ends_in(name, target) for target in names)
    return names.match(name) is not None


def _ends_in(name: str, key: str) -> bool:
    if key.startswith("^"):
        return name == key[1:]
    return f".{name}".endswith(f".{key}")
