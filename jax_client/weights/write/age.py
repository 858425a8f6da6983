"""How is an export encrypted? Every file is written as age writes it, for its recipients' X25519 keys.

The format is https://age-encryption.org/v1; `age --decrypt`, rage and pyrage read it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jax_client.errors import BadRequestError, BadTypeError

SUFFIX = ".age"
MAX_RECIPIENTS = 64


def check_recipients(recipients: object) -> list[str] | None:
    """Return the recipients of an export; None, which encrypts nothing, stays None.

    Args:
        recipients: public keys as text, such as "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kudpm7cq4qvfyw".

    Raises:
        BadTypeError: not a list of text.
        BadRequestError: none, too many, or one that is no X25519 public key.
    """
    if recipients is None:
        return None
    if not isinstance(recipients, list | tuple) or not all(isinstance(each, str) for each in recipients):
        raise BadTypeError(
            f"age_encryption_recipients is {recipients!r:.80}; give a list of public keys (age1...), or None."
        )
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise BadRequestError(
            f"age_encryption_recipients has {len(recipients)} keys; give 1 to {MAX_RECIPIENTS}, or None for an export "
            "that is not encrypted."
        )
    pyrage = _pyrage()
    for i, each in enumerate(recipients):
        try:
            pyrage.x25519.Recipient.from_str(each)
        except pyrage.RecipientError as error:
            raise BadRequestError(
                f"age_encryption_recipients[{i}] is {each!r:.80}, no X25519 public key of age ({error}); make a pair "
                "with age-keygen and give the key that begins with age1."
            ) from None
    return list(recipients)


def encrypt_files(source: Path, target: Path, recipients: list[str]) -> None:
    """Write each file of the directory `source` to the directory `target`, encrypted, as NAME.age."""
    pyrage = _pyrage()
    keys = [pyrage.x25519.Recipient.from_str(each) for each in recipients]
    for name in sorted(os.listdir(source)):
        pyrage.encrypt_file(str(source / name), str(target / f"{name}{SUFFIX}"), keys)


def _pyrage() -> Any:
    """Return the library, which has no types; few exports are encrypted, so the others do not import it."""
    import pyrage

    return pyrage
