"""The form on the left: every setting of a request, with limits from the preset and one line on what it does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dualparal.errors import RequestError
from dualparal.presets import Preset
from dualparal.request import CONTEXTS, TEMPORAL_FACTOR, GenerationRequest, frames_of_latents
from dualparal.ui import pace
from dualparal.ui.studio import Studio

NAMES = (
    "prompt", "negative_prompt", "preset", "seconds", "seed", "pace", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "guidance_start", "guidance_stop", "flow_shift", "boundary_ratio", "num_per_block", "num_cat",
    "context", "width", "height", "rules",
)  # fmt: skip
WHOLE = ("num_inference_steps", "num_per_block", "num_cat", "width", "height")
LENGTH_INFO = "More seconds take more time, hardly more memory."
CHOICES = {"context": CONTEXTS}
TWO_EXPERTS = ("guidance_scale_2", "boundary_ratio")
INTERVAL = {"guidance_start": 0, "guidance_stop": 1}  # the values at which every step has guidance, as when they are left out
NO_NEGATIVE = "what it should not show"


@dataclass(frozen=True)
class Form:
    """The form's components by name; `inputs` and the values that come back from the page are in the order of NAMES.

    "pace" is a place of `ui/pace.py`. "rules" is not shown: what `pace.exact` keeps of a request that was filled in, or None.
    """

    parts: dict[str, Any]
    dice: gr.Button

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
    parts["negative_prompt"] = gr.Textbox(
        label="Keep out (negative prompt)", placeholder=preset.negative_prompt[:80] or NO_NEGATIVE, lines=1, max_lines=4
    )
    parts["preset"] = gr.Dropdown(
        [(p.title, p.name) for p in studio.usable_presets()], value=preset.name, label="Model and size", filterable=False,
        info=preset.hardware or None, elem_id="preset",
    )  # fmt: skip
    parts["seconds"] = gr.Slider(**at["seconds"], label="Length in seconds", info=LENGTH_INFO, elem_id="seconds")
    parts["pace"] = gr.Slider(
        pace.SMOOTHEST, pace.SOONEST, pace.of_preset(preset), step=1, label=pace.LABEL, info=pace.INFO, elem_id="pace"
    )
    parts["rules"] = gr.State(None)
    with gr.Row(elem_classes="seed-row"):
        # A text box: Gradio's Number shows an empty value as 0, and a browser's numbers end at 2**53.
        parts["seed"] = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, min_width=80, elem_id="seed")
        dice = gr.Button("⚄", elem_id="dice", min_width=44, scale=0)
    with gr.Column(elem_id="advanced"):
        # Not an Accordion. Gradio makes what is in a closed one when it is opened, and a moment later sets it to the values it
        # had: what was typed in between is gone (seen after 40 ms, on a busy machine 200). Here style.css hides the parts.
        gr.HTML("<details><summary>Advanced</summary></details>", apply_default_css=False)
        with gr.Column(elem_id="advanced-parts"):
            _advanced(parts, preset, at, two)
    return Form(parts, dice)


def _advanced(parts: dict[str, Any], preset: Preset, at: dict[str, dict[str, Any]], two: bool) -> None:
    for name, (label, info) in ADVANCED.items():
        if name in CHOICES:
            value = getattr(preset, name)
            parts[name] = gr.Dropdown(list(CHOICES[name]), value=value, label=label, info=info, filterable=False)
        else:
            parts[name] = gr.Slider(**at[name], label=label, info=info, visible=two or name not in TWO_EXPERTS)
    with gr.Row(elem_classes="size-row"):
        for name, label in (("width", "Width"), ("height", "Height")):
            parts[name] = gr.Number(getattr(preset, name), label=label, precision=0, minimum=16, min_width=80)


ADVANCED = {
    "num_inference_steps": ("Denoising steps", "More steps: cleaner pictures, longer wait in proportion."),
    "guidance_scale": ("Guidance", "How closely the prompt is followed; at 1 or less it is off and a step costs half."),
    "guidance_scale_2": ("Guidance, low-noise expert", "The same for the second expert, which paints the details."),
    "guidance_start": ("Guidance from", "Share of the steps that run without guidance first; each of them costs half."),
    "guidance_stop": ("Guidance until", "Share of the steps after which guidance is off."),
    "boundary_ratio": ("Switch between experts", "Share of the noise range that the low-noise expert takes."),
    "flow_shift": ("Flow shift", "Higher spends more steps on the rough composition; larger pictures want more."),
    "num_per_block": ("Latent frames per block", "Longer blocks are steadier and need more memory."),
    "num_cat": ("Context", "Latent frames of each neighbour a block sees; 0 makes blocks independent."),
    "context": ("Left context", "“recomputed” as in the paper; “cached” keeps the neighbour’s keys and values: less work."),
}


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
        "guidance_start": {"minimum": 0, "maximum": 1, "step": 0.05, "value": INTERVAL["guidance_start"]},
        "guidance_stop": {"minimum": 0, "maximum": 1, "step": 0.05, "value": INTERVAL["guidance_stop"]},
        "boundary_ratio": {"minimum": 0, "maximum": 1, "step": 0.005, "value": boundary},
        "flow_shift": {"minimum": 0.1, "maximum": 20, "step": 0.1, "value": preset.flow_shift},
        "num_per_block": {"minimum": 1, "maximum": limits.num_per_block, "step": 1, "value": preset.num_per_block},
        "num_cat": {"minimum": 0, "maximum": most_cat, "step": 1, "value": min(preset.num_cat, most_cat)},
    }  # fmt: skip


def read(studio: Studio, values: Sequence[Any]) -> tuple[GenerationRequest, Any]:
    """The request that the form's values stand for, and the preset's name. Raises `RequestError`."""
    found = dict(zip(NAMES, values, strict=True))
    preset_name = found.pop("preset")
    preset = studio.preset(preset_name)
    for name in WHOLE:
        if isinstance(found[name], float):
            if not found[name].is_integer():
                raise RequestError(f"{name}={found[name]:g} must be a whole number", name)
            found[name] = int(found[name])
    found["seed"] = _seed(found["seed"])
    if not str(found["prompt"] or "").strip():
        raise RequestError("the prompt is empty; say what the video should show", "prompt")
    if found["seconds"] == 0:  # the slider's left end: a single picture
        found["seconds"], found["latents_num"] = None, 1
    if studio.engine.num_experts < 2:
        found["guidance_scale_2"] = found["boundary_ratio"] = None
    place, rules = found.pop("pace"), found.pop("rules") or {}
    found["negative_prompt"] = found["negative_prompt"] or rules.get("negative_prompt")
    for name, whole in INTERVAL.items():
        if found[name] == whole and rules.get(name) != whole:
            found[name] = None
    if place not in range(pace.SMOOTHEST, pace.SOONEST + 1):
        raise RequestError(f"smoothest to soonest is a whole number from {pace.SMOOTHEST} to {pace.SOONEST}", "schedule")
    found |= {name: rules.get(name) for name in pace.CACHE}
    request = GenerationRequest(fps=rules.get("fps") or preset.fps, **found)
    if "schedule" in rules:
        chosen = {name: rules[name] for name in pace.SCHEDULE}
    else:
        chosen = pace.fields(studio, request, preset_name, int(place))
    return request.model_copy(update=chosen), preset_name


def _seed(text: object) -> int | None:
    stripped = str(text or "").strip()
    if not stripped:
        return None
    if not (stripped.isascii() and stripped.isdecimal()) or len(stripped) > 19:
        raise RequestError("the seed must be a whole number from 0 on; leave it empty to draw a new one each time", "seed")
    return int(stripped)


def fill(studio: Studio, request: GenerationRequest, preset_name: object = None) -> list[Any]:
    """Updates that make the form show a stored request. Raises `RequestError` for a preset that is not usable here."""
    preset = studio.preset(preset_name)
    resolved = request if request.is_resolved else request.resolve(preset, num_experts=studio.engine.num_experts)
    preset.limits.check(resolved)
    at = ranges(preset)
    assert resolved.latents_num and resolved.fps
    stored = resolved.model_dump()
    stored["preset"] = preset.name
    stored["pace"], stored["rules"] = pace.of_request(studio, resolved, preset.name), pace.exact(resolved)
    stored["seconds"] = (frames_of_latents(resolved.latents_num) - 1) / resolved.fps
    stored["seed"] = str(resolved.seed)
    if stored["negative_prompt"] == preset.negative_prompt:
        stored["negative_prompt"] = ""
    updates = []
    for name in NAMES:
        value, changes = stored[name], {}
        if name in at:
            value = at[name]["value"] if value is None else value
            changes = {"minimum": min(at[name]["minimum"], value), "maximum": max(at[name]["maximum"], value)}
        elif name == "negative_prompt":
            changes = {"placeholder": preset.negative_prompt[:80] if resolved.negative_prompt else NO_NEGATIVE}
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
        elif name == "rules":
            updates.append(gr.update(value=None))
        elif name == "negative_prompt":
            updates.append(gr.update(placeholder=preset.negative_prompt[:80] or NO_NEGATIVE))
        elif name == "preset":
            updates.append(gr.update(info=preset.hardware or None))
        else:
            updates.append(gr.skip())
    return updates


def roll() -> str:
    """A seed short enough to remember."""
    return str(random.randrange(10**6))
