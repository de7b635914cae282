"""What its owner has written on a job: a name and a star. A file of its own beside the record, which is never written again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from dualparal.errors import OutputError
from dualparal.files import read_record, write_record
from dualparal.jobs.folder import JobFolder

FILE = "notes.json"
MAX_NAME_CHARS = 120


@dataclass(frozen=True)
class Notes:
    """`name` is '' where it has none."""

    name: str = ""
    is_starred: bool = False


def read_notes(folder: JobFolder) -> Notes:
    """The notes on a job; none where they cannot be read."""
    try:
        found = read_record(folder.path / FILE)
        return Notes(str(found.get("name") or "")[:MAX_NAME_CHARS], found.get("is_starred") is True)
    except (OSError, ValueError, RecursionError):
        return Notes()


def change_notes(folder: JobFolder, *, name: str | None = None, is_starred: bool | None = None) -> Notes:
    """Change what is given; returns the notes as they are then. Raises `OutputError`."""
    notes = read_notes(folder)
    if name is not None:
        notes = replace(notes, name=" ".join(name.split())[:MAX_NAME_CHARS])
    if is_starred is not None:
        notes = replace(notes, is_starred=is_starred)
    try:
        write_record(folder.path / FILE, asdict(notes))
    except OSError as error:
        raise OutputError(f"job {folder.job_id}: what you wrote cannot be kept: {error.strerror}; free space") from None
    return notes
