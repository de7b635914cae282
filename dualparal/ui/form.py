"""The form on the left: every setting of a request, with limits from the preset and one line on what it does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dualparal.errors import RequestError
from dualparal.method.timeline import written
from dualparal.presets import FLOW_SHIFT, Preset
from dualparal.prompts import split_timeline
from dualparal.request import AUTO, CONTEXTS, SOLVERS, TEMPORAL_FACTOR, GenerationRequest, Settings, asked_again
from dualparal.ui import pace, timeline
from dualparal.ui.slider import Slider
from dualparal.ui.studio import SHORT_SEEDS, Studio
from dualparal.ui.uploads import PICTURES, VIDEOS, uploaded

HERE = Path(__file__).parent
NAMES = (
    "prompt", "negative_prompt", "preset", "seconds", "is_endless", "seed", "pace", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "guidance_start", "guidance_stop", "flow_shift", "boundary_ratio", "solver", "num_per_block", "num_cat",
    "context", "width", "height", "start_image", "continue_video", "loras", "continue_from", "join",
    "stored",
)  # fmt: skip
LENGTH_INFO = "More seconds take more time, hardly more memory."
ENDLESS = "Endless"
ENDLESS_INFO = "Goes on until you press “Finish the film”; steer it on the way."
CHOICES = {"context": (AUTO, *CONTEXTS), "solver": SOLVERS}
TWO_EXPERTS = ("guidance_scale_2", "boundary_ratio")
EMPTY = {"prompt": "", "negative_prompt": None}  # what an empty box asks for
BEGINS = ("start_image", "continue_video", "continue_from", "join")  # what the film begins with
NO_NEGATIVE = "what it should not show"
PICTURE = "Anchor: a picture to begin with (PNG, JPEG, WebP)"
LORAS = "Behind a name :0.8 is its strength, before it high: or low: one of two experts."
VIDEO = "Goes on from a video of yours (MP4, MOV, WebM)"
VIDEO_AGAIN = "It went on from a video: give it again"
CONTINUES = "Goes on from video"
CONTINUES_INFO = "Empty it to begin a new film."
JOIN = "Join: the video holds both"
PICTURE_AGAIN = "It began with a picture: give it again"


@dataclass(frozen=True)
class Form:
    """The form's components by name; `inputs` and the values that come back from the page are in the order of NAMES.

    "pace" is a place of `ui/pace.py`. "stored" is not shown: the settings that were filled in, or None.
    """

    parts: dict[str, Any]
    dice: gr.Button
    timeline: gr.HTML
    film: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        return [self.parts[name] for name in NAMES]

    @property
    def prompt(self) -> Any:
        return self.parts["prompt"]


def build(studio: Studio) -> Form:
    """Create the components in the current Gradio context."""
    preset, two = studio.engine.preset, studio.engine.num_experts > 1
    at = ranges(preset)
    parts: dict[str, Any] = {}
    parts["prompt"] = gr.Textbox(
        label="Prompt", placeholder="What should the video show?", lines=3, max_lines=10, autofocus=True, elem_id="prompt"
    )
    shots = gr.HTML(timeline.EDITOR, apply_default_css=False, elem_id="timeline", js_on_load=(HERE / "timeline.js").read_text())
    film = gr.HTML(apply_default_css=False, elem_id="film")
    parts["negative_prompt"] = gr.Textbox(
        label="Keep out (negative prompt)", placeholder=preset.negative_prompt[:80] or NO_NEGATIVE, lines=1, max_lines=4
    )
    parts["preset"] = gr.Dropdown(
        [(p.title, p.name) for p in studio.usable_presets()], value=preset.name, label="Model and size", filterable=False,
        info=preset.hardware or None, elem_id="preset",
    )  # fmt: skip
    parts["seconds"] = Slider(**at["seconds"], label="Length in seconds", info=LENGTH_INFO, elem_id="seconds")
    parts["is_endless"] = gr.Checkbox(False, label=ENDLESS, info=ENDLESS_INFO, elem_id="endless")
    parts["pace"] = Slider(
        pace.SMOOTHEST, pace.SOONEST, pace.of_preset(preset), step=1, label=pace.LABEL, info=pace.INFO, elem_id="pace"
    )
    parts["stored"] = gr.State(None)
    with gr.Row(elem_classes="seed-row"):
        # A text box: Gradio's Number shows an empty value as 0, and a browser's numbers end at 2**53.
        parts["seed"] = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, min_width=80, elem_id="seed")
        dice = gr.Button("⚄", elem_id="dice", min_width=44, scale=0)
    with gr.Row(elem_classes="begins-row"):
        for name, label, kinds in (("start_image", PICTURE, PICTURES), ("continue_video", VIDEO, VIDEOS)):
            parts[name] = gr.File(
                label=label, file_types=list(kinds), type="filepath", elem_id=name.replace("_", "-"), height=72, min_width=150
            )
    parts["continue_from"] = gr.Textbox(
        label=CONTINUES, info=CONTINUES_INFO, max_lines=1, visible=False, elem_id="continue-from"
    )
    parts["join"] = gr.Checkbox(True, label=JOIN, visible=False, elem_id="join")
    with gr.Column(elem_id="advanced"):
        # Not an Accordion. Gradio makes what is in a closed one when it is opened, and a moment later sets it to the values it
        # had: what was typed in between is gone (seen after 40 ms, on a busy machine 200). Here style.css hides the parts.
        gr.HTML("<details><summary>Advanced</summary></details>", apply_default_css=False)
        with gr.Column(elem_id="advanced-parts"):
            _advanced(parts, preset, at, two)
            parts["loras"] = _loras(studio)
    return Form(parts, dice, shots, film)


def _advanced(parts: dict[str, Any], preset: Preset, at: dict[str, dict[str, Any]], two: bool) -> None:
    for name, (label, info) in ADVANCED.items():
        if name in GROUPS:
            gr.HTML(f"<h3>{GROUPS[name]}</h3>", apply_default_css=False, elem_classes="group")
            if GROUPS[name] == "Picture":
                _size(parts, preset)
        if name in CHOICES:
            value = getattr(preset, name)
            parts[name] = gr.Dropdown(list(CHOICES[name]), value=value, label=label, info=info, filterable=False)
        else:
            parts[name] = Slider(**at[name], label=label, info=info, visible=two or name not in TWO_EXPERTS)


def _size(parts: dict[str, Any], preset: Preset) -> None:
    with gr.Row(elem_classes="size-row"):
        for name, label in (("width", "Width"), ("height", "Height")):
            parts[name] = gr.Number(getattr(preset, name), label=label, precision=0, minimum=16, min_width=80)


def _loras(studio: Studio) -> gr.Dropdown:
    """Shown where there are any to choose from."""
    names = studio.loras()
    return gr.Dropdown(
        names, value=list(studio.engine.preset.loras), label="LoRAs", info=LORAS, multiselect=True, allow_custom_value=True,
        visible=bool(names), elem_id="loras",
    )  # fmt: skip


ADVANCED = {
    "num_inference_steps": ("Denoising steps", "More steps: cleaner pictures, longer wait in proportion."),
    "flow_shift": ("Flow shift", "Higher spends more steps on the rough composition; larger pictures want more."),
    "solver": ("Solver", "How a step is taken: “unipc” is the models’ own, LoRAs for few steps want “euler”."),
    "guidance_scale": ("Guidance", "How closely the prompt is followed; at 1 or less it is off and a step costs half."),
    "guidance_scale_2": ("Guidance, low-noise expert", "The same for the second expert, which paints the details."),
    "guidance_start": ("Guidance from", "Share of the steps that run without guidance first; each of them costs half."),
    "guidance_stop": ("Guidance until", "Share of the steps after which guidance is off."),
    "boundary_ratio": ("Switch between experts", "Share of the noise range that the low-noise expert takes."),
    "num_per_block": ("Latent frames per block (num_per_block)", "Longer blocks are steadier and need more memory."),
    "num_cat": ("Context (num_cat)", "Latent frames of each neighbour a block sees; 0 makes blocks independent."),
    "context": (
        "Left context",
        "“recomputed” as in the paper; “cached” keeps the neighbour’s keys and values: less work, more memory; “auto” caches "
        "where they fit.",
    ),
}
GROUPS = {"num_inference_steps": "Picture", "guidance_scale": "Guidance", "num_per_block": "Blocks"}  # by their first setting


def ranges(preset: Preset) -> dict[str, dict[str, Any]]:
    """minimum, maximum, step and value of each slider for a preset."""
    limits = preset.limits
    step_s = TEMPORAL_FACTOR / preset.fps
    second = preset.guidance_scale if preset.guidance_scale_2 is None else preset.guidance_scale_2
    boundary = 0.875 if preset.boundary_ratio is None else preset.boundary_ratio
    most_cat = min(limits.num_per_block, max(16, preset.num_cat))
    return {
        "seconds": {"minimum": 0, "maximum": limits.seconds, "step": step_s, "value": preset.seconds},
        "num_inference_steps": {
            "minimum": 1, "maximum": limits.num_inference_steps, "step": 1, "value": preset.num_inference_steps
        },
        "guidance_scale": {"minimum": 0, "maximum": 20, "step": 0.1, "value": preset.guidance_scale},
        "guidance_scale_2": {"minimum": 0, "maximum": 20, "step": 0.1, "value": second},
        "guidance_start": {"minimum": 0, "maximum": 1, "step": 0.05, "value": 0},
        "guidance_stop": {"minimum": 0, "maximum": 1, "step": 0.05, "value": 1},
        "boundary_ratio": {"minimum": 0, "maximum": 1, "step": 0.005, "value": boundary},
        "flow_shift": {"minimum": 0.1, "maximum": 20, "step": 0.1, "value": preset.flow_shift or FLOW_SHIFT},
        "num_per_block": {"minimum": 1, "maximum": limits.num_per_block, "step": 1, "value": preset.num_per_block},
        "num_cat": {"minimum": 0, "maximum": most_cat, "step": 1, "value": min(preset.num_cat, most_cat)},
    }  # fmt: skip


def defaults(preset: Preset) -> dict[str, Any]:
    """What a form that nobody has touched shows for a preset, by name."""
    shown: dict[str, Any] = {name: found["value"] for name, found in ranges(preset).items()}
    shown |= {name: getattr(preset, name) for name in (*CHOICES, "width", "height")}
    shown |= {"loras": list(preset.loras), "is_endless": False, "continue_from": "", "join": True}
    return {"prompt": "", "negative_prompt": "", "seed": "", "preset": preset.name, "pace": pace.of_preset(preset), **shown}


def read(studio: Studio, values: Sequence[Any]) -> Settings:
    """The settings that the form's values stand for. Raises `RequestError`.

    What was filled in is overlaid with what has been changed since, so that all that the form does not show, or not exactly,
    is as it was.
    """
    found = dict(zip(NAMES, values, strict=True))
    stored, preset = found.pop("stored"), studio.preset(found.pop("preset"))
    film, is_joined = str(found.pop("continue_from") or "").strip(), found.pop("join")
    video = uploaded(found.pop("continue_video"), "continue_from")
    asked: dict[str, Any] = {"fps": preset.fps} if stored is None else asked_again(stored.model_dump(exclude_none=True))
    before = {"pace": pace.of_preset(preset)} if stored is None else _shown(studio, stored, preset)
    changed = {name: value for name, value in found.items() if name not in before or value != before[name]}
    if studio.engine.num_experts < 2:
        changed = {name: value for name, value in changed.items() if name not in TWO_EXPERTS}
    has_moved, place = "pace" in changed, changed.pop("pace", None)
    if has_moved:
        asked = {name: value for name, value in asked.items() if name not in pace.NUMBERS}
        asked["schedule"] = pace.schedule_at(place)
    if empty := next((name for name, value in changed.items() if value is None and name in ADVANCED), None):
        raise RequestError(f"{ADVANCED[empty][0]} is empty; give a number", empty)
    if "prompt" in changed and asked.pop("shots", None) is not None:
        changed["seconds"] = found["seconds"]
    is_endless = found["is_endless"]
    if is_endless:
        asked.pop("latents_num", None)
        changed.pop("seconds", None)
    elif asked.pop("is_endless", None) and not asked.get("shots"):
        changed["seconds"] = found["seconds"]
    if "shots" in asked or split_timeline(found["prompt"] or "")[1]:  # they say how long it is
        asked.pop("latents_num", None)
        changed.pop("seconds", None)
    if "seconds" in changed:
        asked.pop("latents_num", None)
        changed["seconds"] = _seconds(changed["seconds"], preset.fps)
    if "start_image" in changed:
        changed["start_image"] = uploaded(changed["start_image"], "start_image")
    if "seed" in changed:
        changed["seed"] = _seed(changed["seed"])
    changed |= {name: changed[name] or default for name, default in EMPTY.items() if name in changed}
    if film and video:
        raise RequestError("the film goes on from a video made here and from a file; empty one of them", "continue_from")
    if video:
        changed["continue_from"] = video
    if film:
        changed |= {"continue_from": film, "join": bool(is_joined)}
    settings = studio.resolve(GenerationRequest(**asked | changed), preset.name)
    return pace.spread(settings, int(place)) if has_moved else settings


def _seconds(value: Any, fps: int) -> Any:
    if value is None or (isinstance(value, int | float) and value <= 0):
        raise RequestError(
            f"the length is {'empty' if value is None else f'{value:g} s'}; give more than 0 seconds "
            f"({1 / fps:.2f} is a single picture)",
            "seconds",
        )
    return value


def _seed(text: object) -> int | None:
    stripped = str(text or "").strip()
    if not stripped:
        return None
    if not (stripped.isascii() and stripped.isdecimal()) or len(stripped) > 19:
        raise RequestError("the seed must be a whole number from 0 on; leave it empty to draw a new one each time", "seed")
    return int(stripped)


def _shown(studio: Studio, settings: Settings, preset: Preset) -> dict[str, Any]:
    """What the form shows of `settings`, by name."""
    at = ranges(preset)
    shown = settings.model_dump(include=set(NAMES) - set(BEGINS)) | {"prompt": written(settings)}
    shown["pace"] = pace.of_settings(settings, studio.engine.grid)
    # The slider's steps are whole latents from 0 on; a single picture lies between the first two.
    frames = settings.num_frames
    shown["seconds"] = (frames - 1 if frames > 1 else 1) / settings.fps
    shown["seed"], shown["loras"] = str(settings.seed), list(settings.loras)
    if settings.negative_prompt == preset.negative_prompt:
        shown["negative_prompt"] = ""
    return {name: at[name]["value"] if value is None else value for name, value in shown.items()}


def fill(
    studio: Studio, request: GenerationRequest, preset_name: object = None, *, began_with_picture: bool = False,
    began_with_video: bool = False, continue_from: str = "",
) -> list[Any]:  # fmt: skip
    """Updates that make the form show a stored request; a picture or a video file has to be given again. `continue_from`: the
    job that is to go on, with a seed to be drawn. Raises `RequestError` for what cannot be made here."""
    preset = studio.preset(preset_name)
    settings = studio.resolve(request, preset.name)
    at, shown = ranges(preset), {**_shown(studio, settings, preset), "preset": preset.name, "stored": settings}
    shown |= {"start_image": None, "continue_video": None, "continue_from": continue_from, "join": True}
    if continue_from:
        shown["seed"] = ""
    updates = []
    for name in NAMES:
        value, changes = shown[name], {}
        if name in at:
            changes = {"minimum": min(at[name]["minimum"], value), "maximum": max(at[name]["maximum"], value)}
        elif name == "start_image":
            changes = {"label": PICTURE_AGAIN if began_with_picture else PICTURE}
        elif name == "continue_video":
            changes = {"label": VIDEO_AGAIN if began_with_video else VIDEO}
        elif name in BEGINS:
            changes = {"visible": bool(continue_from)}
        elif name == "negative_prompt":
            changes = {"placeholder": preset.negative_prompt[:80] if settings.negative_prompt else NO_NEGATIVE}
        updates.append(gr.update(value=value, **changes))
    return updates


def choose_preset(studio: Studio, preset_name: str) -> list[Any]:
    """Updates for a newly chosen preset: its limits and values; prompt and seed stay."""
    preset = studio.preset(preset_name)
    at = ranges(preset)
    updates = []
    for name in NAMES:
        if name in at:
            updates.append(gr.update(**at[name]))
        elif name in ("width", "height", *CHOICES):
            updates.append(gr.update(value=getattr(preset, name)))
        elif name == "pace":
            updates.append(gr.update(value=pace.of_preset(preset)))
        elif name == "stored":
            updates.append(gr.update(value=None))
        elif name == "loras":
            updates.append(gr.update(value=list(preset.loras)))
        elif name == "negative_prompt":
            updates.append(gr.update(placeholder=preset.negative_prompt[:80] or NO_NEGATIVE))
        elif name == "preset":
            updates.append(gr.update(info=preset.hardware or None))
        else:
            updates.append(gr.skip())
    return updates


def roll() -> str:
    """A seed short enough to remember."""
    return str(random.randrange(SHORT_SEEDS))
