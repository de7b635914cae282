"""What a caller asks for: fields, units, limits, and the arithmetic between seconds, frames and latent frames.

A `GenerationRequest` may leave almost everything out; `resolve(preset)` fills it from the model's preset. Bad values raise
`RequestError` before anything is loaded or queued. Knows no process and no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dualparal.errors import RequestError

if TYPE_CHECKING:
    from dualparal.presets import Preset

TEMPORAL_FACTOR = 4  # frames folded into one latent frame by the Wan VAE (the first latent holds one frame)
MAX_PROMPT_CHARS = 4000
MAX_LATENTS = 100_000
MAX_SEED = 2**63 - 1
SCHEDULES = ("paper", "preview")
CONTEXTS = ("recomputed", "cached")

ScheduleName = Literal["paper", "preview"]
ContextName = Literal["recomputed", "cached"]
Guidance = Annotated[float, Field(ge=0.0, le=100.0)]


def frames_of_latents(latents_num: int) -> int:
    """Video frames that `latents_num` latent frames decode to: (latents_num - 1) * 4 + 1."""
    return (latents_num - 1) * TEMPORAL_FACTOR + 1


def latents_of_seconds(seconds: float, fps: int) -> int:
    """Latent frames whose video lasts at least `seconds` at `fps`: 4 * ceil((seconds * fps - 1) / 4) + 1 frames."""
    return max(1, math.ceil((seconds * fps - 1) / TEMPORAL_FACTOR - 1e-9) + 1)


# What a resolved request may leave open: other ways to give the length, and what the checkpoint or the event model decides.
OPTIONAL = {
    "num_frames", "seconds", "boundary_ratio", "max_in_flight", "stagger", "micro_batches", "guidance_start", "guidance_stop",
    "cache_interval", "cache_order", "disable_cache_before_step", "disable_cache_after_step",
}  # fmt: skip


class GenerationRequest(BaseModel):
    """One video to make. Fields left at None are filled from the model's preset by `resolve`.

    Give the length once: `latents_num` (latent frames), `num_frames` (video frames, 4k + 1) or `seconds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(strict=True, description="what the video shows")
    negative_prompt: str | None = Field(None, strict=True, description="what it must not show; used when guidance_scale > 1")
    latents_num: int | None = Field(None, ge=1, le=MAX_LATENTS, description="length in latent frames")
    num_frames: int | None = Field(None, ge=1, le=400_000, description="length in video frames, 4k + 1")
    seconds: float | None = Field(None, gt=0, le=25_000, description="length in seconds")
    height: int | None = Field(None, ge=16, le=8192, description="picture height in pixels, a multiple of 16")
    width: int | None = Field(None, ge=16, le=8192, description="picture width in pixels, a multiple of 16")
    fps: int | None = Field(None, ge=1, le=120, description="frames per second of the video file")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="denoising steps")
    guidance_scale: Guidance | None = Field(None, description="classifier-free guidance; at most 1 turns it off")
    guidance_scale_2: Guidance | None = Field(None, description="guidance of the low-noise expert (two-expert models)")
    guidance_start: float | None = Field(None, ge=0, le=1, description="share of the steps before which guidance is off")
    guidance_stop: float | None = Field(None, ge=0, le=1, description="share of the steps from which on guidance is off")
    boundary_ratio: float | None = Field(
        None, ge=0.0, le=1.0, description="share of the noise range that the low-noise expert takes (two-expert models)"
    )
    flow_shift: float | None = Field(None, gt=0.0, le=100.0, description="shift of the noise schedule")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed of the initial noise; drawn if left out")
    num_per_block: int | None = Field(None, ge=1, le=1024, description="latent frames per block")
    num_cat: int | None = Field(None, ge=0, le=1024, description="latent frames of context on each side of a block")
    schedule: ScheduleName | None = Field(None, description="order in which blocks are denoised")
    context: ContextName | None = Field(None, description="whether the left context is recomputed or cached as K and V")
    max_in_flight: int | None = Field(None, ge=1, le=1024, description="blocks denoised at once (schedule preview)")
    stagger: int | None = Field(None, ge=1, le=1000, description="steps between neighbouring blocks (schedule preview)")
    micro_batches: bool | None = Field(None, description="whether guidance halves travel one by one")
    cache_interval: int | None = Field(
        None, ge=1, le=1000, description="every n-th step is computed, the others are extrapolated (TaylorSeer); 1 is off"
    )
    cache_order: int | None = Field(None, ge=0, le=2, description="order of that extrapolation, 1 if left out")
    disable_cache_before_step: int | None = Field(
        None, ge=1, le=1000, description="steps before it are computed, also after a change of expert; 3 if left out"
    )
    disable_cache_after_step: int | None = Field(
        None, ge=0, le=1000, description="steps from it on are computed; the last one always is"
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_sentence(error) from None
        _check_lengths(self)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "micro_batches":
            raise ValueError("true and false are not values of this field")
        return value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _usable_text(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if len(text) > MAX_PROMPT_CHARS:
            raise ValueError(f"{len(text)} characters are too many; the limit is {MAX_PROMPT_CHARS}, shorten it")
        if any("\ud800" <= ch <= "\udfff" for ch in text):
            raise ValueError("half a surrogate pair is not a character; type or paste the text again")
        # Control characters break logs and players.
        return "".join(ch for ch in text if ch in "\n\t" or (ord(ch) >= 32 and ord(ch) != 127))

    @field_validator("height", "width")
    @classmethod
    def _multiple_of_16(cls, size: int | None) -> int | None:
        if size is not None and size % 16:
            low = size // 16 * 16
            raise ValueError(f"not divisible by 16; use {low or 16} or {low + 16}")
        return size

    @field_validator("num_frames")
    @classmethod
    def _whole_latents(cls, num_frames: int | None) -> int | None:
        if num_frames is not None and num_frames % TEMPORAL_FACTOR != 1:
            low = (num_frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
            raise ValueError(f"must be 4k + 1; use {low} or {low + TEMPORAL_FACTOR}")
        return num_frames

    @property
    def is_resolved(self) -> bool:
        """True when nothing is left to the preset."""
        return all(getattr(self, name) is not None for name in type(self).model_fields if name not in OPTIONAL)

    def resolve(self, preset: Preset, *, num_experts: int = 1, boundary_ratio: float | None = None) -> GenerationRequest:
        """The same request with every field filled: own values first, then `preset`'s, then the checkpoint's.

        `boundary_ratio` is the checkpoint's. The length becomes `latents_num`; a left-out seed is drawn. Raises
        `RequestError` when a value is outside the preset's limits or the values do not fit each other.
        """
        fps = self.fps or preset.fps
        values: dict[str, Any] = self.model_dump(exclude={"num_frames", "seconds"})
        values["fps"] = fps
        if self.num_frames is not None:
            values["latents_num"] = (self.num_frames - 1) // TEMPORAL_FACTOR + 1
        elif self.seconds is not None:
            values["latents_num"] = latents_of_seconds(self.seconds, fps)
        elif self.latents_num is None:
            values["latents_num"] = latents_of_seconds(preset.seconds, fps)
        if values["latents_num"] > MAX_LATENTS:
            asked = "num_frames" if self.num_frames is not None else "seconds"
            raise RequestError(
                f"{asked}={getattr(self, asked) or preset.seconds:g} is {values['latents_num']} latent frames at {fps} fps; "
                f"the limit is {MAX_LATENTS}, ask for a shorter video",
                asked,
            )
        for name in PRESET_FIELDS:
            if values[name] is None:
                values[name] = getattr(preset, name)
        if self.num_cat is None:
            values["num_cat"] = min(preset.num_cat, values["num_per_block"])
        if values["guidance_scale_2"] is None:
            values["guidance_scale_2"] = values["guidance_scale"]
        if values["boundary_ratio"] is None:
            values["boundary_ratio"] = boundary_ratio
        if num_experts == 1:
            values["boundary_ratio"] = None
        elif values["boundary_ratio"] is None:
            raise RequestError(
                "boundary_ratio is missing: the model has two experts and neither its preset nor its checkpoint says "
                "where to switch; give boundary_ratio (0.875 for Wan2.2-T2V-A14B)",
                "boundary_ratio",
            )
        if (self.cache_interval or 1) > 1:
            values |= {name: value for name, value in STEP_CACHE.items() if values[name] is None}
        if values["seed"] is None:
            values["seed"] = secrets.randbelow(2**31)
        resolved = GenerationRequest(**values)
        preset.limits.check(resolved)
        return resolved

    def to_json(self) -> str:
        """The fields that are set, as one JSON object (what `request.json` and the mp4's metadata hold)."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> GenerationRequest:
        """The inverse of `to_json`; raises `RequestError` for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError("the stored settings are not JSON; they were not written by this program") from None
        if not isinstance(values, dict):
            raise RequestError("the stored settings are not a JSON object; they were not written by this program")
        return cls(**values)


PRESET_FIELDS = (
    "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "guidance_scale_2",
    "boundary_ratio", "flow_shift", "num_per_block", "schedule", "context",
)  # fmt: skip
STEP_CACHE = {"cache_order": 1, "disable_cache_before_step": 3}  # where caching is on; as diffusers' TaylorSeerCacheConfig


def _check_lengths(request: GenerationRequest) -> None:
    given = [name for name in ("latents_num", "num_frames", "seconds") if getattr(request, name) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} both give the length; give one of them", given[1])
    per_block, num_cat = request.num_per_block, request.num_cat
    if per_block is not None and num_cat is not None and num_cat > per_block:
        raise RequestError(
            f"num_cat={num_cat} is more than num_per_block={per_block}; use num_cat between 0 and {per_block}", "num_cat"
        )


def _one_sentence(error: ValidationError) -> RequestError:
    """The first of pydantic's findings as: field=value: what is wrong (what the field is)."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else "request"
    if first["type"] == "extra_forbidden":
        known = list(GenerationRequest.model_fields)
        near = nearest(field, known)
        name = field if field.isidentifier() and len(field) <= 60 else shown(field)
        return RequestError(
            f"{name} is not a field of a request; did you mean {near}? (known fields: {', '.join(known)})", name
        )
    if first["type"] == "missing":
        return RequestError(f"{field} is missing: {_describe(field)}", field)
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{field}={shown(first['input'])}: {what} ({_describe(field)})", field)


def nearest(key: str, known: Sequence[str]) -> str:
    """The one of `known` that a misspelt or shortened `key` most likely means."""
    longer = [name for name in known if key and key.lower() in name]
    return longer[0] if longer else difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)[0]


def shown(value: object) -> str:
    """A value as one short printable piece of a sentence."""
    try:
        text = repr(value)  # escapes whatever cannot be printed
    except ValueError:  # an integer of more than 4300 digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _describe(field: str) -> str:
    info = GenerationRequest.model_fields.get(field)
    return info.description if info and info.description else field
