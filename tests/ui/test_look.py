"""The early look behind its doors: /look for the job's owner, the page's addresses, and another seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradio_client.exceptions import AppError
from PIL import Image

from dualparal.cli.look import LookFile
from dualparal.errors import RequestError
from dualparal.events import Cancelled, Look, Queued
from dualparal.jobs.folder import JobFolder
from dualparal.media.rough import pack
from dualparal.request import GenerationRequest
from dualparal.ui import charts, looks
from dualparal.ui.studio import Studio
from tests.page_server import GRADIO_WARNINGS, Server
from tests.settings import settings

pytestmark = GRADIO_WARNINGS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("served") / "outputs", item_s=0.02)
    yield made
    made.close()


def put_look(folder: JobFolder, block: int, shade: int, num: int = 3) -> None:
    folder.look.mkdir(exist_ok=True)
    shades = shade + 20 * np.arange(num)[:, None, None, None]
    (folder.look / f"{block:04d}.jpg").write_bytes(pack(np.broadcast_to(shades, (num, 8, 8, 3)).astype(np.uint8)))


def frames_of(path: str | Path) -> int:
    with Image.open(path) as image:
        assert image.format == "WEBP"
        return int(getattr(image, "n_frames", 1))


def test_look_is_the_film_so_far_for_its_owner(server: Server) -> None:
    begun = server.client.predict(prompt="a lantern", seconds=60, owner="mine", api_name="/submit")
    job_id, folder = begun["job_id"], JobFolder(server.engine.outputs / begun["job_id"])
    assert server.client.predict(job_id=job_id, owner="mine", api_name="/look")[0] is None
    put_look(folder, 0, 30)
    found, status = server.client.predict(job_id=job_id, owner="mine", api_name="/look")
    assert frames_of(found) == 3 and status["job_id"] == job_id
    put_look(folder, 1, 90)
    assert frames_of(server.client.predict(job_id=job_id, owner="mine", api_name="/look")[0]) == 6
    with pytest.raises(AppError, match="there is no job"):
        server.client.predict(job_id=job_id, owner="guess", api_name="/look")
    server.client.predict(job_id=job_id, owner="mine", api_name="/cancel")
    server.wait(job_id, lambda status: status["state"] == "cancelled", owner="mine")
    assert frames_of(server.client.predict(job_id=job_id, owner="mine", api_name="/look")[0]) == 6


def test_each_cell_of_the_strip_tells_of_its_look(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path / 'a "strange" name', "abcdef", settings())
    put_look(folder, 0, 30)
    seen = {1: SimpleNamespace(step=4)}
    found: Any = SimpleNamespace(
        folder=folder,
        looks=seen,
        request=settings(latents_num=12, num_per_block=4),
        blocks=(),
        progress=None,
        is_ended=False,
        is_baseline=False,
        state="running",
    )
    reported = looks.cells(found, "/studio/")
    assert set(reported) == {0, 1} and 'data-step="0"' in reported[0] and 'data-step="4"' in reported[1]
    assert 'data-look="/studio/gradio_api/file=' in reported[0] and "/abcdef/look/0001.jpg?4" in reported[1]
    strip = charts.strip(found, "/studio/")
    assert strip.count("data-look") == 2 and '"strange"' not in strip


def test_another_seed(server: Server) -> None:
    """The job is stopped, and the same is asked for again but for the seed."""
    studio = Studio(server.engine)  # type: ignore[arg-type]
    first = studio.submit(GenerationRequest(prompt="a kite", seconds=60, seed=7, guidance_scale=3.5), owner="ada")
    with pytest.raises(RequestError, match="there is no job"):
        studio.try_another(first.job_id, "bob")
    second = studio.try_another(first.job_id, "ada")
    assert second.job_id != first.job_id and second.owner == "ada"
    seeds = {found.request.seed for found in (first, second)}
    assert len(seeds) == 2
    assert second.request.model_copy(update={"seed": 7}) == first.request
    studio.cancel(second.job_id, "ada")


def test_another_seed_begins_with_the_same_picture(server: Server, tmp_path: Path) -> None:
    studio = Studio(server.engine)  # type: ignore[arg-type]
    Image.effect_noise((90, 60), 90).save(path := tmp_path / "a.png")
    first = studio.submit(GenerationRequest(prompt="a kite", seconds=60, seed=7, start_image=str(path)), owner="ada")
    second = studio.try_another(first.job_id, "ada")
    assert second.request.start_image == first.request.start_image
    assert second.folder.start_image.read_bytes() == first.folder.start_image.read_bytes()
    assert not studio.can_compare(dataclasses.replace(first, state="finished"))
    studio.cancel(second.job_id, "ada")


def test_the_command_lines_file_grows_and_is_whole(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path, "abcdef", settings())
    job: Any = SimpleNamespace(folder=folder, request=settings())
    path = tmp_path / "rough.webp"
    file = LookFile(path, job)
    file.take(Queued(job_id="abcdef", position=0))
    assert not path.exists()
    look = Look(job_id="abcdef", block=0, step=1, num_steps=9, num_pictures=3, picture=b"")
    put_look(folder, 0, 30)
    file.take(look)
    assert frames_of(path) == 3
    put_look(folder, 1, 90)
    file.take(look)
    assert frames_of(path) == 3, "at most once a second"
    file.take(Cancelled(job_id="abcdef"))
    assert frames_of(path) == 6, "and at the end"
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_that_cannot_be_written_ends_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = JobFolder.create(tmp_path, "abcdef", settings())
    put_look(folder, 0, 30)
    job: Any = SimpleNamespace(folder=folder, request=settings())
    file = LookFile(tmp_path / "gone" / "rough.webp", job)
    look = Look(job_id="abcdef", block=0, step=1, num_steps=9, num_pictures=3, picture=b"")
    for _ in range(3):
        file.take(look)
    file.take(Cancelled(job_id="abcdef"))
    assert capsys.readouterr().err.count("could not be written") == 1


def test_the_strip_of_a_long_film_stays_short(tmp_path: Path) -> None:
    def drawn(num_blocks: int, num_ready: int) -> str:
        found: Any = SimpleNamespace(
            folder=JobFolder(tmp_path), looks={}, request=settings(latents_num=4 * num_blocks, num_per_block=4, num_cat=0),
            blocks=[SimpleNamespace(block=block) for block in range(num_ready)], progress=None, is_ended=False,
            is_baseline=False, state="running",
        )  # fmt: skip
        return charts.strip(found)

    long = drawn(1200, 1180)
    assert long.count('class="block ') == charts.MAX_CELLS + 1 and len(long) < 60_000
    assert 'title="blocks 1 to 1000: ready"' in long and 'title="block 1001: ready"' in long and 'data-block="1199"' in long
    assert f'data-from="{(4 * 4000 - 3) / 16:.4f}"' in long, "the next one begins where they end"
    assert "blocks 1 to" not in drawn(200, 200) and drawn(200, 200).count('class="block ') == 200
