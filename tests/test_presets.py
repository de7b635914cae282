"""Every preset loads and holds together; a user's folder wins; a mistake is named with the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dualparal.errors import PresetError, RequestError
from dualparal.method.sampler import SamplerFactory
from dualparal.planning.placement import ModelSizes, Placement
from dualparal.planning.room import settle
from dualparal.presets import Limits, Preset, complete, find_preset, load_preset, load_presets
from dualparal.request import MAX_PROMPT_CHARS, GenerationRequest

SHIPPED = load_presets()
WAN = ["wan2.1-1.3b-480p", "wan2.1-14b-480p", "wan2.1-14b-720p", "wan2.2-a14b-480p", "wan2.2-a14b-720p"]
WAN_5B = ["wan2.2-ti2v-5b-480p", "wan2.2-ti2v-5b-720p"]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500 + len(str(path))
    assert str(path) in text
    return text


def test_all_wan_presets_are_shipped() -> None:
    assert {*WAN, *WAN_5B} <= set(SHIPPED)
    assert len({preset.title for preset in SHIPPED.values()}) == len(SHIPPED)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_preset(name: str) -> None:
    preset = SHIPPED[name]
    assert preset.name == name
    assert preset.title
    assert preset.model
    assert preset.hardware
    assert len(preset.examples) >= 3
    num_experts = 1 if preset.boundary_ratio is None else 2
    for prompt in preset.examples:
        assert 0 < len(prompt) <= MAX_PROMPT_CHARS
        assert complete(GenerationRequest(prompt=prompt), preset, num_experts=num_experts).model == preset.model


@pytest.mark.parametrize("name", WAN)
def test_wan_preset(name: str) -> None:
    preset = SHIPPED[name]
    assert re.fullmatch(r"[0-9a-f]{40}", preset.revision or ""), "a commit, neither a branch nor a tag"
    assert len({other.revision for other in SHIPPED.values() if other.model == preset.model}) == 1
    family, size, lines = name.split("-")
    assert (preset.height, preset.width) == {"480p": (480, 832), "720p": (720, 1280)}[lines]
    assert preset.model.startswith(f"Wan-AI/W{family[1:]}-T2V-{size.upper()}-Diffusers")
    assert (preset.fps, preset.num_inference_steps, preset.num_per_block, preset.num_cat) == (16, 50, 8, 8)
    assert complete(GenerationRequest(prompt="x"), preset, num_experts=2, boundary_ratio=0.5).latents_num == 40
    if family == "wan2.2":
        assert (preset.guidance_scale, preset.guidance_scale_2, preset.flow_shift) == (4.0, 3.0, 12.0)
        assert preset.boundary_ratio == 0.875
    else:
        assert (preset.guidance_scale, preset.guidance_scale_2, preset.boundary_ratio) == (5.0, None, None)
        assert preset.flow_shift == {"480p": 3.0, "720p": 5.0}[lines]
    complete(GenerationRequest(prompt="x", seconds=300, height=preset.width, width=preset.height), preset, boundary_ratio=0.5)
    with pytest.raises(RequestError, match="limit"):
        complete(GenerationRequest(prompt="x", seconds=301), preset, boundary_ratio=0.5)


@pytest.mark.parametrize("name", sorted(name for name, preset in SHIPPED.items() if preset.loras))
def test_a_preset_for_few_steps_is_its_models_own_but_for_what_was_distilled(name: str) -> None:
    fast, plain = SHIPPED[name], SHIPPED[re.sub("-([0-9]step|fast)$", "", name)]
    changed = {field for field in type(fast).model_fields if getattr(fast, field) != getattr(plain, field)}
    assert changed - {"guidance_scale_2", "flow_shift", "solver"} == {
        "name", "title", "loras", "num_inference_steps", "guidance_scale"
    }  # fmt: skip
    assert find_preset(fast.model) == SHIPPED[sorted(n for n, p in SHIPPED.items() if p.model == fast.model and not p.loras)[0]]
    settings = complete(GenerationRequest(prompt="x"), fast, num_experts=2 if fast.boundary_ratio else 1)
    assert not settings.has_guidance and settings.guidance_scale_2 == 1 and settings.loras == fast.loras
    sampler = SamplerFactory(
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, num_steps=settings.num_inference_steps,
        flow_shift=settings.flow_shift, device="cpu", solver=settings.solver,
    )  # fmt: skip
    if "14b" in name:
        assert sampler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])
        assert sampler.experts(settings.boundary_ratio) == ((0, 0, 1, 1) if "a14b" in name else (0, 0, 0, 0))
    said = [lora.split(":")[0] for lora in fast.loras if ":" in lora]
    assert said == (["high", "low"] if "a14b" in name else [])
    assert complete(GenerationRequest(prompt="x", loras=[]), fast, num_experts=2, boundary_ratio=0.5).loras == ()


@pytest.mark.parametrize("name", WAN_5B)
def test_the_5b_models_presets(name: str) -> None:
    preset = SHIPPED[name]
    assert preset.model == "Wan-AI/Wan2.2-TI2V-5B-Diffusers" and re.fullmatch(r"[0-9a-f]{40}", preset.revision or "")
    assert (preset.height, preset.width) == {"480p": (480, 832), "720p": (704, 1280)}[name[-4:]]
    assert (preset.fps, preset.num_inference_steps, preset.guidance_scale, preset.flow_shift) == (24, 50, 5.0, 5.0)
    assert complete(GenerationRequest(prompt="x"), preset).latents_num == 61
    sizes = ModelSizes.published(preset.model)
    assert sizes is not None
    placement = Placement(layers=(30,))
    for height, width in ((preset.height, preset.width), (preset.width, preset.height), (512, 512)):
        settle(GenerationRequest(prompt="x", height=height, width=width), preset, sizes, placement)
    for size, words in ((592, "use 576 or 608"), (16, "use 32 or 64")):
        with pytest.raises(RequestError, match=f"height={size} does not fit this model, .* multiples of 32; {words}") as caught:
            settle(GenerationRequest(prompt="x", height=size, width=512), preset, sizes, placement)
        assert caught.value.field == "height"
    with pytest.raises(RequestError, match="width=720 does not fit"):
        settle(GenerationRequest(prompt="x", height=512, width=720), preset, sizes, placement)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("heigth = 480", "unknown key 'heigth'; did you mean 'height'?"),
        ("[limits]\nsecond = 3", "unknown key 'limits.second'; did you mean 'seconds'?"),
        ("name = 'other'", "unknown key 'name'; a preset is named by its file"),
        ("height = 'tall'", "height='tall'"),
        ("height = 490", "height=490: not divisible by 16; use 480 or 496"),
        ("guidance_scale = nan", "guidance_scale=nan"),
        ("flow_shift = inf", "flow_shift=inf"),
        ("flow_shift = -1.0", "flow_shift=-1.0"),
        ("seconds = 0", "seconds=0"),
        ("num_cat = 9", "num_cat=9 is more than num_per_block=8"),
        ("num_cat = -1", "num_cat=-1"),
        ("num_per_block = 0", "num_per_block=0"),
        ("boundary_ratio = 1.5", "boundary_ratio=1.5"),
        ("dtype = 'int8'", "dtype='int8'"),
        ("schedule = 'random'", "schedule='random'"),
        ("examples = 'one'", "examples='one'"),
        (f"examples = ['{'x' * 5000}']", "5000 characters"),
        ("limits = 3", "limits=3"),
        (f"{'k' * 10_000} = 3", "unknown key 'kkk"),
        ("seconds = 301", "limit of 4800 frames"),
        ("num_inference_steps = 201", "limit of 200"),
        ("this is not toml", "cannot be read as TOML"),
        ("a = 1\na = 2", "cannot be read as TOML"),
        ("title = 'x" + "y" * 10_000, "cannot be read as TOML"),
        ("seconds = '" + "9" * 10_000 + "'", "seconds="),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(write(tmp_path, "mine", text))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    (tmp_path / "folder.toml").mkdir()
    for name in ("binary", "folder", "missing"):
        assert "cannot be read as TOML" in refused(tmp_path / f"{name}.toml")


def test_an_empty_file_is_plain_defaults(tmp_path: Path) -> None:
    assert load_preset(write(tmp_path, "plain", "")) == Preset(name="plain")


def test_users_folders_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "env", WAN[0], "title = 'from the environment'")
    write(tmp_path / "env", "mine", "title = 'from the environment'")
    write(tmp_path / "flag", "mine", "title = 'from the flag'")
    monkeypatch.setenv("DUALPARAL_PRESETS", str(tmp_path / "env"))
    presets = load_presets(tmp_path / "flag")
    assert presets[WAN[0]].title == "from the environment"
    assert presets["mine"].title == "from the flag"
    assert presets[WAN[1]] == SHIPPED[WAN[1]]
    monkeypatch.setenv("DUALPARAL_PRESETS", str(tmp_path / "missing"))
    with pytest.raises(PresetError, match="not a folder of presets"):
        load_presets()


def test_finding() -> None:
    assert find_preset(WAN[3]).name == WAN[3]
    assert find_preset("Wan-AI/Wan2.2-T2V-A14B-Diffusers", SHIPPED).name == WAN[3]
    assert find_preset("someone/Wan-finetune", SHIPPED) == Preset(model="someone/Wan-finetune")


def test_a_folder_of_ones_own_takes_any_size(tmp_path: Path) -> None:
    preset = find_preset(str(tmp_path), SHIPPED)
    assert preset == Preset(model=str(tmp_path))
    resolved = complete(GenerationRequest(prompt="x", height=32, width=32, latents_num=1000), preset)
    assert (resolved.height, resolved.width) == (32, 32)


@pytest.mark.parametrize(
    "model", ["wan2.1-1.3b-48p", "", "./nowhere/here", "/nowhere/here", "a b/c", "x" * 100_000, "nul\0", "a/b/c"]
)
def test_models_that_are_nothing(model: str) -> None:
    with pytest.raises(PresetError, match="neither a preset, a folder nor a hub id") as caught:
        find_preset(model, SHIPPED)
    assert len(str(caught.value)) < 300
    assert "did you mean" in str(caught.value)


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Limits(seconds=-1)
