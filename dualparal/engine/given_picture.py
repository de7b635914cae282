"""The picture that a film is to begin with: read when the job is submitted, and from then on the job's own. Needs no torch."""

from __future__ import annotations

from dualparal.files import checksum_of
from dualparal.media.picture import read_picture
from dualparal.paths import expand
from dualparal.request import Settings


def with_picture(settings: Settings) -> tuple[Settings, bytes | None]:
    """`settings` that say which picture it is instead of where, and the picture as a PNG of the film's size. Raises
    `RequestError` for one that cannot be used."""
    if settings.start_image is None:
        return settings, None
    picture = read_picture(expand(settings.start_image), width=settings.width, height=settings.height)
    return settings.model_copy(update={"start_image": checksum_of(picture)}), picture
