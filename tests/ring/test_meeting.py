"""Ranks of one host meet in a folder that anyone of them removes when the front end dies, at any moment."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dualparal.errors import WorkerFailed
from dualparal.ring import meeting


def test_a_folder_that_is_gone_is_an_error_at_once_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="gone"):
        meeting.enter(str(tmp_path / "gone"), 2)


def test_the_store_is_the_one_that_others_see(tmp_path: Path) -> None:
    meeting.enter(str(tmp_path), 2).set("key", "value")
    assert meeting.enter(str(tmp_path), 2).get("key") == b"value"


def test_nobody_removes_the_folder_while_somebody_enters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "meeting"
    folder.mkdir()
    remover = threading.Thread(target=meeting.remove, args=(str(folder),))
    made = dist.FileStore

    def slow(path: str, ranks: int) -> Any:
        remover.start()
        remover.join(0.5)
        assert folder.is_dir(), "removed while a rank was entering: torch would wait 300 s for it"
        return made(path, ranks)

    monkeypatch.setattr(dist, "FileStore", slow)
    meeting.enter(str(folder), 2)
    remover.join(60)
    assert not folder.exists()


def test_a_folder_that_goes_while_a_rank_waits_for_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "meeting"
    folder.mkdir()
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            meeting.enter(str(folder), 2)
        except WorkerFailed as error:
            errors.append(error)

    entering = threading.Thread(target=enter)
    with meeting._held(str(folder), meeting.fcntl.LOCK_EX):
        entering.start()
        time.sleep(0.3)  # it waits, or comes later: gone either way
        os.rmdir(folder)
    entering.join(60)
    assert len(errors) == 1


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "meeting"
    folder.mkdir()
    meeting.remove(str(folder))
    meeting.remove(str(folder))
    assert not folder.exists()
