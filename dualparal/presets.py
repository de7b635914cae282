"""Presets: one TOML file per model and resolution, with the values a request leaves out, limits and hardware notes.

The project's own presets lie in `presets/`; a user's folder (DUALPARAL_PRESETS, or `--presets`) is read too and wins. An
unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualparal.errors import PresetError, RequestError
from dualparal.request import ContextName, GenerationRequest, ScheduleName, frames_of_latents, nearest, shown

PACKAGE = Path(__file__).resolve().parent
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OWN_FOLDERS = (PACKAGE.parent / "presets", PACKAGE / "_presets")  # source tree, installed wheel


class Limits(BaseModel):
    """The largest values a request may ask of a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = Field(default=300.0, gt=0, description="longest video in seconds")
    num_inference_steps: int = Field(default=200, ge=1, description="most denoising steps")
    num_per_block: int = Field(default=64, ge=1, description="longest block in latent frames")
    pixels: int = Field(default=8192 * 8192, ge=256, description="largest picture, height x width")

    def check(self, request: GenerationRequest) -> None:
        """Raise `RequestError` if the resolved `request` asks for more than these limits."""
        assert request.latents_num and request.fps and request.height and request.width
        num_frames = frames_of_latents(request.latents_num)
        # One latent more than the seconds say: lengths are rounded up to whole latents.
        if num_frames > self.seconds * request.fps + 4:
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
    """Defaults for one model at one resolution. The field names are those of `GenerationRequest`."""

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
    flow_shift: float = 3.0
    num_per_block: int = 8
    num_cat: int = 8
    schedule: ScheduleName = "paper"
    context: ContextName = "recomputed"
    negative_prompt: str = ""
    examples: tuple[str, ...] = ()
    limits: Limits = Limits()


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
    for prompt in preset.examples or ("",):
        GenerationRequest(prompt=prompt).resolve(preset, num_experts=num_experts)
    if preset.num_cat > preset.num_per_block:  # `resolve` takes the smaller one
        raise RequestError(f"num_cat={preset.num_cat} is more than num_per_block={preset.num_per_block}", "num_cat")


def preset_folders(extra: Path | None = None) -> Iterator[Path]:
    """Folders searched for presets, the user's last so that they win."""
    yield from (folder for folder in OWN_FOLDERS if folder.is_dir())
    named = os.environ.get("DUALPARAL_PRESETS")
    for folder in (Path(named) if named else None, extra):
        if folder is not None:
            if not folder.is_dir():
                raise PresetError(f"{folder} is not a folder of presets; create it or name another one")
            yield folder


def load_presets(extra: Path | None = None) -> dict[str, Preset]:
    """All presets by name; a later folder's preset replaces an earlier one of the same name."""
    return {path.stem: load_preset(path) for folder in preset_folders(extra) for path in sorted(folder.glob("*.toml"))}


def find_preset(model: str, presets: dict[str, Preset] | None = None) -> Preset:
    """The preset named `model`, or the first one for the hub id or folder `model`, or plain defaults."""
    presets = load_presets() if presets is None else presets
    if model in presets:
        return presets[model]
    for preset in presets.values():
        if preset.model == model:
            return preset
    if not os.path.isdir(model) and not HUB_ID.fullmatch(model):
        hint = f"; did you mean '{nearest(model, list(presets))}'?" if presets else ""
        raise PresetError(f"{shown(model)} is neither a preset, a folder nor a hub id (owner/name){hint}")
    return Preset(model=model)
