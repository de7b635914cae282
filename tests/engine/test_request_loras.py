"""LoRAs of one video, as the front end sees them: names in settings, files in the record, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualparal.errors import RequestError
from dualparal.media.metadata import read_settings
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.ui import form
from dualparal.ui.studio import Studio
from tests.engine.test_resume_settings import SECONDS, cut_off
from tests.fake_group import FOUR_BLOCKS, GroupLog, Make
from tests.settings import settings as some_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    for name in ("ink", "fast"):
        base = "diffusion_model.blocks.0.self_attn.q"
        rows = {f"{base}.lora_A.weight": torch.ones(2, 24), f"{base}.lora_B.weight": torch.ones(24, 2)}
        save_file(rows, tmp_path / "loras" / f"{name}.safetensors")
    return tmp_path / "loras"


def wanted(*loras: str, **more: object) -> GenerationRequest:
    return GenerationRequest(prompt="a kite", loras=list(loras), **{**FOUR_BLOCKS, **more})


def test_a_job_says_which_and_where_and_its_video_only_which(make: Make, group_log: GroupLog, folder: Path) -> None:
    with make(lora_folder=folder) as engine:
        one = engine.submit(wanted("ink.safetensors:0.5"))
        two = engine.submit(wanted(str(folder / "fast.safetensors")))
        three = engine.submit(wanted())
        videos = [job.result(SECONDS).path for job in (one, two, three)]
    names = [("ink.safetensors:0.5",), ("fast.safetensors",), ()]
    assert [job.request.loras for job in (one, two, three)] == names
    assert [read_settings(path).loras for path in videos] == names
    assert [[lora.file for lora in run.loras] for run in group_log.runs] == [
        [str(folder / "ink.safetensors")], [str(folder / "fast.safetensors")], []
    ]  # fmt: skip
    records = [job.folder.record() for job in (one, two, three)]
    assert [record["with_loras"][0]["file"] for record in records[:2]] == [
        lora.file for r in group_log.runs for lora in r.loras
    ]
    assert "LoRA ink.safetensors" in records[0]["files"] and "with_loras" not in records[2]
    assert str(folder) not in json.dumps(records[1]["request"])


def test_resume_takes_the_same_files_and_asks_when_they_changed(
    make: Make, group_log: GroupLog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.engine.test_resume_settings.WANTED", wanted("ink.safetensors:0.5"))
    job = cut_off(make(lora_folder=folder))
    with make() as engine:  # without the folder too: the record knows
        engine.resume(job.job_id).result(SECONDS)
    assert group_log.runs[-1].loras == group_log.runs[0].loras and group_log.runs[-1].is_resumed
    job = cut_off(make(lora_folder=folder), "abcdee")
    file = folder / "ink.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    with make(lora_folder=folder) as engine:
        with pytest.raises(RequestError, match=r"other weights: LoRA ink\.safetensors .*--anyway"):
            engine.resume(job.job_id)
        engine.resume(job.job_id, anyway=True).result(SECONDS)
    job = cut_off(make(lora_folder=folder), "abcded")
    file.unlink()
    with make(lora_folder=folder) as engine, pytest.raises(RequestError, match="of the job is not there any more"):
        engine.resume(job.job_id)


def test_what_does_not_go_together(make: Make, folder: Path) -> None:
    engine = make(lora_folder=folder, compile=True)
    with pytest.raises(RequestError, match="do not go with --compile"):
        engine.submit(wanted("ink.safetensors"))
    plain = make(lora_folder=folder)
    with pytest.raises(RequestError, match="compare a video without LoRAs"):
        plain.compare(wanted("ink.safetensors"))
    with pytest.raises(RequestError, match="there is no LoRA"):
        plain.submit(wanted("nothing.safetensors"))
    with pytest.raises(RequestError, match="there is no folder"):
        make(lora_folder=folder / "nowhere")


def test_the_planner_counts_them(make: Make, folder: Path) -> None:
    engine = make(lora_folder=folder, ranks=2)
    none, one, two = (
        engine.plan(wanted(*names)) for names in ((), ("ink.safetensors",), ("ink.safetensors", "fast.safetensors"))
    )
    held = [[rank.loras for rank in plan.memory.ranks] for plan in (none, one, two)]
    assert held[0] == [0, 0] and sum(held[1]) == 2 * 2 * 24 * 4 and sum(held[2]) == 2 * sum(held[1])
    assert one.bytes_in_all - none.bytes_in_all == sum(held[1])
    assert engine.plan(wanted("someone/else/x.safetensors")).memory.ranks[0].loras > held[1][0], "as if of rank 64"


def test_visitors_choose_from_what_the_server_has(make: Make, folder: Path, tmp_path: Path) -> None:
    fast = Preset(name="fast", loras=("fast.safetensors",), num_inference_steps=4, guidance_scale=1.0)
    far = Preset(name="far", loras=("someone/else/x.safetensors",))
    engine = make(lora_folder=folder, preset=Preset(name="own"))
    studio = Studio(engine.start(), {"fast": fast, "far": far})
    assert studio.loras() == ["fast.safetensors", "ink.safetensors"]
    assert [preset.name for preset in studio.usable_presets()] == ["own", "fast"]
    with pytest.raises(RequestError, match="wants LoRAs that are not on this server"):
        studio.submit(wanted(), "far")
    found = studio.submit(GenerationRequest(prompt="a kite", **{**FOUR_BLOCKS, "num_inference_steps": None}), "fast")
    assert found.request.loras == ("fast.safetensors",) and found.request.num_inference_steps == 4
    assert studio.submit(wanted(), "fast").request.loras == ()
    for name in (str(folder / "ink.safetensors"), "../loras/ink.safetensors", "someone/else"):
        with pytest.raises(RequestError, match="is not a LoRA of this server"):
            studio.submit(wanted(name))
        with pytest.raises(RequestError, match="is not a LoRA of this server"):
            studio.estimate(wanted(name))
    engine.close()


def test_the_form_shows_and_reads_them(make: Make, folder: Path) -> None:
    from tests.ui.test_parts import ON_PAGE, filled, form_values

    studio = Studio(make(lora_folder=folder, **ON_PAGE), {})
    found = form.read(studio, form_values(studio, loras=["ink.safetensors:0.5", "fast.safetensors"]))
    assert found.loras == ("ink.safetensors:0.5", "fast.safetensors")
    assert form.read(studio, filled(studio, found)).loras == found.loras
    assert form.read(studio, filled(studio, found, loras=[])).loras == ()
    assert some_settings().loras == ()
