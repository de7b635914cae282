"""What a film is to begin with, a picture or another film: looked at when the job is submitted, and from then on the job's own.
Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualparal.errors import DualParalError, RequestError
from dualparal.files import CLIP, START_CLIP, START_IMAGE, checksum_of
from dualparal.jobs.film_end import KeptFilm, find_film
from dualparal.jobs.folder import JOB_ID, JobFolder
from dualparal.media.film import read_end
from dualparal.media.picture import read_picture
from dualparal.method.plan import KEPT_LATENTS
from dualparal.paths import expand
from dualparal.request import GenerationRequest, Settings

Files = Mapping[str, bytes | Path]  # of a job's folder, by name: their bytes, or where they lie
LIKE_THE_FILM = ("height", "width", "fps")


def like_its_film(request: GenerationRequest, outputs: Path) -> GenerationRequest:
    """`request` with the size and rate of the film that it continues, where it leaves them out."""
    named = request.continue_from
    missing = [name for name in LIKE_THE_FILM if getattr(request, name) is None]
    if named is None or not JOB_ID.fullmatch(named) or not missing:
        return request
    try:
        film = JobFolder(outputs / named).request()
    except DualParalError:  # said when it is submitted
        return request
    return request.model_copy(update={name: getattr(film, name) for name in missing})


def with_picture(settings: Settings) -> tuple[Settings, bytes | None]:
    """`settings` that say which picture it is instead of where, and the picture as a PNG of the film's size. Raises
    `RequestError` for one that cannot be used."""
    if settings.start_image is None:
        return settings, None
    picture = read_picture(expand(settings.start_image), width=settings.width, height=settings.height)
    return settings.model_copy(update={"start_image": checksum_of(picture)}), picture


def with_beginning(settings: Settings, outputs: Path, latent_sizes: tuple[int, int]) -> tuple[Settings, Files]:
    """`settings` that say what it is instead of where, and the files that the job's folder is to have of it. `latent_sizes`:
    the model's channels and pixels of a latent's side. Raises `RequestError` for what cannot be used."""
    settings, picture = with_picture(settings)
    if picture is not None:
        return settings, {START_IMAGE: picture}
    if settings.continue_from is None:
        return settings, {}
    if not JOB_ID.fullmatch(settings.continue_from):
        return _with_clip(settings)
    film = find_film(outputs, settings.continue_from)
    _check_fits(settings, film, latent_sizes)
    found: dict[str, Any] = {"ghost": film.shape[2], "num_frames_before": film.num_frames if settings.join else 0}
    return settings.model_copy(update=found), film.files(is_joined=settings.join)


def _with_clip(settings: Settings) -> tuple[Settings, Files]:
    """`with_beginning` for a video file: the settings say what its end is, and how many latent frames are made of it."""
    assert settings.continue_from is not None
    if settings.join:
        raise RequestError(
            "join: only a film that was made here can be joined without encoding it again; leave join out", "join"
        )
    num_latents = max(KEPT_LATENTS, settings.num_cat)
    clip = read_end(
        expand(settings.continue_from), width=settings.width, height=settings.height, fps=settings.fps, num_latents=num_latents
    )
    found: dict[str, Any] = {"continue_from": f"{CLIP}{checksum_of(clip.data)}", "fitted": clip.about}
    found |= {"ghost": min(num_latents, clip.num_latents), "num_frames_before": 0}
    return settings.model_copy(update=found), {START_CLIP: clip.data}


def _check_fits(settings: Settings, film: KeptFilm, latent_sizes: tuple[int, int]) -> None:
    job_id, (channels, pixels) = film.folder.job_id, latent_sizes
    sizes = [f"{one.width} x {one.height}" for one in (film.settings, settings)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"continue_from: job {job_id} has pictures of {sizes[0]} and this film of {sizes[1]}; leave width and height out",
            "width",
        )
    if settings.join and film.settings.fps != settings.fps:
        raise RequestError(
            f"join: job {job_id} has {film.settings.fps} frames per second and this film {settings.fps}; leave out fps or join",
            "fps",
        )
    expected = (1, channels, settings.height // pixels, settings.width // pixels)
    if film.shape[:2] + film.shape[3:] != expected or film.settings.model != settings.model:
        raise RequestError(
            f"continue_from: job {job_id} was made by another model ({film.settings.model or 'not known'}), whose latents are "
            "not this one's; continue it with that",
            "continue_from",
        )
