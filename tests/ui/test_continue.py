"""Going on from a finished film on the page and over the API, over fake workers: what the form takes, whose film it may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal import RequestError
from dualparal.files import BEFORE, START_LATENTS
from dualparal.media.metadata import describe
from dualparal.request import GenerationRequest
from dualparal.ui import form, panels
from dualparal.ui.api import Calls
from dualparal.ui.page import Page
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from tests.fake_group import GroupLog, Make
from tests.page_server import ON_PAGE

HTTP: Any = SimpleNamespace(username=None, client=None, session_hash="tab")
OWNER = "someone's own secret"
FILM = {"prompt": "a kite", "seconds": 2, "num_inference_steps": 2, "width": 64, "seed": 3}


@pytest.fixture
def studio(make: Make, group_log: GroupLog, tmp_path: Path) -> Iterator[Studio]:
    yield Studio(make(**ON_PAGE, outputs=tmp_path / "outputs").start())
    group_log.let_go.set()


def made(studio: Studio, **values: Any) -> Snapshot:
    owner = studio.owner_of(OWNER)
    job_id = studio.submit(GenerationRequest(**{**FILM, **values}), owner=owner).job_id
    job = studio.engine.job(job_id)
    assert job is not None
    job.result(30)
    return studio.find(job_id, owner)


def test_continued_on_the_page(studio: Studio) -> None:
    first, owner = made(studio), studio.owner_of(OWNER)
    button = f'data-do="extend" data-id="{first.job_id}"'
    assert button in Page(studio).shelf.render(owner, 0)[0] and button in panels.result(first, "")
    updates = Page(studio)._continue(OWNER, SimpleNamespace(id=first.job_id), HTTP)  # type: ignore[arg-type]
    shown = dict(zip(form.NAMES, updates, strict=True))
    assert shown["continue_from"]["visible"] and shown["continue_from"]["value"] == first.job_id and shown["join"]["value"]
    values = {name: update["value"] for name, update in shown.items()} | {"prompt": "a red kite", "seconds": 1}
    wanted = form.read(studio, list(values.values()))
    assert (wanted.width, wanted.prompt, wanted.num_frames, wanted.join) == (64, "a red kite", 16, True)
    second = studio.submit(wanted, owner=owner)
    job = studio.engine.job(second.job_id)
    assert job is not None and job.result(30).num_frames == 16
    assert (job.folder.path / START_LATENTS).is_file() and (job.folder.path / BEFORE).samefile(first.folder.video)
    assert describe(job.folder.video)["num_frames"] == first.num_frames + 16
    studio.delete(first.job_id, owner)
    assert describe(job.folder.path / BEFORE)["num_frames"] == first.num_frames
    begun_anew = form.read(studio, list((values | {"continue_from": " "}).values()))
    assert begun_anew.continue_from is None and not begun_anew.join


def test_over_the_api(studio: Studio) -> None:
    first, calls = made(studio), Calls(studio)
    fields = {"prompt": "a kite", "latents_num": 2, "continue_from": first.job_id}
    told = calls.submit(HTTP, None, OWNER, **fields)
    assert told["num_frames"] == 8 and told["settings"]["width"] == 64 and told["settings"]["ghost"] == 2
    for stranger in (None, "somebody else's secret"):
        with pytest.raises(RequestError, match=f"there is no job {first.job_id} here"):
            calls.submit(HTTP, None, stranger, **fields)


def test_what_has_left_nothing_is_not_offered(studio: Studio) -> None:
    first = made(studio)
    first.folder.end.unlink()
    assert not first.can_go_on and "extend" not in panels.result(first, "")
    with pytest.raises(RequestError, match="has not kept the end of its video"):
        studio.submit(GenerationRequest(**FILM, continue_from=first.job_id), owner=studio.owner_of(OWNER))
