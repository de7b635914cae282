"""A job's folder on disk: request, events, segments, video. What is in it survives any crash.

Plain files rather than a database: every job is one folder that can be copied, deleted or read by hand, `events.jsonl` is
only appended to (a torn last line is ignored), and everything else is written under a temporary name and renamed.

    outputs/<job id>/request.json     resolved request, model, preset, owner, engine settings
                     events.jsonl     one event a line (`dualparal.events`), Progress left out
                     block_0000.ts    one playable segment per finished block
                     video.mp4        all finished blocks, settings in its metadata
                     timeline.json    when each stage worked on what; trace.json the same for Perfetto
                     state/           what resume needs; gone once the job has finished (`runtime.state`)
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.errors import OutputError, RequestError
from dualparal.events import FINAL, Event, Progress, Queued, event_from_json
from dualparal.files import replace_durably
from dualparal.request import GenerationRequest

JOB_ID = re.compile(r"[0-9a-f-]{6,36}")
STATE_FOLDER = "state"
GOING = ".going"  # what is being deleted is renamed first
SEGMENT = re.compile(r"block_([0-9]+)\.ts")


def new_job_id() -> str:
    """A fresh id that sorts by time: milliseconds since the epoch in hexadecimal, a dash, 8 random digits."""
    return f"{time.time_ns() // 10**6:011x}-{secrets.token_hex(4)}"


def check_job_id(job_id: object) -> str:
    """`job_id` itself if it is 6 to 36 lower-case hexadecimal digits and dashes, else `RequestError`."""
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise RequestError("a job id is 6 to 36 lower-case hexadecimal digits and dashes", "job_id")
    return job_id


def outputs_folder(named: str | Path | None = None) -> Path:
    """The folder of all jobs: `named`, else DUALPARAL_OUTPUTS, else ./outputs; absolute."""
    return Path(named or os.environ.get("DUALPARAL_OUTPUTS") or "outputs").expanduser().absolute()


def write_atomically(path: Path, text: str, before_naming: Callable[[Path], None] = lambda partial: None) -> None:
    """Write `text` under a temporary name beside `path`, then rename, so that `path` is never half-written, not by a power
    cut either. `before_naming` is given the written file before it has its name. Raises OSError."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        before_naming(partial)
        replace_durably(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class JobFolder:
    """One job's files. Creating the object touches nothing; `create` makes the folder."""

    path: Path

    @property
    def job_id(self) -> str:
        return self.path.name

    @property
    def video(self) -> Path:
        return self.path / "video.mp4"

    @classmethod
    def create(
        cls, outputs: Path, job_id: str, request: GenerationRequest,
        *, before_naming: Callable[[Path], None] = lambda partial: None, **about: Any,
    ) -> JobFolder:  # fmt: skip
        """Make the folder and write `request.json` (`about` goes beside the request), which makes it a job for whoever looks;
        `before_naming` is given that file before. Raises `OutputError`."""
        folder = cls(outputs / check_job_id(job_id))
        record = {"job_id": job_id, "created_s": time.time(), **about, "request": request.model_dump(exclude_none=True)}
        text = json.dumps(record, ensure_ascii=False, indent=1)
        try:
            folder.path.mkdir(parents=True, exist_ok=False)
            try:
                write_atomically(folder.path / "request.json", text, before_naming)
            except OSError:
                folder.path.rmdir()
                raise
        except FileExistsError:
            raise OutputError(f"there is something at {folder.path} already; use another job id or outputs folder") from None
        except OSError as error:
            raise OutputError(
                f"results cannot be written to {outputs}: {error.strerror}; make it writable, free space or name "
                "another folder with DUALPARAL_OUTPUTS"
            ) from None
        return folder

    def record(self) -> dict[str, Any]:
        """What `request.json` holds: job_id, created_s, request (a dictionary) and what `create` was given."""
        try:
            found = json.loads((self.path / "request.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError(f"job {self.job_id} has no readable request.json: {error}") from None
        if not isinstance(found, dict):
            raise OutputError(f"job {self.job_id}: request.json does not hold an object")
        return found

    def request(self) -> GenerationRequest:
        """The resolved request of this job. Raises `OutputError` or `RequestError` when it is damaged."""
        values = self.record().get("request")
        if not isinstance(values, dict):
            raise OutputError(f"job {self.job_id}: request.json holds no request")
        return GenerationRequest(**values)

    def append(self, event: Event) -> None:
        """Add one event to `events.jsonl`. Progress is left out: it is true for a second only. Raises `OutputError`."""
        if isinstance(event, Progress):
            return
        line = json.dumps(event.to_json(), ensure_ascii=False).encode() + b"\n"
        path = self.path / "events.jsonl"
        try:
            with path.open("a+b", buffering=0) as lines:
                if _ends_torn(lines):
                    line = b"\n" + line
                end = lines.seek(0, os.SEEK_END)
                if lines.write(line) != len(line):
                    lines.truncate(end)  # a line that lacks its end only would count twice once it is written again
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if isinstance(event, (*FINAL, Queued)):  # what says whether the job goes on survives a power cut
                    os.fsync(lines.fileno())
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; free space or make it writable") from None

    def events(self) -> list[Event]:
        """All whole events on disk, oldest first. Raises `OutputError` where the journal is there and cannot be read."""
        try:
            lines = (self.path / "events.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"job {self.job_id}: events.jsonl cannot be read: {error.strerror}") from None
        found = []
        for line in lines:
            try:
                found.append(event_from_json(json.loads(line)))
            except (ValueError, TypeError, RecursionError):  # torn by a crash in mid-write
                continue
        return found

    def final_event(self) -> Event | None:
        """The event that ended the job, or None while it is queued (again), running or interrupted."""
        last = next((event for event in reversed(self.events()) if isinstance(event, (*FINAL, Queued))), None)
        return None if isinstance(last, Queued) else last

    def segments(self) -> list[Path]:
        """The finished blocks' segments, in order."""
        found = {int(match[1]): path for path in self.path.glob("block_*.ts") if (match := SEGMENT.fullmatch(path.name))}
        return [found[block] for block in sorted(found)]

    def drop_state(self) -> None:
        """Remove what only a job that goes on needs, at once for whoever looks; no error when it is gone or must stay."""
        going = self.path / f".{STATE_FOLDER}{GOING}"
        shutil.rmtree(going, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.path / STATE_FOLDER).rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def delete(self) -> None:
        """Remove the job and all its files; no error when it is gone already. It is gone at once for whoever looks, and for a
        program that starts after this one was killed. Raises `OutputError`."""
        going = self.path.with_name(f".{self.path.name}{GOING}")
        try:
            shutil.rmtree(going, ignore_errors=True)
            self.path.rename(going)
            shutil.rmtree(going)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"job {self.job_id} cannot be deleted: {error.strerror or error}") from None

    @property
    def stop_wish(self) -> Path:
        """A file that is there while the job has been asked to stop and has not ended."""
        return self.path / ".stop"


def _ends_torn(lines: io.FileIO) -> bool:
    """Whether the last line was cut off by a crash: what is appended next must not be glued to it."""
    if lines.seek(0, os.SEEK_END) == 0:
        return False
    lines.seek(-1, os.SEEK_END)
    return lines.read(1) != b"\n"


def list_jobs(outputs: Path) -> Iterator[JobFolder]:
    """Every job folder under `outputs`, newest first. Other folders are left alone."""
    try:
        entries = [entry for entry in outputs.iterdir() if JOB_ID.fullmatch(entry.name) and _has_request(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in sorted(entries, key=lambda path: path.name, reverse=True):
        yield JobFolder(entry)


def _has_request(folder: Path) -> bool:
    try:
        return (folder / "request.json").is_file()
    except OSError:  # somebody else's folder
        return False


def finish_deleting(outputs: Path) -> None:
    """Remove what is left of jobs whose deletion was cut off."""
    for path in outputs.glob(f".*{GOING}"):
        shutil.rmtree(path, ignore_errors=True)


def find_job(outputs: Path, job_id: object) -> JobFolder:
    """The folder of `job_id`; raises `RequestError` for a malformed or unknown id."""
    folder = JobFolder(outputs / check_job_id(job_id))
    if not _has_request(folder.path):
        raise RequestError(f"there is no job {folder.job_id} in {outputs}", "job_id")
    return folder
