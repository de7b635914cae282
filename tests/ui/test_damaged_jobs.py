"""Files of jobs that cannot be read, or are folders: page, API and command line go on, and the owner can delete."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.cli.main import main
from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.events import BlockReady, Finished, Queued, Started
from dualparal.jobs.facts import all_facts
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.recovery import cut_off
from dualparal.jobs.storage import Storage
from dualparal.request import GenerationRequest
from dualparal.ui import owners, panels
from dualparal.ui.api import Calls
from dualparal.ui.studio import Studio
from tests.fake_group import Make
from tests.page_server import ON_PAGE
from tests.ui.test_parts import gallery_of

TOKEN, JOB = "a secret of mine", "abcdef-123456"
OWNER = owners.owner_of(TOKEN)
FILES = ("request.json", "events.jsonl", "timeline.json", "trace.json", "video.mp4", "poster.jpg", "block_0000.ts", ".stop",
         "state/sweep.safetensors", "state", "frames")  # fmt: skip


@pytest.fixture
def studio(make: Make) -> Studio:
    return Studio(make(**ON_PAGE).start())


def a_job(studio: Studio, *, is_finished: bool, owner: str = OWNER) -> JobFolder:
    """One of an earlier run, with every file that a job may have."""
    request = studio.resolve(GenerationRequest(prompt="a fox", seconds=2))
    folder = JobFolder.create(studio.outputs, JOB, request, owner=owner, model="pocket")
    (folder.path / "state").mkdir()
    for name in FILES[2:9]:
        (folder.path / name).write_bytes(b"G" * 188)
    (folder.path / "timeline.json").write_text("[]")
    (folder.path / ".stop").unlink()
    folder.append(Queued(job_id=JOB, position=0, owner=owner))
    folder.append(Started(job_id=JOB, num_blocks=1, num_items=4, num_frames=9))
    folder.append(BlockReady(job_id=JOB, block=0, path="block_0000.ts", first_frame=0, num_frames=9, duration_s=0.5))
    if is_finished:
        folder.append(Finished(job_id=JOB, path="video.mp4", num_frames=9, timings={}))
    return folder


@contextmanager
def unreadable(folder: JobFolder, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk answers EIO to whoever opens or asks for the file."""
    path = str(folder.path / name)

    def fail(real: Any) -> Any:
        def call(file: Any, *given: Any, **named: Any) -> Any:
            if isinstance(file, (str, os.PathLike)) and (os.fspath(file) == path or os.fspath(file).startswith(f"{path}/")):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return real(file, *given, **named)

        return call

    with monkeypatch.context() as patch:
        for module, names in ((builtins, ("open",)), (io, ("open",)), (os, ("open", "stat", "lstat"))):
            for one in names:
                patch.setattr(module, one, fail(getattr(module, one)))
        yield


def look_everywhere(studio: Studio, folder: JobFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """What page, API, command line, start and storage do with the folder; whatever it is, it is one of our sentences."""
    http: Any = SimpleNamespace(username=None, client=None)
    calls = Calls(studio)
    shown, _ = gallery_of(studio, OWNER, 0)
    assert JOB in re.findall(r'<li data-job="([^"]+)"', shown), "its owner does not see it"
    assert "Someone" not in gallery_of(studio, "another", 0)[0]
    for ask in (calls.status, calls.result):
        with pytest.raises(RequestError, match="there is no job"):
            ask(http, JOB, "another secret")
        try:
            ask(http, JOB, TOKEN)
        except DualParalError as error:
            assert "\n" not in str(error)
    try:
        found = studio.find(JOB, OWNER)
        panels.board(found, studio)
        panels.result(found, "", studio.can_resume(found))
    except OutputError as error:
        assert "\n" not in str(error)
    list(all_facts(studio.outputs))
    assert main(["jobs", "--outputs", str(studio.outputs)]) == 0
    assert "Traceback" not in "".join(capsys.readouterr())
    list(cut_off(studio.outputs))
    studio.estimator.pace()
    try:
        Storage(studio.outputs, 1).make_room(studio.resolve(GenerationRequest(prompt="x", seconds=1)))
    except OutputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("fault", ["a folder", "EIO", "missing", "empty", "a loop"])
@pytest.mark.parametrize("name", FILES)
def test_each_file(
    studio: Studio,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    fault: str,
    is_finished: bool,
) -> None:
    folder = a_job(studio, is_finished=is_finished)
    path = folder.path / name
    if fault != "EIO":
        if path.is_dir():
            path.rename(folder.path / "aside")
        path.unlink(missing_ok=True)
        if fault == "a folder":
            path.mkdir()
            (path / "inside").touch()
        elif fault == "empty":
            path.touch()
        elif fault == "a loop":
            path.symlink_to(path.name)
        look_everywhere(studio, folder, capsys)
    else:
        with unreadable(folder, name, monkeypatch):
            look_everywhere(studio, folder, capsys)
    http: Any = SimpleNamespace(username=None, client=None)
    assert Calls(studio).delete(http, JOB, TOKEN)["job_id"] == JOB
    assert not folder.path.exists()


def test_bits_of_a_record(studio: Studio) -> None:
    """A flipped bit anywhere in it is found, and costs the owner nothing but the job."""
    folder = a_job(studio, is_finished=True)
    record = folder.path / "request.json"
    whole = record.read_bytes()
    expected, flipped = folder.record(), 0
    for place in range(0, len(whole), 7):
        record.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = folder.record()
        except OutputError:
            flipped += 1
            assert folder.owner() == OWNER
        else:
            assert {key: found[key] for key in expected} == expected, "other settings without a word"
    assert flipped > 50
    record.write_bytes(whole.replace(b'"a fox"', b'"a cat"'))
    with pytest.raises(OutputError, match="its checksum does not fit"):
        studio.find(JOB, OWNER)
    with pytest.raises(RequestError, match="there is no job"):
        studio.delete(JOB, "another")
    card, _ = gallery_of(studio, OWNER, 0)
    assert "A video whose record is damaged" in card and 'data-do="remove"' in card
    assert studio.delete(JOB, OWNER) is None and not folder.path.exists()


def test_a_record_by_hand_or_of_an_older_version_needs_no_checksum(studio: Studio) -> None:
    folder = a_job(studio, is_finished=True)
    (folder.path / "request.json").write_text(json.dumps(folder.record()))
    assert studio.find(JOB, OWNER).request.prompt == "a fox"


def test_lines_of_a_journal(studio: Studio) -> None:
    """What changed is left out, never believed."""
    folder = a_job(studio, is_finished=True)
    journal, events = folder.path / "events.jsonl", folder.events()
    whole = journal.read_bytes()
    for place in range(len(whole)):
        journal.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert all(event in events for event in folder.events()), whole[place - 20 : place + 20]


def test_a_job_that_nobody_can_be_found_to_own_is_the_operators(studio: Studio) -> None:
    folder = a_job(studio, is_finished=True, owner="")
    (folder.path / "request.json").write_text("{")
    with pytest.raises(RequestError, match="there is no job"):
        studio.delete(JOB, OWNER)
    assert studio.delete(JOB, owners.OPERATOR) is None and not folder.path.exists()
