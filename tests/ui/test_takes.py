"""Takes on page and API: one row in the queue, one Stop, each at rest after its first look until it is chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.errors import QueueFull, RequestError
from dualparal.events import Cancelled
from dualparal.request import GenerationRequest
from dualparal.ui import panels
from dualparal.ui.api import Calls
from dualparal.ui.studio import Studio
from tests.fake_group import GroupLog
from tests.page_server import GRADIO_WARNINGS
from tests.ui.test_parts import engine, gallery_of, studio  # noqa: F401

pytestmark = GRADIO_WARNINGS
HTTP: Any = SimpleNamespace(username="me", client=None)
ASKED = {"prompt": "a kite", "seconds": 8, "num_inference_steps": 6, "seed": 7}


def finish(studio: Studio, job_id: str) -> None:  # noqa: F811
    job = studio.engine.job(job_id)
    assert job is not None
    for _ in job.events(timeout=60):
        pass


def test_over_the_api(studio: Studio) -> None:  # noqa: F811
    calls = Calls(studio)
    told = calls.submit(HTTP, None, None, takes=3, **ASKED)
    assert len(told["takes"]) == 3 and told["job_id"] == told["takes"][0]
    for number, job_id in enumerate(told["takes"]):
        finish(studio, job_id)
        status = calls.status(HTTP, job_id)
        assert status["is_resting"] and status["state"] == "cancelled" and status["settings"]["seed"] == 7 + number
        assert 0 < max(status["block_steps"]) < 6
    chosen = told["takes"][1]
    calls.resume(HTTP, chosen)
    finish(studio, chosen)
    assert calls.status(HTTP, chosen)["state"] == "finished"
    assert [take.is_resting for take in studio.takes(chosen, "user:me")] == [True, False, True]


def test_one_that_ends_while_they_are_looked_for_is_found(
    studio: Studio,  # noqa: F811
    group_log: GroupLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    takes = studio.submit_takes(GenerationRequest(**{**ASKED, "prompt": "a slow kite"}), 3, owner="me")
    past = studio.past

    def past_and_then_all_end(owner: str) -> Any:
        found = past(owner)
        group_log.let_go.set()
        for take in takes:
            finish(studio, take.job_id)
        return found

    monkeypatch.setattr(studio, "past", past_and_then_all_end)
    assert [take.job_id for take in studio.takes(takes[0].job_id, "me")] == [take.job_id for take in takes]
    for caller in ("operator:", "me"):
        assert len(studio.takes(takes[1].job_id, caller)) == 3


@pytest.mark.parametrize("takes", [0, 5, "2"])
def test_so_many_and_no_more(studio: Studio, takes: Any) -> None:  # noqa: F811
    with pytest.raises(RequestError, match="takes="):
        Calls(studio).submit(HTTP, None, None, takes=takes, **ASKED)
    assert not studio.engine.jobs()


def test_several_videos_are_not_one(studio: Studio) -> None:  # noqa: F811
    with pytest.raises(RequestError, match="takes=2 are several videos"):
        studio.submit(GenerationRequest(takes=2, **ASKED))
    with pytest.raises(RequestError, match="takes=2 are several videos"):
        studio.engine.submit(GenerationRequest(takes=2, **ASKED))
    assert Calls(studio).submit(HTTP, None, None, takes=1, **ASKED)["job_id"]


def test_an_endless_film_has_none(studio: Studio) -> None:  # noqa: F811
    endless = GenerationRequest(prompt="a kite", is_endless=True)
    with pytest.raises(RequestError, match="endless film has no takes"):
        studio.submit_takes(endless, 2, owner="me")


def test_one_row_and_one_stop(studio: Studio, group_log: GroupLog) -> None:  # noqa: F811
    group_log.item_s = 1.0  # none is at its first look when it is stopped
    takes = studio.submit_takes(GenerationRequest(**ASKED), 4, owner="me")
    assert panels.queue(studio, "me").count("<li") == 1 and "4 takes" in panels.queue(studio, "me")
    studio.stop(takes[2].job_id, "me")
    for take in takes:
        finish(studio, take.job_id)
    finals = [studio.find(take.job_id, "me").final for take in takes]
    assert all(isinstance(final, Cancelled) and not final.is_resting for final in finals)
    shown, _ = gallery_of(studio, "me")
    assert shown.count("<li") == 1 and "4 takes" in shown and "at rest" not in shown


def test_all_or_none(make: Any) -> None:
    from tests.page_server import ON_PAGE

    studio = Studio(make(**ON_PAGE, max_per_owner=2).start())  # noqa: F811
    with pytest.raises(QueueFull, match="most one person may have"):
        studio.submit_takes(GenerationRequest(**ASKED), 3, owner="me")
    assert not [job for job in studio.engine.jobs() if not job.is_stopping]
