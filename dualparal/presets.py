"""Presets: one TOML file per model and resolution, with the values a request leaves out, limits and hardware notes; and how
they complete a request.

The project's own presets lie in `presets/`; a user's folder (DUALPARAL_PRESETS, or `--presets`) is read too and wins. An
unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import os
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualparal.errors import PresetError, RequestError
from dualparal.method.endless import first_horizon
from dualparal.method.rules import POLICIES, settle_names, settle_rules
from dualparal.method.timeline import settle_shots
from dualparal.paths import expand, is_folder, why_missing
from dualparal.request import (
    AUTO,
    MAX_LATENTS,
    TEMPORAL_FACTOR,
    AskedContext,
    AskedSchedule,
    GenerationRequest,
    Settings,
    SolverName,
    latents_of_seconds,
    nearest,
    shown,
)

PACKAGE = Path(__file__).resolve().parent
MIN_CACHED_STEPS = 8  # with step caching: of fewer, the first three and the last are all but all
FLOW_SHIFT = 3.0  # where neither request, preset nor checkpoint says
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OWN_FOLDERS = (PACKAGE.parent / "presets", PACKAGE / "_presets")  # source tree, installed wheel


class Limits(BaseModel):
    """The largest values a request may ask of a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = Field(default=300.0, gt=0, description="longest video in seconds")
    num_inference_steps: int = Field(default=200, ge=1, description="most denoising steps")
    num_per_block: int = Field(default=64, ge=1, description="longest block in latent frames")
    pixels: int = Field(default=8192 * 8192, ge=256, description="largest picture, height x width")

    def check(self, request: Settings) -> None:
        """Raise `RequestError` if `request` asks for more than these limits."""
        num_frames = request.num_frames
        # One latent more than the seconds say: lengths are rounded up to whole latents.
        if num_frames > self.seconds * request.fps + 4 and not request.is_endless:
            most = int(self.seconds * request.fps)
            raise RequestError(
                f"{num_frames} frames ({num_frames / request.fps:.1f} s) are more than this preset's limit of "
                f"{most} frames ({self.seconds:g} s); ask for a shorter video",
                "seconds",
            )
        for name in ("num_inference_steps", "num_per_block"):
            value, limit = getattr(request, name), getattr(self, name)
            if value > limit:
                raise RequestError(f"{name}={value} is more than this preset's limit of {limit}", name)
        if request.height * request.width > self.pixels:
            raise RequestError(
                f"height={request.height} x width={request.width} is more than this preset's limit of "
                f"{self.pixels} pixels; ask for a smaller picture",
                "height",
            )


class Preset(BaseModel):
    """Defaults for one model at one resolution. The names of `GenerationRequest`'s fields are theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(default="custom", description="file name without .toml")
    title: str = Field(default="Custom checkpoint", description="what the page shows")
    model: str = Field(default="", description="hub id, folder, or 'pocket'")
    revision: str | None = Field(default=None, description="commit of the hub repository")
    hardware: str = Field(default="", description="one line on the hardware needed")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="dtype of the DiT")
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of the VAE")
    seconds: float = Field(default=5.0, gt=0)
    height: int = Field(default=480, ge=16)
    width: int = Field(default=832, ge=16)
    fps: int = Field(default=16, ge=1)
    num_inference_steps: int = Field(default=50, ge=1)
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None  # the checkpoint's
    solver: SolverName = "unipc"
    loras: tuple[str, ...] = ()
    num_per_block: int = 8
    num_cat: int = 8
    schedule: AskedSchedule = AUTO
    context: AskedContext = AUTO
    negative_prompt: str = ""
    examples: tuple[str, ...] = ()
    limits: Limits = Limits()


USUAL = GenerationRequest(prompt="any")  # what a preset is for: all but the prompt comes from it


def complete(
    request: GenerationRequest, preset: Preset, *, ranks: int = 1, rings: int = 1, num_experts: int = 1,
    boundary_ratio: float | None = None, flow_shift: float | None = None, model: str | None = None, has_room: bool = False,
) -> Settings:  # fmt: skip
    """`request` with every field filled: own values first, then `preset`'s, then the checkpoint's; a left-out seed is drawn,
    and the schedule's policy becomes numbers for an engine of `rings` rings of `ranks` ranks. `has_room`: whether K and V of
    `preview` with cached context fit, where that is left open (`planning.room` knows).

    `boundary_ratio`, `flow_shift` are the checkpoint's, `model` its name (default: the preset's). Raises `RequestError` when a
    value is outside the preset's limits or the values do not fit each other.
    """
    own = request.model_dump(exclude={"num_frames", "seconds", "takes"}, exclude_none=True)
    checkpoint = {"boundary_ratio": boundary_ratio, "flow_shift": flow_shift or FLOW_SHIFT}
    values = checkpoint | preset.model_dump(include=set(Settings.model_fields), exclude_none=True) | own
    if request.num_cat is None:
        values["num_cat"] = min(preset.num_cat, values["num_per_block"])
    values |= {"model": preset.model if model is None else model, **_length(request, preset, values)}
    values["schedule"], values["context"] = settle_names(request, preset.schedule, preset.context, has_room=has_room)
    values.setdefault("guidance_scale_2", values["guidance_scale"])
    values.setdefault("seed", secrets.randbelow(2**31))
    if num_experts == 1:
        values["boundary_ratio"] = None
    elif values["boundary_ratio"] is None:
        raise RequestError(
            "boundary_ratio is missing: the model has two experts and neither its preset nor its checkpoint says "
            "where to switch; give boundary_ratio (0.875 for Wan2.2-T2V-A14B)",
            "boundary_ratio",
        )
    settings = settle_rules(Settings(**values), request, ranks, rings)
    if settings.cache_interval > 1 and settings.num_inference_steps < MIN_CACHED_STEPS:
        raise RequestError(
            f"cache_interval={settings.cache_interval}: with {settings.num_inference_steps} steps there is too little to "
            f"extrapolate from; use at least {MIN_CACHED_STEPS} steps, or leave step caching out",
            "cache_interval",
        )
    preset.limits.check(settings)
    return settings


def weights_of(model: str, preset: Preset) -> tuple[str, str | None]:
    """(hub id, folder or "pocket", commit) of the weights that `model` names; the settings are `preset`'s, which may be another
    model's. Raises `PresetError`."""
    named = preset if model in (preset.name, preset.model) else find_preset(model)
    return named.model or model, named.revision


def model_name(weights: str) -> str:
    """How settings name weights: the hub id, or a folder's name without its path, which is nobody's business who gets a
    video."""
    return os.fsencode(Path(weights).name).decode(errors="replace") if is_folder(weights) else weights


def restore(values: Mapping[str, Any]) -> Settings:
    """Settings as a job's record keeps them; what older records lack is as it was. Raises `RequestError`."""
    policy = POLICIES.get(str(values.get("schedule")))
    return Settings(**({"left_context": policy.left_context} if policy else {}) | dict(values))


def _length(request: GenerationRequest, preset: Preset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Latent frames of the video that `request` asks for, and of its shots; of an endless one as far as it is planned."""
    fps, shots = values["fps"], request.shots
    if request.is_endless:
        begins = {"is_continued": request.continue_from is not None, "has_picture": request.start_image is not None}
        length = first_horizon(shots or (), values["num_per_block"], values["num_cat"], **begins)
        if shots is None:
            return {"latents_num": length}
        shots = (*shots[:-1], shots[-1].model_copy(update={"seconds": None, "latents_num": length}))
    if shots is None:
        return {"latents_num": _latents(request, preset, fps)}
    shots = settle_shots(shots, fps, is_continued=request.continue_from is not None)
    return {"shots": shots, "latents_num": sum(shot.latents_num or 0 for shot in shots)}


def _latents(request: GenerationRequest, preset: Preset, fps: int) -> int:
    if request.latents_num is not None:
        return int(request.latents_num)
    if request.num_frames is not None:
        field, latents_num = "num_frames", (request.num_frames - 1) // TEMPORAL_FACTOR + 1
    else:
        is_continued = request.continue_from is not None
        seconds = request.seconds or preset.seconds
        field, latents_num = "seconds", latents_of_seconds(seconds, fps, is_continued=is_continued)
    if latents_num > MAX_LATENTS:
        raise RequestError(
            f"{field}={getattr(request, field) or preset.seconds:g} is {latents_num} latent frames at {fps} fps; "
            f"the limit is {MAX_LATENTS}, ask for a shorter video",
            field,
        )
    return int(latents_num)


def load_preset(path: Path) -> Preset:
    """Read one TOML file; raises `PresetError` naming the file, the key at fault and the nearest valid key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PresetError(f"{path}: cannot be read as TOML: {error}") from None
    return _checked(path.stem, values, str(path))


def _checked(name: str, values: dict[str, Any], where: str) -> Preset:
    if "name" in values:
        raise PresetError(f"{where}: unknown key 'name'; a preset is named by its file, rename that")
    try:
        preset = Preset(name=name, **values)
        _check_usable(preset)
        return preset
    except RequestError as error:
        raise PresetError(f"{where}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            valid = Limits.model_fields if key.startswith("limits.") else Preset.model_fields
            near = nearest(key.split(".")[-1], list(valid))
            raise PresetError(f"{where}: unknown key {shown(key)}; did you mean '{near}'?") from None
        raise PresetError(f"{where}: {key}={shown(first['input'])}: {first['msg']}") from None


def _check_usable(preset: Preset) -> None:
    """A preset's own values and examples must make valid requests within its own limits."""
    num_experts = 1 if preset.boundary_ratio is None else 2
    for prompt in preset.examples or ("any",):
        complete(GenerationRequest(prompt=prompt), preset, num_experts=num_experts)
    if preset.num_cat > preset.num_per_block:  # `complete` takes the smaller one
        raise RequestError(f"num_cat={preset.num_cat} is more than num_per_block={preset.num_per_block}", "num_cat")


def preset_folders(extra: str | Path | None = None) -> Iterator[Path]:
    """Folders searched for presets, the user's last so that they win."""
    yield from (folder for folder in OWN_FOLDERS if folder.is_dir())
    named = os.environ.get("DUALPARAL_PRESETS")
    for given in (named, extra):
        if given:
            folder = expand(given)
            if not is_folder(folder):
                raise PresetError(f"{given} is not a folder of presets{why_missing(folder)}; create it or name another one")
            if not os.access(folder, os.R_OK | os.X_OK):
                raise PresetError(f"{given} cannot be read: it is another user's; name another one")
            yield folder


def load_presets(extra: str | Path | None = None) -> dict[str, Preset]:
    """All presets by name; a later folder's preset replaces an earlier one of the same name."""
    return {path.stem: load_preset(path) for folder in preset_folders(extra) for path in sorted(folder.glob("*.toml"))}


def find_preset(model: str, presets: dict[str, Preset] | None = None) -> Preset:
    """The preset named `model`, or the first one for the hub id or folder `model` as it is, or plain defaults."""
    presets = load_presets() if presets is None else presets
    if model in presets:
        return presets[model]
    for preset in sorted(presets.values(), key=lambda preset: bool(preset.loras)):  # LoRAs are for those who ask for them
        if preset.model == model:
            return preset
    if not is_folder(model) and not HUB_ID.fullmatch(model):
        hint = f"; did you mean '{nearest(model, list(presets))}'?" if presets else ""
        raise PresetError(f"{shown(model)} is neither a preset, a folder nor a hub id (owner/name){hint}")
    return Preset(model=model)
