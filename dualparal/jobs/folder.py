"""A job's folder on disk: request, events, segments, video. What is in it survives any crash.

Plain files rather than a database: every job is one folder that can be copied, deleted or read by hand, `events.jsonl` is
only appended to (a torn last line is ignored), and everything else is written under a temporary name and renamed.

    outputs/<job id>/request.json     completed request, model, preset, owner, engine settings
                     steered.json     the request with the timeline that it was steered to (`ring.steering`)
                     events.jsonl     one event a line (`dualparal.events`), Progress left out
                     start.png        the picture that the film begins with, if with one; its digest is in the request
                     start.safetensors, before.mp4   the end of the film that it continues, and that film, if joined to it
                     block_0000.ts    one playable segment per finished block
                     video.mp4        all finished blocks, settings in its metadata
                     look/            small pictures of each block as it was last seen (`jobs.looks`), and look.webp of all
                     end/             the last latents, for a film that continues this one (`ring.film_end`)
                     timeline.json    when each stage worked on what; trace.json the same for Perfetto
                     notes.json       its name and star, if it was given any (`jobs.notes`)
                     state/           what resume needs; gone once the job has finished (`ring.saved_sweeps`)
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.errors import OutputError, RequestError
from dualparal.events import FINAL, Event, Progress, Queued, event_from_json
from dualparal.files import (
    END_LATENTS,
    START_IMAGE,
    STATE_FOLDER,
    STEERED,
    private,
    read_record,
    sealed,
    unsealed,
    write_record,
    written_atomically,
)
from dualparal.jobs.history import fold
from dualparal.paths import expand
from dualparal.presets import restore
from dualparal.request import Settings

JOB_ID = re.compile(r"[0-9a-f-]{6,36}")
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
    """The folder of all jobs: `named`, else DUALPARAL_OUTPUTS, else ./outputs; absolute. Raises `RequestError`."""
    return expand(named or os.environ.get("DUALPARAL_OUTPUTS") or "outputs")


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

    @property
    def start_image(self) -> Path:
        return self.path / START_IMAGE

    @property
    def end(self) -> Path:
        """The end of its film (`jobs.film_end`)."""
        return self.path / END_LATENTS

    @property
    def look(self) -> Path:
        """The folder of early looks (`jobs.looks`)."""
        return self.path / "look"

    @classmethod
    def create(
        cls, outputs: Path, job_id: str, request: Settings,
        *, before_naming: Callable[[Path], None] = lambda partial: None, begins_with: Mapping[str, bytes | Path] | None = None,
        **about: Any,
    ) -> JobFolder:  # fmt: skip
        """Make the folder, put the files that it `begins_with` into it by name (a copy of what lies at a path) and write
        `request.json` (`about` goes beside the request), which makes it a job for whoever looks; `before_naming` is given that
        file before. Raises `OutputError`."""
        folder = cls(outputs / check_job_id(job_id))
        record = {"job_id": job_id, "created_s": time.time(), **about, "request": request.model_dump(exclude_none=True)}
        try:
            make_private_folder(outputs)
            folder.path.mkdir(mode=0o700)
            try:
                for name, content in (begins_with or {}).items():
                    _put(folder.path / name, content)
                write_record(folder.path / "request.json", record, before_naming)
            except OSError:
                shutil.rmtree(folder.path, ignore_errors=True)
                raise
        except FileExistsError:
            raise OutputError(f"there is something called {job_id} already; use another job id or outputs folder") from None
        except OSError as error:
            raise OutputError(
                f"results cannot be written: {error.strerror}; make the outputs folder writable, free space or name another "
                "one with DUALPARAL_OUTPUTS"
            ) from None
        return folder

    def record(self) -> dict[str, Any]:
        """What `request.json` holds: job_id, created_s, request (a dictionary; as it was steered last) and what `create` was
        given."""
        try:
            found = read_record(self.path / "request.json")
            if os.path.lexists(self.path / STEERED):
                found["request"] = read_record(self.path / STEERED)["request"]
            return found
        except (OSError, KeyError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"job {self.job_id} has no readable request.json: {why}") from None

    def request(self) -> Settings:
        """The settings of this job. Raises `OutputError` or `RequestError` when it is damaged."""
        values = self.record().get("request")
        if not isinstance(values, dict):
            raise OutputError(f"job {self.job_id}: request.json holds no request")
        try:
            return restore(values)
        except RequestError as error:
            raise RequestError(f"job {self.job_id}: request.json is not usable: {error}", error.field) from None

    def append(self, event: Event) -> None:
        """Add one event to `events.jsonl`. Progress is left out: it is true for a second only. Raises `OutputError`."""
        if isinstance(event, Progress):
            return
        # A path that is not UTF-8 is told by escapes, which JSON reads back as they were.
        line = json.dumps(sealed(event.to_json()), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        path = self.path / "events.jsonl"
        try:
            with open(path, "a+b", buffering=0, opener=private) as lines:
                if _ends_torn(lines):
                    line = b"\n" + line
                end = lines.seek(0, os.SEEK_END)
                if lines.write(line) != len(line):
                    lines.truncate(end)  # a line that lacks its end only would count twice once it is written again
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if isinstance(event, (*FINAL, Queued)):  # what says whether the job goes on survives a power cut
                    os.fsync(lines.fileno())
        except OSError as error:
            raise OutputError(
                f"job {self.job_id}: events.jsonl cannot be written: {error.strerror}; free space or make it writable"
            ) from None

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
                record = json.loads(line)
                found.append(event_from_json(unsealed(record) if isinstance(record, dict) else record))
            except (ValueError, TypeError, RecursionError):  # torn by a crash in mid-write, or damaged
                continue
        return found

    def owner(self) -> str | None:
        """Whose job it is, '' where it is nobody's; by its journal where its record is damaged, None where that says nothing
        either."""
        try:
            return str(self.record().get("owner") or "")
        except OutputError:
            pass
        try:
            return next((event.owner for event in self.events() if isinstance(event, Queued) and event.owner), None)
        except OutputError:
            return None

    def final_event(self) -> Event | None:
        """The event that ended the job, or None while it is queued (again), running or interrupted."""
        return fold(self.events()).final

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
        self.put_away()
        self.drop_put_away()

    def put_away(self) -> None:
        """Take the job out of everybody's sight, to be deleted or taken back. Raises `OutputError`."""
        try:
            shutil.rmtree(self._going, ignore_errors=True)
            self.path.rename(self._going)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"job {self.job_id} cannot be deleted: {error.strerror or error}") from None

    def drop_put_away(self) -> None:
        """Remove what was put away; no error when it is gone. Raises `OutputError`."""
        try:
            shutil.rmtree(self._going)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"job {self.job_id} cannot be deleted: {error.strerror or error}") from None

    def take_back(self) -> None:
        """Undo `put_away`. Raises `OutputError`."""
        try:
            self._going.rename(self.path)
        except OSError as error:
            raise OutputError(f"job {self.job_id} cannot be had back: {error.strerror or error}") from None

    @property
    def _going(self) -> Path:
        return self.path.with_name(f".{self.path.name}{GOING}")

    @property
    def stop_wish(self) -> Path:
        """A file that is there while the job has been asked to stop and has not ended."""
        return self.path / ".stop"

    def forget_stop(self) -> None:
        """The wish is granted, or there is none; where the disk does not let go of it, it stays."""
        with contextlib.suppress(OSError):
            self.stop_wish.unlink(missing_ok=True)


def _put(path: Path, content: bytes | Path) -> None:
    """Write a file, or take one that is never written again under another name, where the file system has that."""
    if isinstance(content, Path):
        with contextlib.suppress(OSError):
            os.link(content, path)
            return
    with written_atomically(path) as partial, open(partial, "wb", opener=private) as opened:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, opened)
        else:
            opened.write(content)


def _ends_torn(lines: io.FileIO) -> bool:
    """Whether the last line was cut off by a crash: what is appended next must not be glued to it."""
    if lines.seek(0, os.SEEK_END) == 0:
        return False
    lines.seek(-1, os.SEEK_END)
    return lines.read(1) != b"\n"


def make_private_folder(folder: Path) -> None:
    """Make a folder that only this user may enter, where there is none. Raises OSError."""
    if not folder.is_dir():
        with contextlib.suppress(FileExistsError):  # meanwhile; a file in its place is told of by what follows
            folder.mkdir(mode=0o700, parents=True)


def list_jobs(outputs: Path) -> Iterator[JobFolder]:
    """Every job folder under `outputs`, newest first. Other folders are left alone. Raises `OutputError` where it cannot be
    looked into."""
    try:
        names = [name for name in os.listdir(outputs) if JOB_ID.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{outputs} cannot be read: {error.strerror}") from None
    for name in sorted(names, reverse=True):
        if _is_job(os.path.join(outputs, name)):
            yield JobFolder(outputs / name)


def _is_job(folder: str) -> bool:
    """Whether there is a record, or a journal of one that is lost, in whatever state."""
    for name in ("request.json", "events.jsonl"):
        try:
            os.lstat(f"{folder}/{name}")
            return True
        except FileNotFoundError:
            continue
        except OSError as error:  # else somebody else's folder, or no folder
            return error.errno == errno.EIO
    return False


def finish_deleting(outputs: Path) -> None:
    """Remove what is left of jobs whose deletion was cut off."""
    for path in outputs.glob(f".*{GOING}"):
        shutil.rmtree(path, ignore_errors=True)


def find_job(outputs: Path, job_id: object) -> JobFolder:
    """The folder of `job_id`; raises `RequestError` for a malformed or unknown id."""
    folder = JobFolder(outputs / check_job_id(job_id))
    if not _is_job(str(folder.path)):
        raise RequestError(f"there is no job {folder.job_id} here", "job_id")
    return folder
