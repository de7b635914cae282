"""Finished videos side by side: which can be chosen, whose they are, and what is shown of them."""

from __future__ import annotations

from typing import Any

import pytest

from dualparal.errors import RequestError
from dualparal.request import GenerationRequest
from dualparal.ui.side_by_side import SideBySide
from dualparal.ui.studio import Studio
from tests.page_server import GRADIO_WARNINGS
from tests.ui.test_parts import engine, gallery_of, made, studio  # noqa: F401
from tests.ui.test_takes import ASKED, finish

pytestmark = GRADIO_WARNINGS


@pytest.fixture
def side(studio: Studio) -> SideBySide:  # noqa: F811
    return SideBySide(studio, lambda token, _: str(token), "")


def test_two_to_four_in_the_order_they_were_chosen(studio: Studio, side: SideBySide) -> None:  # noqa: F811
    found = [made(studio, prompt=f"kite <{number}>", seed=number) for number in range(5)]
    ids = [one.job_id for one in found]
    for chosen in (ids[:2], ids[3:1:-1], ids[1:5]):
        shown = side.render("me", chosen)
        assert shown.count("<video") == len(chosen)
        places = [shown.index(job_id) for job_id in chosen]
        assert places == sorted(places)
        assert ('class="wipe"' in shown) == (len(chosen) == 2), "only two are wiped"
    assert "kite &lt;1&gt;" in side.render("me", ids[:2]) and "seed 1" in side.render("me", ids[:2])
    for chosen in ([], ids[:1], ids, [ids[0], ids[0]]):
        with pytest.raises(RequestError, match="two to four can be shown"):
            side.render("me", chosen)


def test_only_ones_own_and_only_what_has_a_video(studio: Studio, side: SideBySide) -> None:  # noqa: F811
    mine, also = made(studio), made(studio)
    theirs = made(studio, owner="you")
    (resting, _) = studio.submit_takes(GenerationRequest(**ASKED), 2, owner="me")
    finish(studio, resting.job_id)
    with pytest.raises(RequestError, match="there is no job"):
        side.render("me", [mine.job_id, theirs.job_id])
    with pytest.raises(RequestError, match="has no video"):
        side.render("me", [mine.job_id, resting.job_id])
    studio.put_away(also.job_id, "me")
    with pytest.raises(RequestError, match="there is no job"):
        side.render("me", [mine.job_id, also.job_id])
    with pytest.raises(RequestError, match="a job id is"):
        side.render("me", [mine.job_id, "../../etc"])


def test_plain_wan_is_marked(studio: Studio, side: SideBySide) -> None:  # noqa: F811
    first = made(studio)
    if not studio.can_compare(first):
        pytest.skip("this engine has no plain Wan beside it")
    again = studio.compare(first.job_id, "me")
    job: Any = studio.engine.job(again.job_id)
    for _ in job.events(timeout=60):
        pass
    shown = side.render("me", [first.job_id, again.job_id])
    assert shown.count("plain Wan") == 1 and shown.index("plain Wan") > shown.index(again.job_id)


def test_cards_with_a_video_have_a_box_with_a_name(studio: Studio) -> None:  # noqa: F811
    found = made(studio, prompt='a "kite"', seed=7)
    made(studio, prompt="please fail", seconds=1)
    shown, _ = gallery_of(studio, "me")
    assert shown.count("data-pick") == 1 and f'data-pick="{found.job_id}"' in shown
    assert 'aria-label="Side by side: a &quot;kite&quot;, seed 7"' in shown
