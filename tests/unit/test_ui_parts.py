"""The page's parts without a browser: owners, words, charts, form, estimate, memory, gallery."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.core.rules import plan_of
from dualparal.errors import OutputError, RequestError
from dualparal.events import BlockReady
from dualparal.presets import Preset
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.journal import JobFolder
from dualparal.ui import charts, form, gallery, owners, pace, panels, snapshot, words
from dualparal.ui.live_video import LiveVideo
from dualparal.ui.snapshot import Span
from dualparal.ui.studio import Studio
from tests.fakes import FAKE_PRESET, FakeEngine
from tests.page_server import GRADIO_WARNINGS

pytestmark = GRADIO_WARNINGS
NASTY = "<script>alert('x')</script> \" onmouseover=1 & {{7*7}}"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with FakeEngine(outputs=tmp_path, item_s=0.002) as made:
        yield made


@pytest.fixture
def studio(engine: FakeEngine) -> Studio:
    other = FAKE_PRESET.model_copy(update={"name": "pocket-wide", "width": 128})
    return Studio(engine, {"pocket-wide": other, "big": Preset(name="big", model="Wan-AI/Big")})  # type: ignore[arg-type]


def made(studio: Studio, owner: str = "me", **fields: Any) -> snapshot.Snapshot:
    fields = {"prompt": "a kite", "seconds": 2, "num_inference_steps": 2, **fields}
    begun = studio.submit(GenerationRequest(**fields), owner=owner)
    job = studio.engine.job(begun.job_id)
    assert job is not None
    for _ in job.events(timeout=60):
        pass
    return studio.find(begun.job_id, owner)


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


def test_a_finished_job_looks_the_same_from_disk(studio: Studio) -> None:
    live = made(studio)
    stored = snapshot.of_folder(live.folder)
    for name in ("job_id", "request", "owner", "state", "final", "blocks", "num_frames", "timings", "video"):
        assert getattr(stored, name) == getattr(live, name), name
    assert len(stored.spans) == len(live.spans) > 0


def test_a_job_cut_off_by_a_crash_is_interrupted_and_can_be_deleted(studio: Studio, tmp_path: Path) -> None:
    request = studio.resolve(GenerationRequest(prompt="cut off", seconds=2))
    folder = JobFolder.create(tmp_path, "abcdef-123456", request, owner="me")
    folder.append(BlockReady(job_id="abcdef-123456", block=0, path="gone", first_frame=0, num_frames=5, duration_s=0.3))
    with (folder.path / "events.jsonl").open("a") as lines:
        lines.write('{"event": "BlockRe')
    (folder.path / "timeline.json").write_text('[{"stage": 5')
    found = studio.find("abcdef-123456", "me")
    assert (found.state, found.num_frames, found.spans, found.video) == ("interrupted", 5, (), None)
    assert "Interrupted" in panels.board(found, studio)
    studio.delete("abcdef-123456", "me")
    assert not folder.path.exists()


def test_a_damaged_folder_does_not_break_the_gallery(studio: Studio, tmp_path: Path) -> None:
    good = made(studio)
    for name, text in (("abcdef-000001", "{"), ("abcdef-000002", "[]"), ("abcdef-000003", '{"owner": "me"}'),
                       ("abcdef-000004", json.dumps({"owner": "me", "request": {"prompt": "x", "steps": 5}}))):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "request.json").write_text(text)
    assert [one.job_id for one in studio.past("me")] == [good.job_id]


# Presets


def test_presets_of_another_model_are_refused_with_the_way_out(studio: Studio) -> None:
    assert [preset.name for preset in studio.usable_presets()] == ["pocket", "pocket-wide"]
    assert studio.resolve(GenerationRequest(prompt="x"), "pocket-wide").width == 128
    with pytest.raises(RequestError, match="another model than the one loaded here; use pocket or pocket-wide"):
        studio.preset("big")


# Form


def form_values(studio: Studio, **changes: Any) -> list[Any]:
    at = form.ranges(studio.engine.preset)
    values = {name: at[name]["value"] for name in at}
    values |= {"prompt": "a kite", "negative_prompt": "", "preset": "pocket", "seed": "", "pace": 0, "rules": None}
    values |= {"context": "recomputed", "width": 96, "height": 96, **changes}
    return [values[name] for name in form.NAMES]


def test_form_reads_back_what_it_was_filled_with(studio: Studio) -> None:
    wanted = studio.resolve(
        GenerationRequest(prompt="a boat", seed=2**60 + 1, latents_num=23, num_inference_steps=7, num_cat=0, width=128)
    )
    values = [update["value"] for update in form.fill(studio, wanted)]
    request, preset_name = form.read(studio, values)
    assert studio.resolve(request, preset_name) == wanted


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pace_goes_from_all_blocks_at_once_to_the_fewest(tmp_path: Path, ranks: int) -> None:
    with FakeEngine(outputs=tmp_path, ranks=ranks) as engine:
        long = Studio(engine, {})  # type: ignore[arg-type]
        found = []
        for place in range(4):
            request, name = form.read(long, form_values(long, pace=place, seconds=40.0))
            found.append(long.resolve(request, name))
        assert [r.schedule for r in found] == ["paper", "preview", "preview", "preview"]
        in_flight = [r.max_in_flight or 0 for r in found[1:]]
        assert in_flight == sorted(in_flight, reverse=True)
        # The left end puts more blocks in flight than any other place, because all of them are.
        assert in_flight[0] <= plan_of(found[0]).num_blocks and in_flight[0] > in_flight[-1]
        assert [pace.of_request(long, r, None) for r in found] == [0, 1, 2, 3]


def test_a_schedule_set_by_hand_survives_the_form(studio: Studio) -> None:
    wanted = studio.resolve(
        GenerationRequest(prompt="x", seconds=8, schedule="preview", max_in_flight=7, stagger=2, micro_batches=True)
    )
    request, _ = form.read(studio, [update["value"] for update in form.fill(studio, wanted)])
    assert studio.resolve(request) == wanted


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
    request, _ = form.read(studio, [update["value"] for update in form.fill(studio, wanted)])
    assert studio.resolve(request) == wanted


@pytest.mark.parametrize("has_two", [False, True])
def test_every_field_survives_the_form(tmp_path: Path, has_two: bool) -> None:
    """The model of a studio of its own has a negative prompt, so that an empty one is a choice."""
    preset = FAKE_PRESET.model_copy(update={"negative_prompt": "blurred"})
    fields: dict[str, Any] = {
        "prompt": "y", "negative_prompt": "", "latents_num": 23, "height": 64, "width": 128, "fps": 24,
        "num_inference_steps": 7, "guidance_scale": 3.33, "guidance_start": 0.15, "guidance_stop": 0.8, "flow_shift": 2.718,
        "seed": 2**60 + 1, "num_per_block": 5, "num_cat": 3, "context": "cached",
    }  # fmt: skip
    schedule = {"schedule": "preview", "max_in_flight": 3, "stagger": 2, "micro_batches": True}
    if has_two:
        fields |= {"guidance_scale_2": 2.22, "boundary_ratio": 0.8765}
    with FakeEngine(preset, outputs=tmp_path, num_experts=1 + has_two) as engine:
        studio = Studio(engine)  # type: ignore[arg-type]
        whole = {"guidance_start": 0.0, "guidance_stop": 1.0}
        for changes in [{}, fields, schedule, fields | schedule, whole, *({name: value} for name, value in fields.items())]:
            wanted = studio.resolve(GenerationRequest(**{"prompt": "x", "seed": 1, **changes}))
            request, _ = form.read(studio, [update["value"] for update in form.fill(studio, wanted)])
            assert studio.resolve(request) == wanted, changes


def test_moving_the_pace_keeps_all_but_the_schedule(studio: Studio) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", seconds=8, fps=24, guidance_start=0.2, schedule="preview", stagger=2))
    values = dict(zip(form.NAMES, [update["value"] for update in form.fill(studio, wanted)], strict=True))
    values |= {"pace": 0, "rules": pace.moved(values["rules"])}
    request, _ = form.read(studio, [values[name] for name in form.NAMES])
    assert studio.resolve(request) == studio.resolve(
        wanted.model_copy(update={"schedule": "paper", "max_in_flight": None, "stagger": None, "micro_batches": None})
    )
    assert pace.moved(None) is None


def test_what_one_expert_leaves_out_is_the_presets_with_two(tmp_path: Path) -> None:
    with FakeEngine(outputs=tmp_path, num_experts=2) as engine:
        studio = Studio(engine)  # type: ignore[arg-type]
        stored = GenerationRequest(prompt="x").resolve(FAKE_PRESET)
        assert stored.boundary_ratio is None
        filled = dict(zip(form.NAMES, form.fill(studio, stored), strict=True))
        assert filled["boundary_ratio"]["value"] == 0.875, "a slider cannot show nothing"


@pytest.mark.parametrize("latents_num", [1, 2, 3, 17, 400])
def test_every_length_survives_the_slider(studio: Studio, latents_num: int) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="x", latents_num=latents_num))
    request, _ = form.read(studio, [update["value"] for update in form.fill(studio, wanted)])
    assert studio.resolve(request).latents_num == latents_num


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
    page, _ = gallery.render(studio, "me", 0, "")
    told = panels.board(found, studio) + panels.result(found, "") + page + panels.estimate_problem(NASTY)
    assert "<script" not in told and 'onmouseover=1"' not in told and '" onmouseover' not in told
    assert "&lt;script&gt;" in told


def test_the_queue_names_only_ones_own(tmp_path: Path) -> None:
    with FakeEngine(outputs=tmp_path, item_s=5) as engine:
        studio = Studio(engine)  # type: ignore[arg-type]
        mine = studio.submit(GenerationRequest(prompt="private wish"), owner="me")
        assert panels.queue(studio, "me", mine.job_id) == "", "the only job is on this tab's board already"
        assert "private wish" in panels.queue(studio, "me") and "Watch" in panels.queue(studio, "me")
        seen = panels.queue(studio, "you")
        assert "private wish" not in seen and mine.job_id not in seen and "Someone else" in seen
        studio.submit(GenerationRequest(prompt="another"), owner="you")
        assert "place 2" in panels.queue(studio, "you")


def test_a_job_that_waits_for_room_says_so(studio: Studio) -> None:
    waiting = dataclasses.replace(made(studio), state="queued", final=None, started=None, position=0)
    assert panels.headline(waiting, studio)[1].startswith("next in line")
    short = dataclasses.replace(waiting, waits_for="the disk has 0 MB free")
    assert panels.headline(short, studio) == ("Waiting", "the disk has 0 MB free; it starts by itself once there is room")


def test_strip_is_as_wide_as_the_video_and_honest_about_its_blocks(studio: Studio) -> None:
    found = made(studio, seconds=6)
    drawn = charts.strip(found)
    widths = [int(width) for width in re.findall(r"flex-grow:(\d+)", drawn)]
    assert sum(widths) == frames_of_latents(found.request.latents_num or 0) == found.num_frames
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
    ("seconds", "told"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (200, "3 min 20 s"), (1200, "20 min"), (7500, "2 h 05 min")],
)
def test_durations_read_well(seconds: float, told: str) -> None:
    assert words.duration(seconds) == told


# Estimates


def test_time_is_learnt_from_finished_jobs(studio: Studio) -> None:
    asked = GenerationRequest(prompt="x", seconds=4, num_inference_steps=20)
    assert studio.estimate(asked).time_s is None
    for _ in range(3):
        made(studio, seconds=4, num_inference_steps=10)
    studio.estimator._learnt_at = -1e9
    one, two = (studio.estimate(asked.model_copy(update={"num_inference_steps": steps})) for steps in (20, 40))
    assert one.time_s and two.time_s and two.time_s == pytest.approx(2 * one.time_s)
    assert (one.num_frames, one.num_blocks, one.num_items) == (65, 4, 80)
    # Of 20 steps 3 and the last are computed, and every second of the 16 between them.
    skipping = studio.estimate(asked.model_copy(update={"cache_interval": 2}))
    assert skipping.time_s == pytest.approx(one.time_s * 12 / 20)


def test_what_cannot_fit_is_refused_with_the_number(studio: Studio, engine: FakeEngine) -> None:
    asked = GenerationRequest(prompt="x", seconds=4)
    fits = studio.estimate(asked)
    assert fits.bytes_per_rank == 9_216_000 and fits.refusal is None
    assert "9.2 MB" in panels.estimate_line(fits) and "time known after the first video" in panels.estimate_line(fits)
    engine.has_bytes = 10**6
    assert 'role="alert">this needs 9.2 MB and there are 1.0 MB' in panels.estimate_line(studio.estimate(asked))
    with pytest.raises(RequestError, match="needs 9\\.2 MB"):
        studio.submit(asked)
    assert list(engine.outputs.iterdir()) == []


def test_an_unwritable_folder_is_told(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(studio.outputs) / "file").write_text("")
    studio.engine.outputs = Path(studio.outputs) / "file"
    with pytest.raises(OutputError, match="cannot be written"):
        studio.submit(GenerationRequest(prompt="x"))


def test_live_video_writes_no_stub_and_streams_bytes_untouched(studio: Studio) -> None:
    block = made(studio).blocks[0]
    video = LiveVideo(streaming=True, render=False)
    chunk, where = asyncio.run(video.stream_output(block, "a/b/playlist.m3u8", True))
    assert chunk["data"] == Path(block.path).read_bytes() and chunk["duration"] == block.duration_s
    assert where["is_stream"] and where["path"] == "a/b/playlist.m3u8"
    assert not (Path(form.__file__).parent / "live_video.pyi").exists()
