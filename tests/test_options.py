"""Options of an engine: said once, and everything that follows from their fields."""

from __future__ import annotations

import argparse
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.bench import quality
from dualparal.cli import main as cli
from dualparal.cli.flags import add_engine_flags, find_asked, given
from dualparal.cli.parser import Parser
from dualparal.engine.engine import Engine
from dualparal.errors import CheckpointError, RequestError
from dualparal.jobs.folder import JobFolder
from dualparal.messages import WorkerOptions
from dualparal.model.known import find_sizes, sizes_of
from dualparal.options import CHANGES, EngineOptions, beside, of, recorded
from dualparal.presets import load_presets, weights_of
from dualparal.request import IN_PROMPT, GenerationRequest
from dualparal.ui import serve
from tests.settings import settings as some_settings


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in cli.make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()
    yield "serve", serve.parser()
    yield "bench quality", quality.parser()


@pytest.mark.parametrize(("command", "whose"), [
    ("generate", ("job", "host")), ("resume", ("job", "host")), ("plan", ("job",)), ("serve", ("job", "host", "server")),
    ("bench quality", ("job",)),
])  # fmt: skip
def test_every_option_is_a_flag_of_its_commands(command: str, whose: tuple[str, ...]) -> None:
    known = {action.dest for action in dict(parsers())[command]._actions}
    assert known >= set(of(*whose)) | {"model_id", "preset", "presets_folder"}
    if command in ("generate", "plan"):
        assert known >= set(GenerationRequest.model_fields) - IN_PROMPT


def test_every_flag_has_help() -> None:
    for command, parser in parsers():
        bare = [action.dest for action in parser._actions if action.option_strings and not action.help]
        assert not bare, f"{command}: {bare}"
        assert parser.format_help()


def test_every_option_is_described() -> None:
    assert all(info.description for info in EngineOptions.model_fields.values())
    assert {beside(name)["of"] for name in EngineOptions.model_fields} == {"job", "host", "server", "inside"}


def test_nothing_lists_the_options_by_hand() -> None:
    assert list(inspect.signature(Engine).parameters) == ["model", "preset", "admit", "team", "options"]
    assert "engine" in WorkerOptions.__dataclass_fields__
    assert not set(WorkerOptions.__dataclass_fields__) & (set(EngineOptions.model_fields) - {"loras"})


def test_authors_names_diffusers_names_and_dashes() -> None:
    parser = dict(parsers())["generate"]
    words = ["--prompt", "x", "--model-id", "m", "--sample_guide_scale2=3", "--num-inference-steps", "4", "--lora", "a:1"]
    found = parser.parse_args([*words, "--lora=b", "--layer-split", "auto", "--no-such".replace("no-such", "offload-cache")])
    assert given(GenerationRequest, found) == {"prompt": "x", "guidance_scale_2": 3.0, "num_inference_steps": 4}
    assert given(EngineOptions, found) == {"loras": ["a:1", "b"], "layer_split": "auto", "offload_cache": True}


def test_loras_of_an_engine_and_of_a_video_are_two_flags() -> None:
    words = ["--prompt", "x", "--lora", "a:1", "--with_lora", "b", "--with-lora=high:c:0.5"]
    found = dict(parsers())["generate"].parse_args(words)
    assert given(GenerationRequest, found) == {"prompt": "x", "loras": ["b", "high:c:0.5"]}
    assert given(EngineOptions, found) == {"loras": ["a:1"]}
    assert GenerationRequest(prompt="x", loras=["none"]).loras == ()
    found = dict(parsers())["serve"].parse_args(["--lora_cache_gb", "0.5", "--lora-folder", "/tmp"])
    assert given(EngineOptions, found) == {"lora_cache_bytes": 5e8, "lora_folder": Path("/tmp")}
    assert "(default: 2)" in next(a.help or "" for a in dict(parsers())["serve"]._actions if a.dest == "lora_cache_bytes")


def test_a_preset_and_a_model_are_two_values(tmp_path: Path) -> None:
    """In every command the one names the weights, the other the settings; a preset alone names both."""
    preset, published = "wan2.1-1.3b-480p", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    revision = load_presets()["wan2.1-14b-480p"].revision
    assert revision
    commands = dict(parsers())
    for name, own in {"generate": ["--prompt", "x"], "plan": [], "resume": ["last"], "serve": [], "bench quality": []}.items():
        for model, weights in ((str(tmp_path), str(tmp_path)), (published, published), ("wan2.1-14b-720p", published)):
            found, settings = find_asked(commands[name].parse_args([*own, "--preset", preset, "--model_id", model]))
            assert (found, settings.name) == (weights, preset)
            assert weights_of(found, settings) == (weights, None if found == str(tmp_path) else revision)
        found, settings = find_asked(commands[name].parse_args([*own, "--preset", preset]))
        assert (found, settings.name, weights_of(found, settings)[0]) == (preset, preset, settings.model)


def test_an_engine_takes_its_weights_from_the_model_and_its_settings_from_the_preset(tiny: Path, tmp_path: Path) -> None:
    preset = load_presets()["pocket"]
    engine = Engine(tiny, preset=preset, device="cpu", outputs=tmp_path)
    settings = engine.resolve(GenerationRequest(prompt="x"))
    assert engine.checkpoint.folder == tiny and settings.model == tiny.name
    assert (settings.width, settings.num_per_block) == (preset.width, preset.num_per_block)
    assert find_sizes(str(tiny), preset) == sizes_of(engine.checkpoint)
    with pytest.raises(CheckpointError, match="sizes of someone/else are not known"):
        find_sizes("someone/else", preset)


def test_a_resumed_job_keeps_its_weights_whatever_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    JobFolder.create(tmp_path, "abcdef", some_settings(), preset="pocket", owner="", model="/where/they/lie", ranks=2)
    opened: list[tuple[str, str, int]] = []

    def open_engine(flags: argparse.Namespace, **more: Any) -> None:
        opened.append((flags.model_id, flags.preset, more["ranks"]))
        raise RequestError("enough")

    monkeypatch.setattr("dualparal.cli.generate.make_engine", open_engine)
    for words in ([], ["--preset", "pocket"], ["--model_id", "other"]):
        assert cli.main(["resume", "abcdef", "--outputs", str(tmp_path), *words]) == 2
    assert opened == [("/where/they/lie", None, 2), ("/where/they/lie", "pocket", 2), ("other", None, 2)]


def test_a_record_tells_a_job_again() -> None:
    options = EngineOptions(
        ranks=2, layer_split="3,1", dtype="bf16", vae_dtype="float32", threads=2, loras=["a:0.5"], device="cpu", max_queue=3
    )
    record = options.record()
    assert set(record) == set(of("job")) - (set(CHANGES) - {"loras"})
    assert record["loras"] == ["a:0.5"] and record["dtype"] == "bfloat16"
    again = EngineOptions(**recorded({**record, "model": "m", "job_id": "x"}, {}))
    assert again == options.settled(max_queue=32, vae_dtype=None)
    assert EngineOptions(**recorded(record, {"threads": 1})).threads == 1, "what is given wins"
    assert EngineOptions(**recorded(record, {"ranks": 3})).layer_split is None, "a split is of its ranks"
    of_two = {**record, "ranks": 4, "guidance_parallel": 2}
    assert EngineOptions(**recorded(of_two, {})).guidance_parallel == 2
    assert EngineOptions(**recorded(of_two, {"ranks": 3})).guidance_parallel == 1, "rings are of their ranks"
    assert EngineOptions(**recorded(of_two, {"guidance_parallel": 1})).layer_split is None


@pytest.mark.parametrize("number", [0, 3, "2", True, None, 2.5])
def test_there_are_one_or_two_rings(number: object) -> None:
    with pytest.raises(RequestError, match=r"guidance_parallel=.* is not known; use 1 or 2"):
        EngineOptions(guidance_parallel=number)


def test_changes_are_what_differs_from_the_model() -> None:
    assert EngineOptions(vae_dtype="fp32", offload_cache=True, text_encoder="cpu").changes() == {}
    assert EngineOptions(vae_dtype="fp16", compile=True).changes() == {"vae_dtype": "float16", "compile": True}


def test_a_job_that_goes_on_can_leave_an_option_out() -> None:
    parser = Parser()
    add_engine_flags(parser, can_undo=True)
    found = given(EngineOptions, parser.parse_args(["--no-offload", "--compile"]))
    assert recorded({"offload": True, "attention": "native"}, found) == {
        "offload": False, "attention": "native", "compile": True,
    }  # fmt: skip


def test_options_travel_whole() -> None:
    options = EngineOptions(ranks=3, loras=("a",), layer_split=(1, 2, 3), outputs=Path("x"))
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(("values", "says"), [
    ({"rank": 2}, "'rank' is not an option of an engine; did you mean ranks?"),
    ({"ranks": 0}, "ranks=0 is not a number of processes; use 1 or more"),
    ({"ranks": "2"}, "ranks='2' is not a number of processes; use 1 or more"),
    ({"threads": True}, "threads=True is not a number of threads; use 1 or more"),
    ({"max_queue": 0}, "max_queue=0 is not a number of jobs; use 1 or more"),
    ({"max_disk_bytes": float("nan")}, "max_disk_bytes=nan is not a limit; use 0 or more"),
    ({"device": "tpu"}, "device='tpu' is not known; use auto, cpu, cuda"),
    ({"quantization": "int3"}, "quantization='int3' is not known; use fp8 or int8"),
    ({"dtype": "int8"}, "dtype='int8' is not known; use float32, fp32"),
    ({"layer_split": "15;15"}, "layer_split='15;15' is not a list of counts"),
    ({"layer_split": 4}, "layer_split=4 is not a list of counts"),
    ({"loras": "a"}, "loras='a' is one text; give a list of them"),
    ({"timeout_s": float("inf")}, "timeout_s=inf: "),
    ({"offload": True, "compile": True}, "offload and compile do not go together"),
])  # fmt: skip
def test_wrong_options_are_one_sentence(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        EngineOptions(**values)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert caught.value.field in values


@pytest.mark.parametrize("words", [["--max_queue", "0"], ["--max_disk_gb", "nan"], ["--max_disk_gb=-1"], ["--max_per_owner=x"]])
def test_numbers_of_a_server_are_checked_at_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serve.parser().parse_args(words)
    assert end.value.code == 2 and words[0].partition("=")[0] in capsys.readouterr().err


def test_gigabytes_become_bytes() -> None:
    assert given(EngineOptions, serve.parser().parse_args(["--max-disk-gb", "1.5"])) == {"max_disk_bytes": 1_500_000_000}


def test_a_plan_reads_presets_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.toml").write_text('title = "Own"\nmodel = "pocket"\nseconds = 1\nheight = 64\nwidth = 64\n')
    words = ["plan", "--presets_folder", str(tmp_path), "--preset", "own", "--device", "cpu"]
    assert cli.main(words) == 0
    assert "of 64x64 in" in capsys.readouterr().out
    assert cli.main(["plan", "--presets_folder", str(tmp_path / "none")]) == 2
    assert "is not a folder of presets" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "light"), [("()", "pydantic"), ("('generate', 'plan', 'resume', 'jobs')", "numpy")])
def test_help_waits_for_nothing_heavy(asked: str, light: str) -> None:
    """Half of what `--help` took was numpy's import, for the annotation of a message; the list of commands needs no field."""
    code = (
        f"import sys; from dualparal.cli import main; main.make_parser({asked}); "
        f"print(sorted({{{light!r}, 'numpy', 'torch', 'gradio', 'PIL', 'transformers'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"
