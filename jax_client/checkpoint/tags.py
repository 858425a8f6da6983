"""What about a checkpoint can change after it is saved? Its tags say when it expires and whether it is public.

A sealed file holds them, beside the manifest of a version and not listed in it. Without the file no tag was ever set. A
damaged file counts as none: it neither deletes a checkpoint nor makes it public.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from jax_client.checkpoint.disk import files, sealed
from jax_client.checkpoint.disk.clock import Deadline
from jax_client.checkpoint.disk.sealed import DamagedError

logger = logging.getLogger(__name__)

FILE_NAME = "label.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """What is set on one version of a checkpoint.

    Attributes:
        expires: when it ends, None for never.
        public: whether others may read it.
        deleted: whether that end is a deletion, which can be taken back.
        former: the end that it had before its deletion.
    """

    expires: Deadline | None = None
    public: bool = False
    deleted: bool = False
    former: Deadline | None = None


def write(version: Path, tags: Tags) -> None:
    """Set the tags of a version, durably: a reader sees the old or the new one."""
    files.replace(version / FILE_NAME, sealed.seal(asdict(tags), "label"))


def read(version: Path) -> Tags:
    """Read the tags of a version.

    Raises:
        DamagedError: it is damaged.
    """
    path = version / FILE_NAME
    try:
        content = sealed.unseal(path.read_bytes(), str(path))
    except FileNotFoundError:
        return Tags()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
    return Tags(
        expires=Deadline.of(content["expires"]),
        public=content["public"],
        deleted=content.get("deleted") is True,
        former=Deadline.of(content.get("former")),
    )


def read_or_none_set(version: Path) -> Tags:
    """Read the tags of a version; damaged ones are logged and count as none."""
    try:
        return read(version)
    except DamagedError as error:
        logger.warning("%s; until it is set again the checkpoint is private and does not expire", error)
        return Tags()
