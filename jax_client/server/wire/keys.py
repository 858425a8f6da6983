"""Which keys does a server let in, whose is each, and how much may its clients have? A file has one line for each key.

    NAME sha256:HASH [admin] [LIMIT=NUMBER]...

The file has no key, only its hash. A plain sha256 is enough: a key is 256 random bits, which no one can guess however
fast a guess is checked, and a slow hash would only slow every request. Where a limit is not given, each key has an
equal part of what a server without keys has, so that what one has, no other can take.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jax_client.errors import BadRequestError, shown
from jax_client.server.wire.accounts import Quota
from jax_client.values import Owner

# What the SDK takes for a key begins with this.
PREFIX = "tml-"
# Part of a file's name too; there are file systems that know no capitals.
NAME_FORM = "[a-z0-9][a-z0-9_-]{0,63}"
HASH = "sha256:"
ADMIN = "admin"
MAX_FILE_BYTES = 2**20
DEFAULTS: Mapping[str, int] = asdict(Quota())
# With many keys each has at least this part of a limit: one for the largest body, a fourth or a tenth for ordinary use.
_MOST_PARTS = {"arriving_bytes": 1, "bytes": 4}
_MOST_PARTS_OF_OTHERS = 10
# Control characters, and Unicode's separators of lines and paragraphs.
_CONTROL = ("Cc", "Zl", "Zp")
_ADVICE = "'jax_client key NAME' makes a key and prints its line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One line of the file.

    Attributes:
        owner: who owns what its clients make; the name in it is that of the key.
        digest: sha256 of the key.
        quota: what its clients may have at once.
    """

    owner: Owner
    digest: bytes
    quota: Quota


def new_key() -> str:
    """Return a new key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: bytes) -> bytes:
    """Return the hash of a key."""
    return hashlib.sha256(key).digest()


def line_of(name: str, key: str, options: Sequence[str] = ()) -> str:
    """Return the line of a key, for the file.

    Raises:
        BadRequestError: the name or an option has another form.
    """
    line = " ".join((name, HASH + digest(key.encode()).hex(), *options))
    _refuse_control_characters(line, "the line")
    _parsed(line, "the line")
    return line


def read_keys(path: Path) -> list[Key]:
    """Return the keys of a file.

    Raises:
        BadRequestError: it is no such file; the message names the line, the field, the value and what to do.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadRequestError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; give a file with one line for each key.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRequestError(f"{path}, line {line} is no UTF-8 text; {_ADVICE}.") from None
    lines: dict[int, _Line] = {}
    # Not splitlines, which also breaks where editors show no new line: the rest of a comment would be a key.
    for number, content in enumerate(text.split("\n"), 1):
        _refuse_control_characters(content.removesuffix("\r"), f"{path}, line {number}")
        words = content.partition("#")[0]
        if words.strip():
            lines[number] = _parsed(words, f"{path}, line {number}")
    if not lines:
        raise BadRequestError(f"{path} has no key, so that no client could be let in; {_ADVICE}.")
    _refuse_twice(lines, path)
    return [
        Key(owner=line.owner, digest=line.digest, quota=Quota(**(_part(len(lines)) | line.limits)))
        for line in lines.values()
    ]


def whole(keys: Sequence[Key]) -> Quota:
    """Return the limits of all keys together: the sums of theirs, but no more samples than an engine takes."""
    sums = {field: sum(getattr(key.quota, field) for key in keys) for field in DEFAULTS}
    most = {field: max(default, sums[field]) for field, default in DEFAULTS.items()}
    return Quota(**(most | {"samples": DEFAULTS["samples"]}))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    owner: Owner
    digest: bytes
    limits: dict[str, int]


def _part(keys: int) -> dict[str, int]:
    """Return the limits of one of `keys` keys."""
    parts = {field: min(keys, _MOST_PARTS.get(field, _MOST_PARTS_OF_OTHERS)) for field in DEFAULTS}
    # All samples together may not pass what an engine takes, which refuses more for good.
    parts["samples"] = keys
    return {field: max(1, default // parts[field]) for field, default in DEFAULTS.items()}


def _refuse_control_characters(text: str, where: str) -> None:
    for i, character in enumerate(text):
        if character != "\t" and unicodedata.category(character) in _CONTROL:
            raise BadRequestError(
                f"{where}: character {i + 1} is {character!r}, which does not show; take it out, and look whether the "
                "line says what it should."
            )


def _parsed(text: str, where: str) -> _Line:
    name, *others = text.split()
    if not re.fullmatch(NAME_FORM, name):
        raise BadRequestError(f"{where}: the name is {shown(name)}; give one of the form {NAME_FORM}.")
    if not others or not re.fullmatch(HASH + "[0-9a-f]{64}", others[0]):
        # Not the value, which may be the key itself.
        raise BadRequestError(
            f"{where}: the second word, of {name}, is no hash; give {HASH} and 64 digits from 0 to f. {_ADVICE}."
        )
    limits: dict[str, int] = {}
    admin = False
    for word in others[1:]:
        field, equals, value = word.partition("=")
        if word == ADMIN and not admin:
            admin = True
        elif equals and field in DEFAULTS and field not in limits:
            limits[field] = _limit(field, value, where)
        elif field in limits or (word == ADMIN and admin):
            raise BadRequestError(f"{where}: {field} is there twice; give it once.")
        else:
            known = ", ".join(DEFAULTS)
            raise BadRequestError(f"{where}: {shown(word)} is no option; give {ADMIN}, or LIMIT=NUMBER of {known}.")
    hashed = bytes.fromhex(others[0].removeprefix(HASH))
    return _Line(owner=Owner(name, admin=admin), digest=hashed, limits=limits)


def _limit(field: str, value: str, where: str) -> int:
    most = DEFAULTS["samples"] if field == "samples" else 10**15
    if not re.fullmatch("[0-9]{1,16}", value) or not 1 <= int(value) <= most:
        raise BadRequestError(f"{where}: {field} is {shown(value)}; give a whole number from 1 to {most:,}.")
    return int(value)


def _refuse_twice(lines: Mapping[int, _Line], path: Path) -> None:
    for field, of in (("name", lambda line: line.owner.name), ("key", lambda line: line.digest)):
        first: dict[object, int] = {}
        for number, line in lines.items():
            if (before := first.setdefault(of(line), number)) != number:
                raise BadRequestError(
                    f"{path}, line {number}: the {field} of {line.owner.name} is that of line {before} too; give each "
                    f"line a {field} of its own."
                )
