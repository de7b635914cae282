"""Whatever is refused, and whatever goes wrong: a visitor reads no folder of the server."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal import errors
from dualparal.engine.engine import Engine
from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.events import Failed, Queued
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import History
from dualparal.media.writer import write_error
from dualparal.planning.calibration import cache_folder
from dualparal.presets import PACKAGE
from dualparal.request import GenerationRequest
from dualparal.ui import panels
from dualparal.ui.api import Calls, _as_gradio_error
from dualparal.ui.page import one_sentence
from dualparal.ui.serve import launch
from dualparal.ui.studio import Studio
from dualparal.ui.words import without_paths
from tests.fake_group import Make
from tests.page_server import ON_PAGE

HTTP: Any = SimpleNamespace(username=None, client=None)
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DualParalError)]


@pytest.fixture(params=["outputs", "my videos (1)", "Vidéos; neu, 'alt'"])
def studio(make: Make, tmp_path: Path, request: pytest.FixtureRequest) -> Studio:
    engine = make(**ON_PAGE, outputs=tmp_path / request.param).start()
    engine.checkpoint = SimpleNamespace(folder=tmp_path / "models" / "my model")  # type: ignore[assignment]
    return Studio(engine)


def sentences(studio: Studio) -> list[str]:
    """As our errors are worded, with every folder that could be in them."""
    model, job = studio.engine.checkpoint.folder, studio.outputs / "abcdef-123456"
    paths = [
        job / "block_0000.ts", job, studio.outputs, cache_folder() / "calibration.json", cache_folder(), model,
        PACKAGE / "ui" / "page.py", model / "vae" / "config.json", Path("/tmp/dualparal-ring-x/meet"), Path("/etc/passwd"),
    ]  # fmt: skip
    reported = []
    for path in paths:
        reported += [f"{path} cannot be written: No space left on device", f"there is no {path}; take another", f"see ({path})"]
        reported += [f"{path}: is damaged", f"made with '{path}' and \"{path}\"", str(write_error(path, OSError(28, "full")))]
    return reported


def shows_a_folder(studio: Studio, text: str) -> list[str]:
    """Which of the server's folders `text` tells of, in whole or by the names on the way to them."""
    found = (studio.outputs, studio.outputs.parent, cache_folder(), PACKAGE.parent, studio.engine.checkpoint.folder)
    hidden = [*map(str, found), "/tmp", "/etc"]
    return [folder for folder in hidden if folder in text or f"{Path(folder).parent.name}/{Path(folder).name}" in text]


def test_every_error_on_every_way(studio: Studio) -> None:
    for reported in sentences(studio):
        for kind in KINDS:
            for text in (
                str(one_sentence(kind(reported))),
                str(_as_gradio_error(kind(reported))),
                without_paths(kind(reported)),
            ):
                assert not shows_a_folder(studio, text), text
                assert text.strip(" '")


def test_jobs_that_failed_or_wait_and_an_engine_that_failed(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    request = studio.resolve(GenerationRequest(prompt="x", seconds=1))
    folder = JobFolder.create(studio.outputs, "abcdef-123456", request, owner="")
    folder.append(Queued(job_id="abcdef-123456", position=0))
    for reported in sentences(studio):
        folder.append(Failed(job_id="abcdef-123456", kind="OutputError", message=reported))
        found = studio.find("abcdef-123456")
        waiting = dataclasses.replace(
            found, state="queued", history=History(queued=Queued(job_id=found.job_id, position=0, reason=reported))
        )
        monkeypatch.setattr(Engine, "state", "failed")
        monkeypatch.setattr(Engine, "error", reported)
        status = Calls(studio).status(HTTP, "abcdef-123456")
        shown = [panels.board(found, studio), panels.board(waiting, studio), panels.engine_chip(studio)]
        for text in (*shown, status["error"], status["message"]):
            assert not shows_a_folder(studio, text), text


def test_damaged_records_are_told_without_their_place(studio: Studio) -> None:
    request = studio.resolve(GenerationRequest(prompt="x", seconds=1))
    folder = JobFolder.create(studio.outputs, "abcdef-123456", request, owner="me")
    folder.append(Queued(job_id="abcdef-123456", position=0, owner="me"))
    (folder.path / "request.json").write_text("{")
    with pytest.raises(DualParalError) as caught:
        studio.find("abcdef-123456", "me")
    assert not shows_a_folder(studio, str(one_sentence(caught.value)))
    with pytest.raises(RequestError, match="there is no job"):
        studio.find("abcdef-123456", "another")


def test_a_page_is_not_opened_on_a_folder_that_no_browser_can_name(make: Make, tmp_path: Path) -> None:
    outputs = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(OutputError, match=r"caf\\udce9', is not UTF-8, and no browser") as caught:
        launch(Studio(make(**ON_PAGE, outputs=outputs).start()))
    assert "\n" not in str(caught.value) and str(caught.value).isascii()
