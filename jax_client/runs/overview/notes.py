"""What has a person written beside a run? A note, tags and whether it is archived, in STATE/notes.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jax_client.errors import BadRequestError
from jax_client.runs.overview.small_file import SmallFile
from jax_client.values import JsonObject

FILE_NAME = "notes.json"
MAX_NOTE = 4_000
MAX_TAGS = 20
MAX_TAG = 50
# Runs with a note; what is more would make a small file a large one.
MAX_RUNS = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What a person has written beside a run.

    Raises:
        BadRequestError: another type, or too long.
    """

    note: str = ""
    tags: Sequence[str] = ()
    archived: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.note, str) or len(self.note) > MAX_NOTE:
            raise BadRequestError(f"note is no text of at most {MAX_NOTE} characters; give a shorter one.")
        tags = self.tags
        good = isinstance(tags, list | tuple) and all(isinstance(t, str) and 0 < len(t) <= MAX_TAG for t in tags)
        if not good or len(tags) > MAX_TAGS:
            raise BadRequestError(f"tags is no list of at most {MAX_TAGS} texts of 1 to {MAX_TAG} characters.")
        if not isinstance(self.archived, bool):
            raise BadRequestError(f"archived is {self.archived!r}; give true or false.")

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)


class Notes:
    """The notes of a state directory. Thread-safe.

    Args:
        state_dir: where they are.
    """

    def __init__(self, state_dir: Path) -> None:
        self._file = SmallFile(state_dir / FILE_NAME)

    def of(self, run_id: str) -> Note:
        """Return the note of a run, an empty one where there is none."""
        found = self._file.read().get(run_id)
        if not isinstance(found, dict):
            return Note()
        try:
            return Note(**found)
        except (BadRequestError, TypeError):  # edited by hand, or by a later version
            return Note()

    def put(self, run_id: str, note: Note) -> None:
        """Replace the note of a run; an empty one removes it.

        Raises:
            BadRequestError: too many runs have a note, or all notes together are too long.
            RequestFailedError: the disk failed.
        """

        def edit(notes: JsonObject) -> JsonObject:
            notes.pop(run_id, None)
            if note != Note():
                if len(notes) >= MAX_RUNS:
                    raise BadRequestError(f"{MAX_RUNS} runs have a note already; clear the note of one first.")
                notes[run_id] = note.to_json()
            return notes

        self._file.change(edit)
