"""The engine in the form of diffusers' `WanPipeline`: the same names of arguments, frames as a result.

    pipe = DualParalPipeline.from_pretrained("wan2.1-1.3b-480p", ranks=2)
    frames = pipe("A red fox in the snow", num_frames=321, generator=7).frames[0]

What is left out comes from the model's preset, not from the pipeline's own defaults, and every field of `GenerationRequest` is
an argument too. A generator counts by the seed it was made with: the noise of the blocks is the method's own. Imports no torch,
unless tensors are asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dualparal.engine.engine import Engine
from dualparal.errors import RequestError
from dualparal.method.rules import plan_of
from dualparal.request import TEMPORAL_FACTOR, GenerationRequest, Settings, shown

if TYPE_CHECKING:
    from dualparal.jobs.job import Job

log = logging.getLogger(__name__)
OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass
class PipelineOutput:
    """`frames` as `WanPipelineOutput` has them: "np" float32 [videos, F, H, W, 3] and "pt" [videos, F, 3, H, W] from 0 to 1,
    "pil" a list of pictures for each video, "latent" [videos, C, F, h, w]; a list where the videos differ in length. Beside
    them each video's mp4 and seed."""

    frames: Any = field(repr=False)
    paths: list[str]
    seeds: list[int]


class DualParalPipeline:
    """A started engine. Close it, use it as a context manager, or leave it to the interpreter's end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._is_quiet = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, ranks: int | None = None, torch_dtype: Any = None, **options: Any
    ) -> DualParalPipeline:
        """Load a preset's model, a hub id or a folder in diffusers' layout on `ranks` processes; `torch_dtype` and `dtype` are
        one, `options` those of an `Engine`. Raises as `Engine` and its `start` do."""
        if torch_dtype is not None:
            options.setdefault("dtype", torch_dtype)
        if ranks is not None:
            options["ranks"] = ranks
        return cls(Engine(str(pretrained_model_name_or_path), **options).start())

    def __enter__(self) -> DualParalPipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        self.engine.close()

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Whether a bar is shown."""
        self._is_quiet = disable

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: None = None,
        callback_on_step_end: None = None,
        callback_on_step_end_tensor_inputs: Any = None,
        max_sequence_length: int = 512,
        **fields: Any,
    ) -> PipelineOutput | tuple[Any]:
        """Make a video of each prompt, `num_videos_per_prompt` times.

        `generator`: a seed, a torch.Generator or a list of one for each video; of one for several videos the next ones have the
        seeds after it. `latents`: the initial noise [1, C, F, h, w]. `fields`: `image`, a picture or its path, as
        `WanImageToVideoPipeline` has it, and more of `GenerationRequest`'s. Ctrl-C stops what runs. Raises `RequestError`, and
        as a job's `result`.
        """
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type={shown(output_type)} is not known; use {', '.join(OUTPUT_TYPES)}", "output_type")
        if attention_kwargs is not None or callback_on_step_end is not None:
            raise RequestError(
                "attention_kwargs and callback_on_step_end would reach into the model's process; use a job's events",
                "callback_on_step_end",
            )
        if (fields.get("takes") or 1) != 1:
            raise RequestError("takes rest until one is chosen; num_videos_per_prompt makes several whole videos", "takes")
        if fields.get("is_endless"):
            raise RequestError("an endless film has no last frame to wait for; submit it to pipe.engine", "is_endless")
        if max_sequence_length != 512:
            raise RequestError(f"max_sequence_length={shown(max_sequence_length)}: texts are cut at 512 tokens here", "prompt")
        given = {
            "height": height, "width": width, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "num_frames": num_frames if fields.get("continue_from") else _whole(num_frames),
        }  # fmt: skip
        fields |= {name: value for name, value in given.items() if value is not None}
        if prompt is None and prompt_embeds is not None:
            prompt = "(embeddings)"  # what people read
        asked = _asked(prompt, negative_prompt, _count(num_videos_per_prompt), generator)
        tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        with _picture_of(fields.pop("image", None), fields.get("start_image")) as picture:
            fields |= {"start_image": picture} if picture else {}
            # All of them are checked before the first is made.
            settings = [self.engine.resolve(GenerationRequest(**{**fields, **one})) for one in asked]
            made = [self._made(one, latents, tensors, output_type) for one in settings]
        frames = _together([found for found, _ in made])
        output = PipelineOutput(frames, [path for _, path in made], [one.seed for one in settings])
        return output if return_dict else (frames,)

    def _made(self, settings: Settings, latents: Any, tensors: dict[str, Any], kind: str) -> tuple[Any, str]:
        """(frames, mp4) of one video."""
        is_latent = kind == "latent"
        job = self.engine.submit(
            settings, latents=_blocks_of(latents, settings), return_latents=is_latent, export_images=not is_latent, **tensors
        )
        with _stopping(job):
            if not self._is_quiet:
                from dualparal.cli.progress import follow

                follow(self.engine, job)
            result = job.result()
        if is_latent:
            return result.latents, result.path
        folder = job.folder.path / "frames"
        frames = _read(folder, result.num_frames, kind)
        shutil.rmtree(folder, ignore_errors=True)
        return frames, result.path


@contextlib.contextmanager
def _stopping(job: Job) -> Iterator[None]:
    """A job that nobody waits for any more is stopped."""
    try:
        yield
    except BaseException:
        job.cancel()
        raise


@contextlib.contextmanager
def _picture_of(image: Any, start_image: Any) -> Iterator[str | None]:
    """Where the picture lies that `image` is: its path, or for the time being a file of it."""
    if image is not None and start_image is not None:
        raise RequestError("image and start_image are the same; give one of them", "image")
    if image is None or isinstance(image, (str, os.PathLike)):
        yield None if image is None else str(image)
        return
    if not isinstance(image, Image.Image):
        raise RequestError(f"image={shown(image)} is neither a picture of PIL nor a path", "image")
    with tempfile.TemporaryDirectory(prefix="dualparal-") as folder:
        path = Path(folder) / "image.png"
        (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(path)
        yield str(path)


def _count(num_videos_per_prompt: Any) -> int:
    count = 1 if num_videos_per_prompt is None else num_videos_per_prompt
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RequestError(f"num_videos_per_prompt={shown(count)} is not a number from 1 on", "num_videos_per_prompt")
    return count


def _whole(num_frames: int | None) -> int | None:
    """Rounded to 4k + 1, as diffusers does."""
    if not isinstance(num_frames, int) or num_frames < 1 or num_frames % TEMPORAL_FACTOR == 1:
        return num_frames
    whole = num_frames // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
    log.warning("num_frames=%d is not 4k + 1; %d are made", num_frames, whole)
    return whole


def _asked(prompt: Any, negative_prompt: Any, num_each: int, generator: Any) -> list[dict[str, Any]]:
    """What each video has of its own."""
    prompts = _texts(prompt, "prompt")
    negatives = [None] * len(prompts) if negative_prompt is None else _texts(negative_prompt, "negative_prompt", len(prompts))
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(num_each)]
    seeds = _seeds(generator, len(pairs))
    return [
        {name: value for name, value in (("prompt", text), ("negative_prompt", negative), ("seed", seed)) if value is not None}
        for (text, negative), seed in zip(pairs, seeds, strict=True)
    ]


def _texts(given: Any, name: str, count: int | None = None) -> list[str]:
    """One text or several as a list, a single one `count` times."""
    texts = [given] * (count or 1) if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else None
    if not texts or (count is not None and len(texts) != count):
        raise RequestError(f"{name}={shown(given)} is not a text or a list of {count or 'them'}", name)
    return texts


def _seeds(generator: Any, count: int) -> list[int | None]:
    """The seed of each of `count` videos; None where it is to be drawn."""
    if generator is None:
        return [None] * count
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise RequestError(f"generator has {len(generator)} entries for {count} videos; give one for each", "seed")
        return [_seed(one) for one in generator]
    return [_seed(generator) + number for number in range(count)]


def _seed(generator: Any) -> int:
    seed = generator.initial_seed() if hasattr(generator, "initial_seed") else generator
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RequestError(f"generator={shown(generator)} is neither a seed nor a torch.Generator", "seed")
    return seed


def _blocks_of(latents: Any, settings: Settings) -> list[Any] | None:
    """Noise [1, C, F, h, w] cut where the blocks are."""
    if latents is None:
        return None
    lengths = plan_of(settings).lengths
    if len(getattr(latents, "shape", ())) != 5 or latents.shape[2] != sum(lengths):
        raise RequestError(f"latents must be one tensor [1, C, {sum(lengths)}, h, w], the noise of all frames", "latents")
    starts = itertools.accumulate((0, *lengths))
    return [latents[:, :, start:stop] for start, stop in itertools.pairwise(starts)]


def _read(folder: Path, num_frames: int, kind: str) -> Any:
    """The frames as they were decoded, from their PNGs: what the mp4 has of them is compressed."""
    if kind == "pil":
        return [_picture(folder, number) for number in range(num_frames)]
    width, height = _picture(folder, 0).size
    frames = np.empty((num_frames, height, width, 3), np.float32)  # in its place at once: long films are large
    for number in range(num_frames):
        np.divide(np.asarray(_picture(folder, number)), 255, out=frames[number], dtype=np.float32)
    if kind == "np":
        return frames
    import torch

    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _picture(folder: Path, number: int) -> Image.Image:
    with Image.open(folder / f"{number:06d}.png") as opened:
        return opened.convert("RGB")


def _together(videos: list[Any]) -> Any:
    """Videos of one shape as one array; latents [1, ...] behind one another; else a list."""
    if isinstance(videos[0], list) or len({tuple(video.shape) for video in videos}) > 1:
        return videos
    if isinstance(videos[0], np.ndarray):
        return np.stack(videos)
    import torch

    return torch.cat(videos) if videos[0].ndim == 5 else torch.stack(videos)
