"""What a video is: fields, units, limits, and the arithmetic between seconds, frames and latent frames.

A `GenerationRequest` is what a caller asks for and may leave almost everything out; `Settings` are a completed request. Each
field is written once, in `Settings`: flags, the API's parameters, the record of a job and the text in its mp4 are made from
it. Bad values raise `RequestError` before anything is loaded or queued. Knows no process and no torch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator

from dualparal.agreement import TEMPORAL_FACTOR as TEMPORAL_FACTOR
from dualparal.agreement import check_together
from dualparal.errors import RequestError
from dualparal.prompts import MAX_PROMPT_CHARS as MAX_PROMPT_CHARS
from dualparal.prompts import Shot, checked_shots, split_timeline, usable_text
from dualparal.prompts import shown as shown

MAX_LATENTS = 100_000
MAX_SEED = 2**63 - 1
MAX_TAKES = 4
MAX_LORAS = 16
MAX_LORA_CHARS = 1000
ScheduleName = Literal["paper", "preview"]  # each is an entry of method.rules.POLICIES
SolverName = Literal["unipc", "euler", "dpm++"]
ContextName = Literal["recomputed", "cached"]
AskedSchedule = Literal[ScheduleName, "auto"]
AskedContext = Literal[ContextName, "auto"]
LeftContext = Literal["latest", "own_step"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
CONTEXTS: tuple[ContextName, ...] = get_args(ContextName)
AUTO: Literal["auto"] = "auto"  # of schedule and context: chosen together, for the devices at hand, when a job is submitted
CHOSEN = {"schedule": AskedSchedule, "context": AskedContext}
Guidance = Annotated[float, Field(ge=0.0, le=100.0)]


def frames_of_latents(latents_num: int) -> int:
    """Video frames that `latents_num` latent frames decode to: (latents_num - 1) * 4 + 1."""
    return (latents_num - 1) * TEMPORAL_FACTOR + 1


def latents_of_seconds(seconds: float, fps: int, *, is_continued: bool = False) -> int:
    """Latent frames whose video lasts at least `seconds` at `fps`: 4 * ceil((seconds * fps - 1) / 4) + 1 frames; where it goes
    on from another, 4 * ceil(seconds * fps / 4)."""
    lacking = 0 if is_continued else TEMPORAL_FACTOR - 1
    return max(1, math.ceil((seconds * fps + lacking) / TEMPORAL_FACTOR - 1e-9))


class _Described(BaseModel):
    """What requests and settings share: frozen, checked on construction, errors of one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_sentence(error, type(self)) from None
        check_together(self)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false are not values of this field")
        return value

    @field_validator("prompt", "negative_prompt", check_fields=False)
    @classmethod
    def _usable_text(cls, text: str | None) -> str | None:
        return None if text is None else usable_text(text)

    @field_validator("shots", mode="before", check_fields=False)
    @classmethod
    def _usable_shots(cls, shots: Any) -> tuple[Shot, ...] | None:
        return None if shots is None else checked_shots(shots)

    @field_validator("loras", mode="before", check_fields=False)
    @classmethod
    def _usable_loras(cls, given: Any) -> Any:
        if given is None:
            return None
        if isinstance(given, str) or not isinstance(given, (list, tuple)):
            raise ValueError("not a list; give one of names, each with :scale behind it or not")
        named = tuple(one.strip() if isinstance(one, str) else one for one in given)
        if bad := [one for one in named if not isinstance(one, str) or not 0 < len(one) <= MAX_LORA_CHARS or "\0" in one]:
            raise ValueError(f"{shown(bad[0])} is no name of a LoRA")
        if len(named) > MAX_LORAS:
            raise ValueError(f"{len(named)} LoRAs; a video takes at most {MAX_LORAS}")
        return () if named == ("none",) else named

    @field_validator("height", "width", check_fields=False)
    @classmethod
    def _multiple_of_16(cls, size: int | None) -> int | None:
        if size is not None and size % 16:
            low = size // 16 * 16
            raise ValueError(f"not divisible by 16; use {low or 16} or {low + 16}")
        return size

    def to_json(self) -> str:
        """The fields that are set, as one JSON object (what `request.json` and the mp4's metadata hold)."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False)


class Settings(_Described):
    """A completed request: what one job is made with. `presets.complete` makes it, once, when a job is submitted.

    A field with a default is one that records of older versions lack: it says what they were made with. None has a meaning.
    """

    prompt: str = Field(strict=True, description="what the video shows")
    negative_prompt: str = Field(strict=True, description="what it must not show; used when guidance_scale > 1")
    shots: tuple[Shot, ...] | None = Field(
        None, description="the film's timeline: each shot's own prompt, seconds or latents_num, and transition"
    )
    latents_num: int = Field(ge=1, le=MAX_LATENTS, description="length in latent frames")
    height: int = Field(ge=16, le=8192, description="picture height in pixels, a multiple of 16")
    width: int = Field(ge=16, le=8192, description="picture width in pixels, a multiple of 16")
    fps: int = Field(ge=1, le=120, description="frames per second of the video file")
    num_inference_steps: int = Field(
        ge=1, le=1000, description="denoising steps", json_schema_extra={"flags": ["sample_steps"]}
    )
    guidance_scale: Guidance = Field(
        description="classifier-free guidance; at most 1 turns it off", json_schema_extra={"flags": ["sample_guide_scale"]}
    )
    guidance_scale_2: Guidance = Field(
        description="guidance of the low-noise expert (two-expert models)",
        json_schema_extra={"flags": ["sample_guide_scale2"]},
    )
    guidance_start: float = Field(0.0, ge=0, le=1, description="share of the steps before which guidance is off")
    guidance_stop: float = Field(1.0, ge=0, le=1, description="share of the steps from which on guidance is off")
    boundary_ratio: float | None = Field(
        None, ge=0.0, le=1.0, description="share of the noise range that the low-noise expert takes (two-expert models)"
    )
    flow_shift: float = Field(gt=0.0, le=100.0, description="shift of the noise schedule")
    solver: SolverName = Field("unipc", description="how a step is taken; step-distilled models want euler")
    seed: int = Field(ge=0, le=MAX_SEED, description="seed of the initial noise; drawn if left out")
    num_per_block: int = Field(ge=1, le=1024, description="latent frames per block")
    num_cat: int = Field(ge=0, le=1024, description="context: latent frames that a block sees of the one on each side")
    schedule: ScheduleName = Field(description="order in which blocks are denoised; auto goes with the context")
    context: ContextName = Field(
        description="whether the left context is recomputed or cached as K and V; auto: cached where these fit, with preview"
    )
    chosen: str = Field("", description="why auto chose this schedule and context; empty where they were asked for")
    refresh: int = Field(
        0, ge=0, le=1000,
        description="after so many passes a cached left context is recomputed, and there the job can be saved; 0: never, "
        "and a job that is cut off starts again from its first block",
    )  # fmt: skip
    max_in_flight: int = Field(1024, ge=1, le=1024, description="blocks denoised at once (schedule preview)")
    stagger: int = Field(1, ge=1, le=1000, description="steps between neighbouring blocks (schedule preview)")
    left_context: LeftContext = Field(
        "latest", description="which latents of its left neighbour a block sees: the latest, or those at its own step"
    )
    micro_batches: bool = Field(False, description="whether guidance halves travel one by one")
    cache_interval: int = Field(
        1, ge=1, le=1000, description="every n-th step is computed, the others are extrapolated (TaylorSeer); 1 is off"
    )
    cache_order: int = Field(1, ge=0, le=2, description="order of that extrapolation, 1 if left out")
    disable_cache_before_step: int = Field(
        3, ge=1, le=1000, description="steps before it are computed, also after a change of expert; 3 if left out"
    )
    disable_cache_after_step: int | None = Field(
        None, ge=0, le=1000, description="steps from it on are computed; the last one always is"
    )
    start_image: str | None = Field(
        None, min_length=1, max_length=4096,
        description="a picture that the film begins with (PNG, JPEG or WebP), cropped to its size; an anchor for models that "
        "were only trained on text",
        json_schema_extra={"metavar": "PICTURE"},
    )  # fmt: skip
    loras: tuple[str, ...] = Field(
        (),
        description="LoRAs of this video alone, which run beside the weights: [high:|low:]name, path or hub id[:scale]; none: "
        "also without the preset's",
        json_schema_extra={"flags": ["with_lora"], "dest": "with_lora", "metavar": "[high:|low:]LORA[:SCALE]"},
    )  # fmt: skip
    is_endless: bool = Field(
        False, description="the film goes on until it is told to finish; it has no length, and neither has its last shot",
        json_schema_extra={"flags": ["endless"], "is_switch": True},
    )  # fmt: skip
    lead: float = Field(
        2.0, ge=0, le=25_000,
        description="seconds of an endless film that are made ahead of who watches it; no block enters while more are unplayed",
    )  # fmt: skip
    continue_from: str | None = Field(
        None, min_length=1, max_length=4096,
        description="a film to go on from: the id of a job of one's own that has ended, or a video file (mp4, mov, webm)",
        json_schema_extra={"metavar": "JOB_OR_VIDEO"},
    )  # fmt: skip
    join: bool = Field(
        False, description="the video begins with the film that it continues, which is not encoded again",
        json_schema_extra={"is_switch": True},
    )  # fmt: skip
    ghost: int = Field(0, ge=0, le=MAX_LATENTS, description="latent frames that were kept of the film that is continued")
    fitted: str = Field("", description="what was done to a video file that is continued, to fit the film's size and rate")
    num_frames_before: int = Field(0, ge=0, description="frames of the film that is continued, where they are joined")
    model: str = Field("", description="hub id or folder name of the model; empty where it is not known")

    def to_json(self) -> str:
        """As a video tells it to whoever has it, who need not know the jobs that it was made by."""
        return json.dumps(self.model_dump(exclude_none=True, exclude={"continue_from"}), ensure_ascii=False)

    @property
    def num_frames(self) -> int:
        """Frames that are made: of each scene's first latent one, of every other four."""
        num_begun = sum(shot.transition == "cut" for shot in (self.shots or ())[1:]) + (self.continue_from is None)
        return TEMPORAL_FACTOR * self.latents_num - (TEMPORAL_FACTOR - 1) * num_begun

    @property
    def all_text(self) -> str:
        """All that it is to show, for people: the prompt, and what each shot adds."""
        return " · ".join(text for text in (self.prompt, *(shot.prompt for shot in self.shots or ())) if text)

    @property
    def has_guidance(self) -> bool:
        """Whether a block step has an unconditional half, for both experts, as diffusers has it."""
        return self.guidance_scale > 1

    def as_request(self) -> GenerationRequest:
        """The request that asks for these settings again."""
        return GenerationRequest(**asked_again(self.model_dump(exclude_none=True)))


def asked_again(values: dict[str, Any]) -> dict[str, Any]:
    """Of the `values` of settings those that a request of the same has; a timeline's shots say how long it is. What a film
    begins with has to be given again: of a picture only the digest is known, and a continued film may be gone."""
    has_length = not values.get("shots") and not values.get("is_endless")
    left_out = {*NOT_ASKED, "start_image", "continue_from", "join", *(() if has_length else ("latents_num",))}
    return {name: value for name, value in values.items() if name not in left_out}


IN_PROMPT = {"shots"}  # what has no flag: it is written in the prompt
# of the fields of settings; they come of the engine, of the policy and of the film that is continued
NOT_ASKED = {"model", "left_context", "chosen", "ghost", "fitted", "num_frames_before"}


def _open_fields() -> dict[str, Any]:
    """The fields of settings as those of a request: all but the prompt may be left out, and the length has three names."""
    fields: dict[str, Any] = {"prompt": (str, Settings.model_fields["prompt"])}
    for name, info in Settings.model_fields.items():
        if name not in {*fields, *NOT_ASKED}:
            kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else CHOSEN.get(name, info.annotation)
            fields[name] = (kind | None, Field(None, description=info.description, json_schema_extra=info.json_schema_extra))
        if name == "latents_num":
            words = "length in video frames, 4k + 1, or 4k that go on from another film"
            fields["num_frames"] = (int | None, Field(None, ge=1, le=400_000, description=words))
            fields["seconds"] = (float | None, Field(None, gt=0, le=25_000, description="length in seconds"))
    about = "make so many, with the seed and those after it: each up to a first look, where it rests until it is resumed"
    fields["takes"] = (int | None, Field(None, ge=1, le=MAX_TAKES, description=about))
    return fields


_Open: Any = create_model("_Open", __base__=_Described, **_open_fields())


class GenerationRequest(_Open):
    """One video to make: the fields of `Settings`, of which all but the prompt may be None. The model's preset fills them.

    Give the length once: `latents_num` (latent frames), `num_frames` (video frames), `seconds` or `shots`. Lines of the
    prompt that begin with a duration in brackets are shots (`dualparal.prompts`). With prompt_embeds the prompt is only what
    people read.
    """

    def __init__(self, /, **values: Any) -> None:
        if isinstance(text := values.get("prompt"), str):
            values["prompt"], written = split_timeline(text)
            if written and values.get("shots") is not None:
                raise RequestError("shots are given and written in the prompt; give them once", "shots")
            values |= {"shots": written} if written else {}
        if values.get("shots"):
            values.setdefault("prompt", "")
        super().__init__(**values)

    @classmethod
    def from_json(cls, text: str) -> GenerationRequest:
        """The request that asks again for what `to_json` wrote of a request or of settings; raises `RequestError` for else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError("the stored settings are not JSON; they were not written by this program") from None
        if not isinstance(values, dict):
            raise RequestError("the stored settings are not a JSON object; they were not written by this program")
        return cls(**asked_again(values))


def _one_sentence(error: ValidationError, kind: type[BaseModel]) -> RequestError:
    """The first of pydantic's findings as: field=value: what is wrong (what the field is)."""
    first = min(error.errors(), key=lambda found: found["type"] == "missing")  # a wrong value says more than a missing one
    field = str(first["loc"][0]) if first["loc"] else "request"
    if first["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        near = nearest(field, known)
        name = field if field.isidentifier() and len(field) <= 60 else shown(field)
        return RequestError(
            f"{name} is not a field of a request; did you mean {near}? (known fields: {', '.join(known)})", name
        )
    if first["type"] == "missing":
        return RequestError(f"{field} is missing: {_describe(field, kind)}", field)
    if isinstance(cause := first.get("ctx", {}).get("error"), RequestError):
        return cause
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{field}={shown(first['input'])}: {what} ({_describe(field, kind)})", field)


def nearest(key: str, known: Sequence[str]) -> str:
    """The one of `known` that a misspelt or shortened `key` most likely means."""
    longer = [name for name in known if key and key.lower() in name]
    return longer[0] if longer else difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)[0]


def _describe(field: str, kind: type[BaseModel]) -> str:
    info = kind.model_fields.get(field)
    return info.description if info and info.description else field
