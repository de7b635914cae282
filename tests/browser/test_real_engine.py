"""The whole thing: `python -m dualparal serve` with worker processes and a tiny checkpoint, a browser and API clients."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gradio_client import Client

from dualparal.media.metadata import describe, read_settings
from tests.browser.test_page import ARTEFACTS, PLAYER, ask, browser, job_of, shoot, wait_state  # noqa: F401
from tests.page_server import GRADIO_WARNINGS

pytestmark = [*GRADIO_WARNINGS, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
START_S = 600
PRESET = """
title = "Tiny · 64×64"
model = {model!r}
hardware = "any computer"
dtype = "float32"
seconds = 4
height = 64
width = 64
num_inference_steps = 8
guidance_scale = 3.0
num_per_block = 4
num_cat = 2
schedule = "paper"
context = "recomputed"

[limits]
seconds = 120
num_inference_steps = 200
"""


class Served:
    """The server as a process of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        (folder / "presets").mkdir()
        (folder / "presets" / "tiny.toml").write_text(PRESET.replace("{model!r}", f'"{model}"'), encoding="utf-8")
        self.log = (folder / "log.txt").open("w")
        self.folder = folder
        command = [sys.executable, "-m", "dualparal", "serve", "--preset", "tiny", "--presets-folder", str(folder / "presets")]
        command += ["--ranks", "2", "--device", "cpu", "--threads", "1", "--outputs", str(folder / "outputs")]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT)
        self.url = self.wait(self._address)
        self.was_ready = self.is_ready()

    def _address(self) -> str | None:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.text())
        return f"{found[0]}/" if found else None

    def text(self) -> str:
        return (self.folder / "log.txt").read_text()

    def wait(self, condition: Callable[[], Any], timeout_s: float = START_S) -> Any:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            assert self.process.poll() is None, self.text()[-3000:]
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {timeout_s} s in vain; the log says: {self.text()[-3000:]}")

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}readyz", timeout=30).status_code == 200

    def workers(self) -> list[psutil.Process]:
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if "torch" in _maps(one)]

    def jobs(self) -> set[str]:
        return {path.parent.name for path in (self.folder / "outputs").glob("*/request.json")}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No worker moves inside, so that a browser may be slow."""
        workers = self.workers()

        def each(signal_one: Callable[[psutil.Process], None]) -> None:
            for one in workers:
                with contextlib.suppress(psutil.NoSuchProcess):  # the fork of one, seen before it became ffmpeg
                    signal_one(one)

        each(psutil.Process.suspend)
        try:
            yield
        finally:
            each(psutil.Process.resume)

    @contextlib.contextmanager
    def held_within(self, known: set[str], made: str = "block_*.ts") -> Iterator[str]:
        """The next job beside those `known`, held once such a file is made and before its end."""
        job_id = self.wait(lambda: next(iter(self.jobs() - known), None))
        folder = self.folder / "outputs" / job_id
        self.wait(lambda: next(folder.glob(made), None))
        with self.held():
            assert not (folder / "video.mp4").exists(), "it was too quick"
            yield job_id

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with contextlib.closing(Served(tmp_path_factory.mktemp("served"), tiny)) as made:
        yield made


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(START_S * 1000)
    problems: list[str] = []
    opened.on("console", lambda message: message.type == "error" and problems.append(message.text))
    opened.goto(served.url)
    opened.wait_for_selector(".estimate b")
    yield opened
    context.close()
    assert problems == [], problems


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    made = Client(served.url, verbose=False)
    yield made
    made.close()


def set_steps(page: Any, num_steps: int) -> None:
    page.click("#advanced summary")
    page.fill("#advanced [aria-label*='Denoising steps'][type=number]", str(num_steps))
    page.keyboard.press("Tab")


def test_the_page_opens_before_the_model_is_loaded(served: Served) -> None:
    assert httpx.get(f"{served.url}healthz").json() == {"status": "alive"}
    assert not served.was_ready, "the page waited for the workers, which import torch"
    served.wait(served.is_ready)


def test_live_video_in_the_browser(page: Any, served: Served) -> None:
    ask(page, "a red circle", 24)
    wait_state(page, "running")
    page.wait_for_function(f"{PLAYER} && {PLAYER}.src.startsWith('blob:') && {PLAYER}.currentTime > 0.2")
    shoot(page, "real-running")
    wait_state(page, "finished")
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && {PLAYER}.duration > 24")
    page.wait_for_selector(".timeline rect", state="attached")
    shoot(page, "real-done", full_page=True)
    assert "GB per stage" in page.inner_text(".estimate") or "MB per stage" in page.inner_text(".estimate")
    video = served.folder / "outputs" / job_of(page) / "video.mp4"
    assert describe(video)["num_frames"] == 385 and read_settings(video).prompt == "a red circle"


def test_stop_in_the_browser_and_the_next_job(page: Any, served: Served) -> None:
    set_steps(page, 60)
    known = served.jobs()
    ask(page, "too long", 100)
    with served.held_within(known) as job_id:
        page.wait_for_selector(".block.ready", state="attached")
        page.click("#stop")
        served.wait((served.folder / "outputs" / job_id / ".stop").exists)
    wait_state(page, "cancelled")
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && {PLAYER}.duration > 1")
    page.fill("#advanced [aria-label*='Denoising steps'][type=number]", "4")
    page.keyboard.press("Tab")
    ask(page, "the next one", 2)
    wait_state(page, "finished")


def test_api_gives_the_same_bits_for_the_same_seed(client: Client) -> None:
    found = []
    for _ in range(2):
        path, status = client.predict(prompt="twice", seed=5, seconds=3, num_inference_steps=3, api_name="/generate")
        assert status["state"] == "finished" and describe(path)["num_frames"] == status["num_frames"] == 49
        found.append(Path(path).read_bytes())
    assert found[0] == found[1]


def test_status_is_answered_while_the_cores_are_busy(client: Client, served: Served) -> None:
    job_id = client.predict(prompt="busy", seconds=100, num_inference_steps=100, api_name="/submit")["job_id"]
    for _ in range(8):
        assert client.predict(job_id=job_id, api_name="/status")["state"] in ("queued", "running"), "it waited for the job"
        time.sleep(0.2)
    client.predict(job_id=job_id, api_name="/cancel")
    served.wait(lambda: client.predict(job_id=job_id, api_name="/status")["state"] == "cancelled")


def test_a_stopped_job_is_resumed_from_the_page(page: Any, served: Served) -> None:
    set_steps(page, 80)  # most of the work is still to come when the first block is ready
    known = served.jobs()
    ask(page, "half of it first", 60)
    with served.held_within(known) as job_id:
        page.wait_for_selector(".block.ready", state="attached")
        page.click("#stop")
        served.wait((served.folder / "outputs" / job_id / ".stop").exists)
    wait_state(page, "cancelled")
    assert job_of(page) == job_id
    page.click("#result [data-do=resume]")
    wait_state(page, "finished")
    assert job_of(page) == job_id
    assert describe(served.folder / "outputs" / job_id / "video.mp4")["num_frames"] == 961


def test_a_video_is_compared_with_plain_wan(page: Any, served: Served) -> None:
    """The button beside a finished video runs the same request through diffusers' pipeline, as a job of its own."""
    ask(page, "twice the same", 2)
    wait_state(page, "finished")
    first = job_of(page)
    page.click("#result [data-do=compare]")
    page.wait_for_function("id => document.querySelector('.board')?.dataset.job !== id", arg=first)
    wait_state(page, "finished")
    page.wait_for_function("document.querySelector('#result')?.innerText.includes('plain Wan')")
    assert page.locator("#result [data-do=compare]").count() == 0
    folders = [served.folder / "outputs" / job_id for job_id in (first, job_of(page))]
    one, other = (describe(folder / "video.mp4") for folder in folders)
    assert one["num_frames"] == other["num_frames"] == 33
    assert read_settings(folders[0] / "video.mp4") == read_settings(folders[1] / "video.mp4")


def test_a_killed_worker_is_noticed_and_the_job_goes_on(page: Any, served: Served) -> None:
    ask(page, "will be cut off", 60)
    page.wait_for_function("document.querySelector('.headline b')?.innerText.startsWith('Denoising')")
    workers = served.workers()
    assert workers, "no worker process was found"
    workers[0].send_signal(signal.SIGKILL)
    served.wait(lambda: served.workers() and not set(workers) & set(served.workers()))
    with served.held():
        page.wait_for_selector(".chip.restarting")
        shoot(page, "real-worker-killed", full_page=True)
    page.wait_for_selector(".chip.ready")
    wait_state(page, "finished")
    assert "Traceback" not in page.inner_text("#stage")
    assert describe(served.folder / "outputs" / job_of(page) / "video.mp4")["num_frames"] == 961


def test_metrics_count_the_jobs(served: Served) -> None:
    told = httpx.get(f"{served.url}metrics").text
    assert re.search(r"^dualparal_\w+.* [1-9]", told, re.M), told


def _maps(process: psutil.Process) -> str:
    try:
        return " ".join(one.path for one in process.memory_maps())
    except psutil.Error:
        return ""


def test_terminate_ends_everything(served: Served) -> None:
    children = psutil.Process(served.process.pid).children(recursive=True)
    os.kill(served.process.pid, signal.SIGTERM)
    assert served.process.wait(60) == 0, served.text()[-2000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert "Traceback" not in served.text(), served.text()[-3000:]
