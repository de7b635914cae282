"""The page's parts without a browser: owners, words, charts, form, estimate, memory, gallery."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gradio.utils import get_upload_folder

from dualparal.engine.engine import Engine
from dualparal.errors import OutputError, RequestError
from dualparal.events import BlockReady, Queued
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import History
from dualparal.messages import Span
from dualparal.method.grid import Grid
from dualparal.method.rules import plan_of
from dualparal.presets import Limits, Preset, complete
from dualparal.request import AUTO, GenerationRequest, Settings
from dualparal.ui import charts, form, owners, pace, panels, snapshot, words
from dualparal.ui.estimate import Estimate
from dualparal.ui.live_video import LiveVideo
from dualparal.ui.shelf import Shelf
from dualparal.ui.studio import Studio
from tests.fake_group import GroupLog, Make
from tests.page_server import GRADIO_WARNINGS, ON_PAGE, PAGE_PRESET

pytestmark = GRADIO_WARNINGS
EARLY = PAGE_PRESET.model_copy(update={"schedule": "preview", "context": "cached"})
NASTY = "<script>alert('x')</script> \" onmouseover=1 & {{7*7}}"


@pytest.fixture
def engine(make: Make, group_log: GroupLog) -> Engine:
    group_log.item_s = 0.002
    return make(**ON_PAGE).start()


@pytest.fixture
def studio(engine: Engine) -> Studio:
    other = PAGE_PRESET.model_copy(update={"name": "pocket-wide", "width": 128})
    return Studio(engine, {"pocket-wide": other, "big": Preset(name="big", model="Wan-AI/Big")})


def made(studio: Studio, owner: str = "me", **fields: Any) -> snapshot.Snapshot:
    fields = {"prompt": "a kite", "seconds": 2, "num_inference_steps": 2, **fields}
    begun = studio.submit(GenerationRequest(**fields), owner=owner)
    job = studio.engine.job(begun.job_id)
    assert job is not None
    for _ in job.events(timeout=60):
        pass
    return studio.find(begun.job_id, owner)


def gallery_of(studio: Studio, owner: str, page: int = 0, search: str = "", wanted: str = "All") -> tuple[str, int]:
    """A page of the gallery as `owner` sees it."""
    return Shelf(studio, lambda *_: owner, "").render(owner, page, search, wanted)


# Owners


def test_owner_is_a_digest_and_a_login_wins() -> None:
    token = owners.new_token()
    assert len(token) >= 32 and token not in owners.owner_of(token)
    assert owners.owner_of(token) == owners.owner_of(token) != owners.owner_of(owners.new_token())
    assert owners.owner_of(token, "ada") == "user:ada"
    assert owners.owner_of(None) == owners.owner_of("") == owners.owner_of(5) == ""


def test_who_may_touch() -> None:
    assert owners.may_touch("anyone", "") and owners.may_touch("a", "a")
    assert not owners.may_touch("", "a") and not owners.may_touch("b", "a")


def test_a_foreign_job_is_as_unknown_as_one_that_never_was(studio: Studio) -> None:
    found = made(studio)
    for act in (studio.find, studio.cancel, studio.delete):
        with pytest.raises(RequestError, match=f"there is no job {found.job_id}"):
            act(found.job_id, "someone")
        with pytest.raises(RequestError, match="there is no job abcdef-00"):
            act("abcdef-00", "someone")
    assert list(studio.past("someone")) == [] and [one.job_id for one in studio.past("me")] == [found.job_id]
    assert list(studio.past("")) == []


# Jobs of an earlier run


def test_a_deleted_job_is_unknown_at_once(studio: Studio) -> None:
    found = made(studio)
    assert studio.engine.job(found.job_id) is not None and found.video is not None
    studio.delete(found.job_id, "me")
    for ask in (studio.find, studio.compare, studio.resume):
        with pytest.raises(RequestError, match="there is no job"):
            ask(found.job_id, "me")


def test_a_finished_job_looks_the_same_from_disk(studio: Studio) -> None:
    live = made(studio)
    stored = snapshot.of_folder(live.folder)
    for name in ("job_id", "request", "owner", "state", "final", "blocks", "num_frames", "timings", "video"):
        assert getattr(stored, name) == getattr(live, name), name
    assert len(stored.spans) == len(live.spans) > 0


def test_a_job_cut_off_by_a_crash_is_interrupted_and_can_be_deleted(studio: Studio) -> None:
    request = studio.resolve(GenerationRequest(prompt="cut off", seconds=2))
    folder = JobFolder.create(studio.outputs, "abcdef-123456", request, owner="me")
    folder.append(BlockReady(job_id="abcdef-123456", block=0, path="gone", first_frame=0, num_frames=5, duration_s=0.3))
    with (folder.path / "events.jsonl").open("a") as lines:
        lines.write('{"event": "BlockRe')
    (folder.path / "timeline.json").write_text('[{"stage": 5')
    found = studio.find("abcdef-123456", "me")
    assert (found.state, found.num_frames, found.spans, found.video) == ("interrupted", 5, (), None)
    assert "Interrupted" in panels.board(found, studio)
    studio.delete("abcdef-123456", "me")
    assert not folder.path.exists()


def test_a_cut_prompt_is_told(studio: Studio) -> None:
    found = made(studio)
    assert found.started and 'class="notice"' not in panels.board(found, studio)
    started = dataclasses.replace(found.started, notice=f"{NASTY} is left out")
    reported = dataclasses.replace(found, history=dataclasses.replace(found.history, started=started))
    board = panels.board(reported, studio)
    assert 'class="notice"' in board and "is left out" in board and "<script" not in board


def test_a_damaged_folder_does_not_break_the_gallery(studio: Studio) -> None:
    good = made(studio)
    for name, text in (("abcdef-000001", "{"), ("abcdef-000002", "[]"), ("abcdef-000003", '{"owner": "me"}'),
                       ("abcdef-000004", json.dumps({"owner": "me", "request": {"prompt": "x", "steps": 5}}))):  # fmt: skip
        (studio.outputs / name).mkdir()
        (studio.outputs / name / "request.json").write_text(text)
    shown, _ = gallery_of(studio, "me", 0)
    cards = re.findall(r'<li data-job="([^"]+)"', shown)
    assert sorted(cards) == sorted([good.job_id, "abcdef-000003", "abcdef-000004"]), "the owner's own, which can be deleted"
    assert gallery_of(studio, "me", 10**6) == (shown, 0), "a page far past the end is the last, at once"


# Presets


def test_presets_of_another_model_are_refused_with_the_way_out(studio: Studio) -> None:
    assert [preset.name for preset in studio.usable_presets()] == ["pocket", "pocket-wide"]
    assert studio.resolve(GenerationRequest(prompt="x"), "pocket-wide").width == 128
    with pytest.raises(RequestError, match="another model than the one loaded here; use pocket or pocket-wide"):
        studio.preset("big")


def test_each_preset_has_limits_of_its_own(make: Make) -> None:
    small, large = (
        PAGE_PRESET.model_copy(update={"name": name, "limits": Limits(seconds=seconds, num_inference_steps=steps)})
        for name, seconds, steps in (("small", 10, 20), ("large", 100, 80))
    )
    studio = Studio(make(**ON_PAGE | {"preset": small}), {"large": large})
    assert studio.resolve(GenerationRequest(prompt="x", seconds=90, num_inference_steps=70), "large").num_inference_steps == 70
    with pytest.raises(RequestError, match="limit of 20"):
        studio.resolve(GenerationRequest(prompt="x", num_inference_steps=70))
    with pytest.raises(RequestError, match="limit of 80"):
        studio.resolve(GenerationRequest(prompt="x", num_inference_steps=81), "large")


# Form


def form_values(studio: Studio, **changes: Any) -> list[Any]:
    at = form.ranges(studio.engine.preset)
    values = {name: at[name]["value"] for name in at} | {name: getattr(studio.engine.preset, name) for name in form.CHOICES}
    values |= {"prompt": "a kite", "negative_prompt": "", "preset": "pocket", "seed": "", "pace": 0, "stored": None}
    values |= {
        "width": 96,
        "height": 96,
        "start_image": None,
        "continue_video": None,
        "loras": [],
        "continue_from": "",
        "join": True,
    }
    values |= {"is_endless": False, **changes}
    return [values[name] for name in form.NAMES]


def filled(studio: Studio, wanted: Settings, **changes: Any) -> list[Any]:
    """The form's values after "Use settings", some of them changed by hand."""
    updates = dict(zip(form.NAMES, form.fill(studio, wanted.as_request()), strict=True))
    return list(({name: update["value"] for name, update in updates.items()} | changes).values())


def test_form_reads_back_what_it_was_filled_with(studio: Studio) -> None:
    wanted = studio.resolve(
        GenerationRequest(prompt="a boat", seed=2**60 + 1, latents_num=23, num_inference_steps=7, num_cat=0, width=128)
    )
    assert form.read(studio, filled(studio, wanted)) == wanted


def test_a_picture_has_to_be_uploaded_and_to_be_given_again(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="start_image: it has to be uploaded"):
        form.read(studio, form_values(studio, start_image=str(tmp_path / "a.png")))
    upload = Path(get_upload_folder()) / "0" / "a.png"
    wanted = form.read(studio, form_values(studio, start_image=str(upload)))
    assert wanted.start_image == str(upload.resolve())
    updates = form.fill(studio, wanted.as_request(), began_with_picture=True)
    shown = dict(zip(form.NAMES, updates, strict=True))
    assert shown["start_image"]["value"] is None and shown["start_image"]["label"] == form.PICTURE_AGAIN
    again = form.read(studio, filled(studio, wanted))
    assert again == wanted.model_copy(update={"start_image": None})


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pace_goes_from_all_blocks_at_once_to_the_fewest(make: Make, ranks: int) -> None:
    long = Studio(make(**ON_PAGE | {"ranks": ranks, "preset": EARLY}))
    found = [
        form.read(long, form_values(long, pace=place, context="cached", seconds=40.0, num_inference_steps=50))
        for place in range(4)
    ]
    assert [r.schedule for r in found] == ["paper", "preview", "preview", "preview"]
    in_flight = [r.max_in_flight for r in found[1:]]
    assert in_flight == sorted(in_flight, reverse=True)
    # The left end puts more blocks in flight than any other place, because all of them are.
    assert in_flight[0] <= plan_of(found[0]).num_blocks and in_flight[0] > in_flight[-1]
    assert [pace.of_settings(r, Grid(ranks)) for r in found] == [0, 1, 2, 3]


def test_a_slider_left_alone_leaves_the_choice_to_the_preset(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(**ON_PAGE | {"preset": PAGE_PRESET.model_copy(update={"schedule": AUTO, "context": AUTO})})
    studio, start = Studio(engine), pace.of_preset(engine.preset)
    assert engine.preset.schedule == engine.preset.context == AUTO and start == pace.SOONEST
    asked, resolve = [], engine.resolve
    monkeypatch.setattr(engine, "resolve", lambda request, preset: asked.append(request) or resolve(request, preset))
    for place in (start, 0, 1):
        form.read(studio, form_values(studio, pace=place, context=AUTO))
    assert [(one.schedule, one.context) for one in asked] == [(None, AUTO), ("paper", AUTO), ("preview", AUTO)]


def test_the_estimate_says_why_auto_chose(studio: Studio) -> None:
    reported = Estimate(num_frames=5, seconds=0.3, num_blocks=1, num_items=4, chosen="paper with recomputed context: <no room>")
    assert "paper with recomputed context: &lt;no room&gt;" in panels.estimate_line(reported)
    assert "no room" not in panels.estimate_line(dataclasses.replace(reported, chosen=""))
    refused = panels.estimate_line(dataclasses.replace(reported, refusal="too large"))
    assert "too large" in refused and "no room" not in refused


def test_a_schedule_set_by_hand_survives_the_form(studio: Studio) -> None:
    wanted = studio.resolve(
        GenerationRequest(prompt="x", seconds=8, schedule="preview", max_in_flight=7, stagger=2, micro_batches=True)
    )
    assert form.read(studio, filled(studio, wanted)) == wanted


@pytest.mark.parametrize(
    "hidden",
    [
        {"guidance_start": 0.1, "guidance_stop": 0.7},
        {"cache_interval": 3},
        {"cache_interval": 2, "cache_order": 0, "disable_cache_before_step": 1, "disable_cache_after_step": 9},
        {"cache_interval": 1, "cache_order": 2},
    ],
)
def test_what_the_form_does_not_show_survives_it(studio: Studio, hidden: dict[str, Any]) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", seconds=8, **hidden))
    assert wanted.model_dump().items() >= hidden.items()
    assert form.read(studio, filled(studio, wanted)) == wanted


@pytest.mark.parametrize("has_two", [False, True])
def test_every_field_survives_the_form(make: Make, request: pytest.FixtureRequest, has_two: bool) -> None:
    """The model of a studio of its own has a negative prompt, so that an empty one is a choice."""
    preset = PAGE_PRESET.model_copy(update={"negative_prompt": "blurred"})
    fields: dict[str, Any] = {
        "prompt": "y", "negative_prompt": "", "latents_num": 23, "height": 64, "width": 128, "fps": 24,
        "num_inference_steps": 7, "guidance_scale": 3.33, "guidance_start": 0.15, "guidance_stop": 0.8, "flow_shift": 2.718,
        "seed": 2**60 + 1, "num_per_block": 5, "num_cat": 3, "context": "cached",
        "solver": "euler",
    }  # fmt: skip
    schedule = {"schedule": "preview", "max_in_flight": 3, "stagger": 2, "micro_batches": True}
    if has_two:
        fields |= {"guidance_scale_2": 2.22, "boundary_ratio": 0.8765}
    model = request.getfixturevalue("tiny_two") if has_two else "pocket"
    studio = Studio(make(**ON_PAGE | {"preset": preset, "model": model}))
    whole = {"guidance_start": 0.0, "guidance_stop": 1.0}
    for changes in [{}, fields, schedule, fields | schedule, whole, *({name: value} for name, value in fields.items())]:
        wanted = studio.resolve(GenerationRequest(**{"prompt": "x", "seed": 1, **changes}))
        assert form.read(studio, filled(studio, wanted)) == wanted, changes


def test_moving_the_pace_keeps_all_but_the_schedule(studio: Studio) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", seconds=8, fps=24, guidance_start=0.2, schedule="preview", stagger=2))
    paper = {"schedule": "paper", "stagger": 1, "left_context": "latest", "micro_batches": False}
    paper["max_in_flight"] = wanted.num_inference_steps
    assert form.read(studio, filled(studio, wanted, pace=0)) == wanted.model_copy(update=paper)


def test_a_change_leaves_the_rest_of_what_was_stored(studio: Studio) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", negative_prompt="grey", seconds=8, fps=24, cache_interval=3, seed=5))
    assert form.read(studio, filled(studio, wanted, num_cat=0)) == wanted.model_copy(update={"num_cat": 0})
    assert form.read(studio, filled(studio, wanted, prompt="y")) == wanted.model_copy(update={"prompt": "y"})
    assert form.read(studio, filled(studio, wanted, negative_prompt="")).negative_prompt == ""
    assert form.read(studio, filled(studio, wanted, seconds=4.0)).latents_num == 25, "at the stored frames per second"
    assert form.read(studio, filled(studio, wanted, seed="")).seed != 5


def test_what_one_expert_leaves_out_is_the_presets_with_two(make: Make, tiny_two: Path) -> None:
    studio = Studio(make(**ON_PAGE | {"model": tiny_two}))
    stored = complete(GenerationRequest(prompt="x"), PAGE_PRESET)
    assert stored.boundary_ratio is None
    shown = dict(zip(form.NAMES, form.fill(studio, stored.as_request()), strict=True))
    assert shown["boundary_ratio"]["value"] == 0.875, "a slider cannot show nothing"


@pytest.mark.parametrize("latents_num", [1, 2, 3, 17, 400])
def test_every_length_survives_the_slider(studio: Studio, latents_num: int) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", latents_num=latents_num))
    assert form.read(studio, filled(studio, wanted)).latents_num == latents_num
    assert form.read(studio, filled(studio, wanted, stored=None)).latents_num == latents_num, "by the slider alone"


def test_page_and_errors_name_a_setting_alike(studio: Studio) -> None:
    """Who reads `num_cat` in an error finds it on the page, and who reads "context" there finds it in the error."""
    label = form.ADVANCED["num_cat"][0]
    assert "num_cat" in label and "Context" in label and "num_per_block" in form.ADVANCED["num_per_block"][0]
    for changes in ({"num_cat": 9, "num_per_block": 4}, {"num_cat": -1}, {"num_cat": 1.5}):
        with pytest.raises(RequestError) as caught:
            form.read(studio, form_values(studio, **changes))
        assert "num_cat" in str(caught.value) and "context" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words_"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"seed": "12x"}, "whole number"),
        ({"seed": "-1"}, "whole number"),
        ({"seed": "٣"}, "whole number"),
        ({"width": 97}, "96 or 112"),
        ({"num_cat": 1.5}, "num_cat"),
        ({"num_cat": float("nan")}, "num_cat"),
        ({"num_cat": 9, "num_per_block": 4}, "num_cat"),
        ({"preset": "nope"}, "unknown"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seconds": 0}, "the length is 0 s; give more than 0 seconds (0.06 is a single picture)"),
        ({"seconds": -5}, "the length is -5 s"),
        ({"seconds": None}, "the length is empty"),
        ({"num_cat": None}, "Context (num_cat) is empty; give a number"),
        ({"num_inference_steps": None}, "Denoising steps is empty"),
        ({"guidance_start": 0.8, "guidance_stop": 0.2}, "guidance_start=0.8 is after guidance_stop=0.2"),
        ({"pace": 4}, "smoothest to soonest"),
        ({"pace": float("nan")}, "smoothest to soonest"),
        ({"pace": ["paper"]}, "smoothest to soonest"),
        ({"pace": 2, "width": 97}, "96 or 112"),
    ],
)
def test_form_refuses_with_a_sentence(studio: Studio, changes: dict[str, Any], words_: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words_)):
        form.read(studio, form_values(studio, **changes))


# Words and pictures


def test_everything_typed_is_escaped(studio: Studio) -> None:
    found = made(studio, prompt=NASTY)
    page, _ = gallery_of(studio, "me", 0)
    reported = panels.board(found, studio) + panels.result(found, "") + page + panels.estimate_problem(NASTY)
    assert "<script" not in reported and 'onmouseover=1"' not in reported and '" onmouseover' not in reported
    assert "&lt;script&gt;" in reported


def test_the_queue_names_only_ones_own(studio: Studio) -> None:
    mine = studio.submit(GenerationRequest(prompt="private wish, a slow one"), owner="me")
    assert panels.queue(studio, "me", mine.job_id) == "", "the only job is on this tab's board already"
    assert "private wish" in panels.queue(studio, "me") and "Watch" in panels.queue(studio, "me")
    seen = panels.queue(studio, "you")
    assert "private wish" not in seen and mine.job_id not in seen and "Someone else" in seen
    studio.submit(GenerationRequest(prompt="another"), owner="you")
    assert "place 2" in panels.queue(studio, "you")


def test_a_job_that_waits_for_room_says_so(studio: Studio) -> None:
    waiting = dataclasses.replace(made(studio), state="queued", history=History(queued=Queued(job_id="abcdef", position=0)))
    assert panels.headline(waiting, studio)[1].startswith("next in line")
    queued = Queued(job_id="abcdef", position=0, reason="the disk has 0 MB free")
    short = dataclasses.replace(waiting, history=History(queued=queued))
    assert panels.headline(short, studio) == ("Waiting", "the disk has 0 MB free; it starts by itself once there is room")


def test_strip_is_as_wide_as_the_video_and_honest_about_its_blocks(studio: Studio) -> None:
    found = made(studio, seconds=6)
    drawn = charts.strip(found)
    widths = [int(width) for width in re.findall(r"flex-grow:(\d+)", drawn)]
    assert sum(widths) == found.request.num_frames == found.num_frames
    starts = [float(start) for start in re.findall(r'data-from="([\d.]+)"', drawn)]
    assert starts == pytest.approx([block.first_frame / 16 for block in found.blocks], abs=1e-3)
    assert drawn.count('class="block ready"') == len(widths) == len(found.blocks)


def test_timeline_stays_small_and_within_its_box() -> None:
    spans = [Span(f"stage {n % 4}", n * 0.01, n * 0.01 + 0.009, n % 60, n // 60) for n in range(40_000)]
    drawn = charts.timeline(spans)
    assert len(drawn) < 400_000
    ends = [float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert max(ends) <= charts.TIMELINE_WIDTH + 1
    assert charts.timeline([]) == "" and "<script" not in charts.timeline([Span("<script>", 0, 1, 0, 0)])


@pytest.mark.parametrize(
    ("seconds", "reported"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (200, "3 min 20 s"), (1200, "20 min"), (7500, "2 h 05 min")],
)
def test_durations_read_well(seconds: float, reported: str) -> None:
    assert words.duration(seconds) == reported


# Estimates


def test_time_is_learnt_from_finished_jobs(make: Make, group_log: GroupLog) -> None:
    """On one rank, which neither waits for others nor is waited for, so that work is in proportion to steps."""
    group_log.item_s = 0.002
    studio = Studio(make(**ON_PAGE | {"ranks": 1}).start())
    asked = GenerationRequest(prompt="x", seconds=4, num_inference_steps=20)
    assert studio.estimate(asked).time_s is None
    for _ in range(3):
        made(studio, seconds=4, num_inference_steps=10)
    studio.estimator._learnt_at = -1e9
    one, two = (studio.estimate(asked.model_copy(update={"num_inference_steps": steps})) for steps in (20, 40))
    pace = studio.estimator.pace()
    assert pace and one.time_s and two.time_s
    assert two.time_s - pace.besides_s == pytest.approx(2 * (one.time_s - pace.besides_s), rel=0.01)
    assert (one.num_frames, one.num_blocks, one.num_items) == (65, 4, 80)
    # Of 20 steps 3 and the last are computed, and every second of the 16 between them.
    skipping = studio.estimate(asked.model_copy(update={"cache_interval": 2}))
    assert skipping.time_s and skipping.time_s - pace.besides_s == pytest.approx(
        (one.time_s - pace.besides_s) * 12 / 20, rel=0.05
    )
    half = studio.estimate(asked.model_copy(update={"guidance_stop": 0.5}))
    assert half.time_s and half.time_s - pace.besides_s == pytest.approx((one.time_s - pace.besides_s) * 0.75, rel=0.02)


def test_a_job_in_line_is_planned_once_however_often_its_wait_is_asked(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is learnt too: three hundred tabs ask, and the plan of a long film takes a good part of a second."""
    planned: list[object] = []
    plan = studio.engine.plan

    def noting(request: Settings, *, is_short: bool = False) -> Any:
        planned.append(request)
        return plan(request, is_short=is_short)

    monkeypatch.setattr(studio.engine, "plan", noting)
    asked = complete(GenerationRequest(prompt="x", seconds=60), studio.engine.preset)
    assert studio.estimator.pace() is None and studio.estimator.time_s(asked) is None
    assert len(planned) == 1
    for _ in range(5):
        studio.estimator.time_s(asked.model_copy(update={"prompt": "y", "seed": 3}))
    assert len(planned) == 1


def test_the_learnt_time_is_that_of_the_video_made(studio: Studio) -> None:
    """Of a video like the one made it is the time that one took, neither twice nor half of it."""
    took = []
    for _ in range(3):
        found = made(studio, seconds=4, num_inference_steps=10)
        assert found.started and found.final
        took.append(found.final.time_s - found.started.time_s)
    studio.estimator._learnt_at = -1e9
    time_s = studio.estimate(GenerationRequest(prompt="x", seconds=4, num_inference_steps=10)).time_s
    assert time_s and 0.7 * min(took) < time_s < 1.4 * max(took)


def test_the_wait_is_told_with_the_time(studio: Studio) -> None:
    estimate = Estimate(num_frames=1, seconds=1, num_blocks=1, num_items=1, time_s=20.0, wait_s=40.0)
    assert "about <b>20 s</b> to make" in panels.estimate_line(estimate) and "in about <b>1 min" in panels.estimate_line(
        estimate
    )
    assert "in line" not in panels.estimate_line(dataclasses.replace(estimate, wait_s=0.0))


def test_what_cannot_fit_is_refused_with_the_number(studio: Studio, engine: Engine) -> None:
    asked = GenerationRequest(prompt="x", seconds=4)
    fits = studio.estimate(asked)
    assert fits.bytes_per_rank == engine.plan(asked).bytes_per_rank and fits.refusal is None
    reported = panels.estimate_line(fits)
    assert words.size(fits.bytes_per_rank) in reported and "time known after the first video" in reported
    engine._setup.placement = dataclasses.replace(engine._setup.placement, bytes_per_device=10**8)
    refusal = engine.plan(asked).refusal
    assert refusal and "need 0.2 GB and this host has 0.1 GB" in refusal
    assert f'role="alert">{words.safe(refusal)}' in panels.estimate_line(studio.estimate(asked))
    with pytest.raises(RequestError, match=re.escape(refusal)):
        studio.submit(asked)
    assert not engine.outputs.exists()


def test_an_unwritable_folder_is_told(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    studio.engine.outputs = tmp_path / "file"
    with pytest.raises(OutputError, match="cannot be written"):
        studio.submit(GenerationRequest(prompt="x"))


def test_live_video_writes_no_stub_and_streams_bytes_untouched(studio: Studio) -> None:
    block = made(studio).blocks[0]
    video = LiveVideo(streaming=True, render=False)
    chunk, where = asyncio.run(video.stream_output(block, "a/b/playlist.m3u8", True))
    assert chunk["data"] == Path(block.path).read_bytes() and chunk["duration"] == block.duration_s
    assert where["is_stream"] and where["path"] == "a/b/playlist.m3u8"
    assert not (Path(form.__file__).parent / "live_video.pyi").exists()
