"""The gallery: what is found, named, starred, deleted and had back, and whose it is."""

from __future__ import annotations

import zipfile
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.errors import RequestError
from dualparal.jobs.bin import Bin
from dualparal.jobs.folder import finish_deleting
from dualparal.jobs.notes import read_notes
from dualparal.media.exports import frames_zip, without_settings
from dualparal.media.metadata import describe, read_settings
from dualparal.request import GenerationRequest
from dualparal.ui import panels
from dualparal.ui.gallery import PER_PAGE
from dualparal.ui.shelf import Shelf
from dualparal.ui.studio import Studio
from tests.conftest import wait_until
from tests.page_server import GRADIO_WARNINGS
from tests.ui.test_parts import engine, gallery_of, made, studio  # noqa: F401
from tests.ui.test_takes import ASKED, finish

pytestmark = GRADIO_WARNINGS


def prompts(shown: str) -> list[str]:
    return [part.split('"')[0] for part in shown.split('aria-label="Show: ')[1:]]


def test_search_looks_at_prompt_name_and_seed(studio: Studio) -> None:  # noqa: F811
    kite = made(studio, prompt="A red kite", seed=4711)
    made(studio, prompt="a blue boat", seed=12)
    studio.note(kite.job_id, "me", name="Opening  shot <b>")
    for search in ("KITE", "red a", "4711", "opening", kite.job_id):
        shown, _ = gallery_of(studio, "me", 0, search)
        assert prompts(shown) == ["Opening shot &lt;b&gt;"] and "1 of 2" in shown, search
    assert prompts(gallery_of(studio, "me", 0, "boat kite")[0]) == []
    assert "Nothing here is like that" in gallery_of(studio, "me", 0, "no such thing")[0]
    assert prompts(gallery_of(studio, "you", 0, "kite")[0]) == []


def test_stars_and_filters(studio: Studio) -> None:  # noqa: F811
    first = made(studio, prompt="one")
    made(studio, prompt="please fail", seconds=8)
    assert studio.note(first.job_id, "me").is_starred
    assert prompts(gallery_of(studio, "me", 0, "", "Starred")[0]) == ["one"]
    assert prompts(gallery_of(studio, "me", 0, "", "Finished")[0]) == ["one"]
    assert "please fail" in gallery_of(studio, "me", 0, "", "Not finished")[0]
    assert not studio.note(first.job_id, "me").is_starred
    assert prompts(gallery_of(studio, "me", 0, "", "Starred")[0]) == []
    with pytest.raises(RequestError, match="there is no job"):
        studio.note(first.job_id, "you", name="mine")
    assert studio.readable(first.folder) is not None and read_notes(first.folder).name == ""


def test_a_failed_job_is_a_line_and_can_be_made_again(studio: Studio) -> None:  # noqa: F811
    failed = made(studio, prompt="please fail", seconds=1, seed=3)
    assert failed.state == "failed"
    assert '<li class="line"' in gallery_of(studio, "me")[0] and "Make it again" in gallery_of(studio, "me")[0]
    again = studio.again(failed.job_id, "me")
    assert again.job_id != failed.job_id and again.request == failed.request
    with pytest.raises(RequestError, match="there is no job"):
        studio.again(failed.job_id, "you")


def test_a_deleted_job_can_be_had_back_for_a_while(studio: Studio) -> None:  # noqa: F811
    found = made(studio, prompt="a kite")
    studio.put_away(found.job_id, "me")
    assert not found.folder.path.exists() and "Undo" in gallery_of(studio, "me")[0]
    assert "Undo" not in gallery_of(studio, "you")[0]
    with pytest.raises(RequestError, match="there is no job"):
        studio.find(found.job_id, "me")
    with pytest.raises(RequestError, match="for good"):
        studio.bin.take_back(found.job_id, "you")
    studio.bin.take_back(found.job_id, "me")
    assert studio.find(found.job_id, "me").video == found.video
    assert prompts(gallery_of(studio, "me")[0]) == ["a kite"] and "Undo" not in gallery_of(studio, "me")[0]


def test_then_it_is_gone_for_good(studio: Studio) -> None:  # noqa: F811
    first, second = made(studio), made(studio)
    studio.bin = Bin(keep_s=0.01)
    studio.put_away(first.job_id, "me")
    assert wait_until(lambda: not list(studio.outputs.glob(".*.going")))
    with pytest.raises(RequestError, match="for good"):
        studio.bin.take_back(first.job_id, "me")
    studio.bin = Bin(keep_s=3600)
    studio.put_away(second.job_id, "me")
    finish_deleting(studio.outputs)  # as the next start does
    assert not list(studio.outputs.glob(".*.going"))


def test_files_are_called_after_the_prompt(studio: Studio) -> None:  # noqa: F811
    found = made(studio, prompt="A kite / “über” <Berge>! " + "x" * 300, seed=5)
    name = panels.name_of(found)
    assert name.startswith("a-kite-über-berge-xxx") and name.endswith("-seed5") and len(name) < 80
    assert f'download="{name}.mp4"' in panels.result(found, "")
    assert panels.name_of(made(studio, prompt="…", seed=5)) == "dualparal-seed5"
    studio.note(found.job_id, "me", name="Take one")
    assert panels.name_of(found) == "take-one-seed5"


def test_frames_and_a_copy_that_tells_nothing(studio: Studio) -> None:  # noqa: F811
    found = made(studio, prompt="a secret kite", seconds=1)
    assert found.video is not None and read_settings(found.video).prompt == "a secret kite"
    packed = frames_zip(found.video, found.folder.path / "frames.zip")
    with zipfile.ZipFile(packed) as opened:
        assert len(opened.namelist()) == found.num_frames and opened.namelist()[0] == "frame_00001.png"
        assert opened.read("frame_00001.png").startswith(b"\x89PNG")
    plain = without_settings(found.video, found.folder.path / "plain.mp4")
    assert b"secret" not in plain.read_bytes() and b"secret" in found.video.read_bytes()
    with pytest.raises(RequestError):
        read_settings(plain)
    assert describe(found.video)
    assert not list(found.folder.path.glob(".*part")) and not list(found.folder.path.glob(".frames*"))


def test_a_page_reads_only_its_own_cards(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """However many there are: with the 500th video a page of the gallery costs what it did with the fifth."""
    for number in range(PER_PAGE + 3):
        made(studio, prompt=f"video {number}", seconds=0.3, num_inference_steps=1)
    asked: list[Any] = []
    real = studio.readable

    def readable(folder: Any) -> Any:
        asked.append(folder)
        return real(folder)

    monkeypatch.setattr(studio, "readable", readable)
    shown, _ = gallery_of(studio, "me")
    assert len(asked) == PER_PAGE == len(prompts(shown)) and f"<span>{PER_PAGE + 3}</span>" in shown


def test_takes_are_one_card(studio: Studio) -> None:  # noqa: F811
    made(studio, prompt="before")
    takes = [take.job_id for take in studio.submit_takes(GenerationRequest(**ASKED | {"seed": 7}), 3, owner="me")]
    for job_id in takes:
        finish(studio, job_id)
    made(studio, prompt="after")
    shown, _ = gallery_of(studio, "me")
    cards = shown.split("<li ")[1:]
    assert len(cards) == 3 and "<span>3</span>" in shown
    assert "after" in cards[0] and "before" in cards[2], "where it was made"
    assert cards[1].count('class="poster"') == 3 and "3 takes · 3 at rest · seeds 7–9" in cards[1]
    assert 'aria-label="Show take 2, seed 8: a kite"' in cards[1] and "data-pick" not in cards[1]
    studio.resume(takes[1], "me")
    finish(studio, takes[1])
    card = gallery_of(studio, "me")[0].split("<li ")[2]
    assert "1 finished · 2 at rest" in card and f'data-pick="{takes[1]}"' in card and f'data-job="{takes[1]}"' in card
    found = gallery_of(studio, "me", 0, "8")[0].split("<li ")[1:]
    assert len(found) == 1 and "take 2 of 3" in found[0], "only one of them has this seed"


def test_takes_are_deleted_and_had_back_together(studio: Studio) -> None:  # noqa: F811
    takes = [take.job_id for take in studio.submit_takes(GenerationRequest(**ASKED), 2, owner="me")]
    for job_id in takes:
        finish(studio, job_id)
    other = made(studio)
    shelf, http = Shelf(studio, lambda *_: "me", ""), SimpleNamespace(username=None)
    studio.put_away(other.job_id, "me")
    ids = ",".join(takes)
    assert f'data-do="remove" data-id="{ids}"' in gallery_of(studio, "me")[0]
    told = shelf._delete("", 0, "", "All", takes[1], SimpleNamespace(id=ids), http)  # type: ignore[arg-type]
    assert "Undo" in told[0] and f'data-id="{ids}"' in told[0] and told[2] == "", "one of them was on the stage"
    assert [folder.job_id for folder in studio.past("me")] == []
    shelf._undo("", 0, "", "All", SimpleNamespace(id=ids), http)  # type: ignore[arg-type]
    assert sorted(folder.job_id for folder in studio.past("me")) == sorted(takes)
    assert f'data-id="{other.job_id}"' in gallery_of(studio, "me")[0], "what was deleted before can still be had back"
