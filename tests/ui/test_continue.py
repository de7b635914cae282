"""Going on from a finished film on the page and over the API, over fake workers: what the form takes, whose film it may be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio.utils import get_upload_folder

from dualparal import RequestError
from dualparal.files import BEFORE, START_CLIP, START_LATENTS
from dualparal.media.metadata import describe
from dualparal.request import GenerationRequest
from dualparal.ui import form, panels
from dualparal.ui.api import Calls
from dualparal.ui.page import Page
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from tests.fake_group import GroupLog, Make
from tests.media.test_film import H264
from tests.media.test_film import made as made_video
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


@pytest.fixture
def upload() -> Iterator[Path]:
    """A video of 96 x 64 at 8 frames a second among the uploads."""
    folder = Path(get_upload_folder()) / "continue"
    folder.mkdir(parents=True, exist_ok=True)
    yield made_video(folder / "clip.mp4", *H264, fps=8)
    shutil.rmtree(folder)


def test_from_an_uploaded_video(studio: Studio, upload: Path) -> None:
    owner = studio.owner_of(OWNER)
    values = {**form.defaults(studio.engine.preset), "start_image": None, "continue_video": str(upload), "stored": None}
    values |= {"prompt": "a kite", "seconds": 1, "width": 64, "height": 64, "seed": "3"}
    wanted = form.read(studio, [values[name] for name in form.NAMES])
    assert wanted.continue_from == str(upload) and not wanted.join
    found = studio.submit(wanted, owner=owner)
    job = studio.engine.job(found.job_id)
    assert job is not None and (job.folder.path / START_CLIP).is_file()
    said = "96 x 64 pixels were scaled and cropped to 64 x 64, and 8 frames a second became 16"
    assert said in job.request.fitted and said in panels.board(studio.find(found.job_id, owner), studio)
    job.result(30)
    again = studio.again(found.job_id, owner)
    assert again.request.continue_from == job.request.continue_from and again.request.fitted == "", "from what was kept"
    shown = dict(zip(form.NAMES, Page(studio)._reuse(OWNER, SimpleNamespace(id=found.job_id), HTTP), strict=True))  # type: ignore[arg-type]
    assert shown["continue_video"] == {**shown["continue_video"], "label": form.VIDEO_AGAIN, "value": None}
    first = made(studio)
    with pytest.raises(RequestError, match="a video made here and from a file; empty one of them"):
        form.read(studio, [{**values, "continue_from": first.job_id}[name] for name in form.NAMES])


def test_an_uploaded_video_over_the_api(studio: Studio, upload: Path, tmp_path: Path) -> None:
    calls = Calls(studio)
    told = calls.submit(HTTP, None, OWNER, prompt="a kite", latents_num=2, continue_video={"path": str(upload)})
    assert told["num_frames"] == 8 and told["settings"]["fitted"]
    outside = made_video(tmp_path / "clip.mp4", *H264)
    with pytest.raises(RequestError, match="continue_video: it has to be uploaded"):
        calls.submit(HTTP, None, OWNER, prompt="a kite", continue_video={"path": str(outside)})
    for named in (str(outside), "clip.mp4", "/etc/passwd", f"{upload.parent}/../../etc/passwd"):
        with pytest.raises(RequestError, match="a job id is 6 to 36"):
            calls.submit(HTTP, None, OWNER, prompt="a kite", continue_from=named)
    with pytest.raises(RequestError, match="give one of them"):
        calls.submit(HTTP, None, OWNER, prompt="a kite", continue_from="abcdef", continue_video={"path": str(upload)})
