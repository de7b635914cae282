"""The page in a real browser, over an engine with fake workers: what a visitor sees and can do, in every state.

Screenshots go to artefacts/ (not under version control). Needs Chromium with H.264, such as Debian's.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dualparal.jobs.folder import JobFolder
from dualparal.media.metadata import describe
from tests.page_server import GRADIO_WARNINGS, Server

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARTEFACTS = Path(__file__).parents[2] / "artefacts"
DEADLINE_MS = 240_000  # a loaded machine is slow; a broken page waits in vain however long
PLAYER = "document.querySelector('#video video')"
pytestmark = [
    *GRADIO_WARNINGS,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        made = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield made
        made.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "outputs", item_s=0.02)
    yield made
    made.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Any]:
    """Opens the page as a new visitor (or as `like`, another page of the same one); fails the test on console errors."""
    contexts, problems, leaving = [], [], set()

    def opened(width: int = 1440, height: int = 1000, dark: bool = False, like: Any = None) -> Any:
        if like is None:
            contexts.append(browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True))
        page = (like.context if like is not None else contexts[-1]).new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.on("console", lambda message: message.type == "error" and reported(page, message.text))
        page.on("pageerror", lambda error: reported(page, str(error)))
        page.goto(server.url + ("?__theme=dark" if dark else "?__theme=light"))
        page.wait_for_selector("#generate")
        page.wait_for_selector(".estimate b")  # filled when the page's first event has come back
        return page

    def reported(page: Any, text: str) -> None:
        if page not in leaving:  # gradio reports its own event stream, cut off when a tab is left, as an error
            problems.append(text)

    def reload(page: Any) -> None:
        leaving.add(page)
        page.reload()
        page.wait_for_selector("#generate")
        leaving.discard(page)

    opened.reload, opened.leaving = reload, leaving  # type: ignore[attr-defined]
    yield opened
    leaving.update(page for context in contexts for page in context.pages)
    for context in contexts:
        context.close()
    assert problems == [], problems


def ask(page: Any, prompt: str, seconds: float = 12, seed: str = "") -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#seconds input[type=number]", str(seconds))
    page.keyboard.press("Tab")
    page.fill("#seed :is(input, textarea)", seed)
    page.wait_for_function(f"document.querySelector('.estimate').innerText.includes('{seconds + 0.0625:.1f} s')")
    page.click("#generate")


def wait_state(page: Any, state: str) -> None:
    page.wait_for_selector(f".board.{state}", state="attached")


def wait_value(page: Any, selector: str, value: str) -> None:
    """Values that the server sends reach the fields one after another."""
    page.wait_for_function("([selector, value]) => document.querySelector(selector)?.value === value", arg=[selector, value])


def player(page: Any, what: str) -> Any:
    return page.evaluate(f"(() => {{ const v = {PLAYER}; return v ? {what} : null; }})()")


def shoot(page: Any, name: str, **more: Any) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png", **more)


def test_a_picture_to_begin_with(visit: Any, server: Server, tmp_path: Path) -> None:
    Image.effect_noise((90, 60), 90).save(path := tmp_path / "a rose.png")
    page = visit()
    page.set_input_files("#start-image input[type=file]", str(path))
    page.wait_for_selector("#start-image table >> text=rose")
    ask(page, "a kite", seconds=4)
    wait_state(page, "finished")
    (kept,) = server.engine.outputs.glob("*/start.png")
    with Image.open(kept) as picture:
        assert picture.size == (96, 96)
    page.locator("#gallery [data-do=reuse]").first.click()
    page.wait_for_selector("#start-image >> text=give it again", state="attached")
    assert page.locator("#start-image table").count() == 0


def job_of(page: Any) -> str:
    return str(page.get_attribute(".board", "data-job"))


def test_live_video_plays_two_blocks_before_the_job_is_done_then_the_mp4(visit: Any, server: Server) -> None:
    page = visit()
    shoot(page, "idle")
    server.groups.slow_at = 1  # the job waits for the player, however slow
    ask(page, "a lantern in slow wind", 24)
    wait_state(page, "running")
    shoot(page, "running")
    page.wait_for_function(f"{PLAYER} && {PLAYER}.currentTime > 0.2 && {PLAYER}.src.startsWith('blob:')")
    shoot(page, "first-block")
    first = player(page, "[v.currentTime, v.buffered.end(0)]")
    server.groups.slow_at = 4
    # Past the first block (21 frames) and the second (16 frames), with more arriving, and the job still at work.
    page.wait_for_function(f"{PLAYER}.currentTime > {37 / 16} && {PLAYER}.buffered.end(0) > {first[1] + 0.5}")
    page.wait_for_function("parseInt(document.querySelector('.strip-scale span:nth-child(2)').innerText) >= 3")
    assert page.get_attribute(".board", "data-state") == "running", "the job was done before two blocks had been played"
    playhead = float(page.evaluate("getComputedStyle(document.querySelector('.strip')).getPropertyValue('--playhead')"))
    assert 0 < playhead < 1
    server.groups.let_go.set()
    wait_state(page, "finished")
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && {PLAYER}.currentTime > 1 && {PLAYER}.duration > 24")
    shoot(page, "done", full_page=True)
    with page.expect_download() as download:
        page.click("a.download")
    assert describe(download.value.path())["num_frames"] == 385
    assert re.fullmatch(r"a-lantern-in-slow-wind-seed\d+\.mp4", download.value.suggested_filename)
    reported = page.inner_text("#result")
    for words in ("text", "denoise", "decode", "encode", "When each stage worked", "Settings as JSON"):
        assert words in reported
    assert page.inner_text("#board").count("first frames after") == 1


def test_stop_keeps_the_finished_part(visit: Any, server: Server) -> None:
    page = visit()
    ask(page, "a long, slow walk", 60)
    page.wait_for_selector(".block.ready >> nth=1", state="attached")
    page.click("#stop")
    wait_state(page, "cancelled")
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && {PLAYER}.duration > 2")
    shoot(page, "stopped", full_page=True)
    kept = int(re.search(r"(\d+) frames", page.inner_text(".headline"))[1])  # type: ignore[index]
    assert kept == describe(JobFolder(server.engine.outputs / job_of(page)).video)["num_frames"] >= 37
    ask(page, "and the next one runs", 2)
    wait_state(page, "finished")


def test_reload_finds_the_running_job_and_its_live_video(visit: Any, server: Server) -> None:
    page = visit()
    ask(page, "still here, and slow", 40)
    page.wait_for_selector(".block.ready", state="attached")
    job_id = job_of(page)
    visit.reload(page)
    page.wait_for_selector(f".board.running[data-job='{job_id}']")
    page.wait_for_function(f"{PLAYER} && {PLAYER}.src.startsWith('blob:') && {PLAYER}.currentTime > 0.3")
    visit.leaving.add(page)
    page.close()
    again = visit(like=page)  # closed tab, new tab: nothing in its session storage, only the browser's owner token
    again.wait_for_selector(f".board[data-job='{job_id}']")
    again.click("#stop")
    wait_state(again, "cancelled")
    visit.reload(again)  # and an ended one is shown from its mp4
    again.wait_for_selector(f".board.cancelled[data-job='{job_id}']")
    again.wait_for_function(f"{PLAYER} && {PLAYER}.src.includes('video.mp4')")


def test_two_visitors_queue_and_see_only_their_own(visit: Any, server: Server) -> None:
    first, second = visit(), visit()
    ask(first, "first, slow visitor <b>in private</b>", 40)
    wait_state(first, "running")
    ask(second, "second visitor", 2)
    wait_state(second, "queued")
    second.wait_for_selector("#queue li")
    reported = second.inner_text("#stage")
    assert "1 ahead of you" in reported and "Someone else" in reported and "in private" not in second.content()
    shoot(second, "queued", full_page=True)
    first.wait_for_selector("#queue li >> nth=1")
    assert "second visitor" not in first.content()
    first.click("#stop")
    wait_state(first, "cancelled")
    wait_state(second, "finished")
    for page in (first, second):
        page.wait_for_selector("#gallery li")
        assert page.locator("#gallery li").count() == 1
    second.wait_for_selector("#queue li", state="detached")


def test_two_tabs_of_one_visitor_do_not_disturb_each_other(visit: Any, server: Server) -> None:
    first = visit()
    ask(first, "tab one, slow", 20)
    wait_state(first, "running")
    second = visit(like=first)
    ask(second, "tab two", 2)
    second.wait_for_function("document.querySelector('.asked')?.innerText.includes('tab two')")
    assert "tab one" in first.inner_text(".asked")
    second.wait_for_function("sessionStorage.getItem('dualparal-job') === document.querySelector('.board').dataset.job")
    visit.reload(second)
    second.wait_for_function("document.querySelector('.asked')?.innerText.includes('tab two')")
    server.groups.let_go.set()
    wait_state(first, "finished")
    wait_state(second, "finished")
    assert "tab one" in first.inner_text(".asked") and "tab two" in second.inner_text(".asked")


def test_settings_come_back_from_an_mp4_and_from_the_gallery(visit: Any, server: Server, tmp_path: Path) -> None:
    page = visit()
    page.click("#advanced summary")
    page.fill("#advanced [aria-label*='Denoising steps'][type=number]", "7")
    page.keyboard.press("Tab")
    ask(page, "to be made again", 3, "31415")
    wait_state(page, "finished")
    video = JobFolder(server.engine.outputs / job_of(page)).video
    shutil.copy(video, tmp_path / "mine.mp4")

    fresh = visit()
    fresh.set_input_files("#restore input[type=file]", tmp_path / "mine.mp4")
    wait_value(fresh, "#prompt textarea", "to be made again")
    wait_value(fresh, "#seed :is(input, textarea)", "31415")
    wait_value(fresh, "#seconds input[type=number]", "3")
    wait_value(fresh, "#advanced [aria-label*='Denoising steps'][type=number]", "7")

    (tmp_path / "other.mp4").write_bytes(b"\0" * 5000)
    fresh.set_input_files("#restore input[type=file]", tmp_path / "other.mp4")
    fresh.wait_for_selector("text=is not a video made here")

    page.fill("#prompt textarea", "something else")
    page.click("#gallery [data-do=reuse]")
    wait_value(page, "#prompt textarea", "to be made again")


def test_a_stored_request_survives_the_page_exactly(visit: Any, server: Server, tmp_path: Path) -> None:
    """Values off the sliders' steps, and those that the form does not show, through an mp4 and through the gallery."""
    fields = {
        "prompt": "to the letter", "latents_num": 6, "fps": 24, "seed": 2**53 + 1, "num_inference_steps": 7,
        "guidance_scale": 3.333, "guidance_start": 1 / 7, "guidance_stop": 0.8, "flow_shift": 2.7183, "num_cat": 1,
        "schedule": "preview", "context": "cached", "max_in_flight": 3, "stagger": 2, "micro_batches": True,
    }  # fmt: skip
    made = server.client.predict(**fields, api_name="/generate")[1]
    folder = JobFolder(server.engine.outputs / made["job_id"])
    shutil.copy(folder.video, tmp_path / "mine.mp4")
    page = visit()
    page.set_input_files("#restore input[type=file]", tmp_path / "mine.mp4")
    wait_value(page, "#prompt textarea", "to the letter")
    wait_value(page, "#advanced [aria-label='Left context']", "cached")  # the last
    page.click("#generate")
    wait_state(page, "finished")
    again = JobFolder(server.engine.outputs / job_of(page))
    assert again.job_id != made["job_id"] and again.request() == folder.request()
    page.fill("#prompt textarea", "something else")
    page.click("#gallery [data-do=reuse]")
    wait_value(page, "#prompt textarea", "to the letter")
    page.click("#generate")
    page.wait_for_function("id => document.querySelector('.board').dataset.job !== id", arg=again.job_id)
    wait_state(page, "finished")
    assert JobFolder(server.engine.outputs / job_of(page)).request() == folder.request()


def test_what_is_typed_the_moment_advanced_opens_is_kept(visit: Any, server: Server) -> None:
    page = visit()
    page.fill("#prompt textarea", "in a hurry")
    page.fill("#seconds input[type=number]", "1")
    page.evaluate(
        """() => {
          document.querySelector('#advanced summary').click();
          const field = document.querySelector("#advanced [aria-label*='Denoising steps'][type=number]");
          if (!field?.checkVisibility()) throw Error('Advanced is open and its fields are still to come');
          field.value = '7';
          field.dispatchEvent(new Event('input', {bubbles: true}));
        }"""
    )
    page.click("#generate")
    wait_state(page, "finished")
    assert JobFolder(server.engine.outputs / job_of(page)).request().num_inference_steps == 7
    page.click("#advanced summary")
    page.wait_for_selector("#advanced-parts", state="hidden")


def test_gallery_pages_shows_and_deletes(visit: Any, server: Server) -> None:
    page = visit()
    for number in range(10):
        ask(page, f"video {number}", 1)
        page.wait_for_function(f"document.querySelector('#gallery li .prompt')?.innerText === 'video {number}'")
    assert page.locator("#gallery li").count() == 8
    assert page.evaluate("[...document.querySelectorAll('#gallery img')].length") == 8
    page.click("#gallery .older")
    page.wait_for_function("document.querySelector('#gallery li .prompt').innerText === 'video 1'")
    shoot(page, "gallery", full_page=True)
    page.click("#gallery li .poster >> nth=1")
    page.wait_for_function("document.querySelector('.asked').innerText.includes('video 0')")
    delete = page.locator("#gallery li [data-do=remove]").nth(1)
    job_id = delete.get_attribute("data-id")
    delete.click()
    page.wait_for_function("document.querySelectorAll('#gallery li').length === 1")
    assert not (server.engine.outputs / str(job_id)).exists()
    page.click("#gallery [data-do=undo]")
    page.wait_for_function("document.querySelectorAll('#gallery li').length === 2")
    assert (server.engine.outputs / str(job_id) / "video.mp4").is_file()
    page.fill("#search :is(input, textarea)", "VIDEO 7")
    page.wait_for_function("document.querySelectorAll('#gallery li').length === 1")
    assert page.inner_text("#gallery li .prompt") == "video 7" and "1 of 10" in page.inner_text("#gallery h2")
    page.click("#gallery .edit")
    page.fill("#gallery .name input", "the seventh")
    page.keyboard.press("Enter")
    page.wait_for_selector("#gallery .name b >> text=the seventh")
    page.hover("#gallery .poster")
    page.wait_for_selector("#gallery .poster video.moves")
    page.click("#gallery .star")
    page.wait_for_selector("#gallery .star[aria-pressed=true]")
    shoot(page, "gallery-found")
    token_link = page.locator("#gallery .carried")
    page.click("#gallery [data-do=carry]")
    page.wait_for_function("document.querySelector('#gallery .carried').value.includes('#gallery=')")
    other = visit()
    assert other.locator("#gallery li").count() == 0
    link = token_link.input_value()
    other.goto("about:blank")
    other.goto(link)
    other.wait_for_function("document.querySelectorAll('#gallery li').length === 8")
    assert "#" not in other.url, "the address does not keep the secret"


def test_failure_and_restart_are_told_and_the_next_job_runs(visit: Any, server: Server) -> None:
    page = visit()
    server.engine.wait_ready(60)
    server.groups.can_load.clear()  # the next workers wait
    ask(page, "please die", 12)
    wait_state(page, "failed")
    assert "killed by SIGKILL" in page.inner_text(".headline") and page.get_attribute(".headline", "role") == "alert"
    page.wait_for_selector(".chip.restarting")
    shoot(page, "failed-restarting", full_page=True)
    server.groups.can_load.set()
    page.wait_for_selector(".chip.ready")
    ask(page, "works again", 1)
    wait_state(page, "finished")


@pytest.mark.parametrize("typed", ["-5", "", "0"])
def test_a_length_of_nothing_is_told_and_makes_nothing(visit: Any, server: Server, typed: str) -> None:
    page = visit()
    page.fill("#prompt textarea", "how long?")
    page.wait_for_selector("#estimate :text('frames')")
    page.fill("#seconds input[type=number]", typed)
    page.press("#seconds input[type=number]", "Tab")
    page.wait_for_selector("#estimate [role=alert]:has-text('the length is')")
    page.click("#generate")
    page.wait_for_selector(".toast-body:has-text('give more than 0 seconds')")
    assert list(server.engine.outputs.glob("*/request.json")) == []
    page.fill("#seconds input[type=number]", "1")
    page.press("#seconds input[type=number]", "Tab")
    page.wait_for_selector("#estimate :text('frames')")


def test_bad_settings_are_refused_before_anything_is_queued(visit: Any, server: Server) -> None:
    page = visit()
    page.click("#generate")
    page.wait_for_selector("text=the prompt is empty")
    page.fill("#prompt textarea", "<img src=x onerror=document.title='hit'>" * 200)
    page.click("#generate")
    page.wait_for_selector("text=the limit is 4000")
    page.fill("#prompt textarea", "<img src=x onerror=document.title='hit'> {{7*7}}")
    page.fill("#seed :is(input, textarea)", "12x")
    page.keyboard.press("Tab")
    page.wait_for_selector(".estimate.bad")
    shoot(page, "refused")
    assert list(server.engine.outputs.glob("*/request.json")) == []
    page.fill("#seed :is(input, textarea)", "12")
    page.keyboard.press("Tab")
    page.wait_for_selector(".estimate:not(.bad)")
    page.click("#generate")
    page.wait_for_selector(".board")
    assert "<img src=x" in page.inner_text(".asked") and "{{7*7}}" in page.inner_text(".asked")
    assert page.title() != "hit"
    wait_state(page, "finished")


def test_an_example_starts_with_one_click(visit: Any, server: Server) -> None:
    page = visit()
    words = page.inner_text(".example >> nth=0").removeprefix("▸ ")
    page.click(".example >> nth=0")
    wait_state(page, "finished")
    assert words in page.inner_text(".asked")
    assert page.input_value("#prompt textarea") == words


def test_two_experts_have_their_own_settings(visit: Any, browser: Any, tmp_path: Path, tiny_two: Path) -> None:
    one = visit()
    one.click("#advanced summary")
    one.get_by_label("Flow shift", exact=False).first.wait_for()
    assert one.get_by_text("Switch between experts").count() == 0
    served = Server(tmp_path / "two", item_s=0.01, model=tiny_two)
    page = browser.new_page()
    page.set_default_timeout(DEADLINE_MS)
    try:
        page.goto(served.url)
        page.wait_for_selector(".estimate b")
        page.click("#advanced summary")
        for label, value in (("Guidance, low-noise expert", "3.5"), ("Switch between experts", "0.9")):
            page.locator(f"#advanced .block:has-text('{label}') input[type=number]").first.fill(value)
            page.keyboard.press("Tab")
        shoot(page, "two-experts", full_page=True)
        page.fill("#prompt textarea", "a wave")
        page.click("#generate")
        wait_state(page, "finished")
        stored = JobFolder(served.engine.outputs / job_of(page)).request()
        assert (stored.guidance_scale_2, stored.boundary_ratio) == (3.5, 0.9)
    finally:
        page.close()
        served.close()


def test_an_older_estimate_does_not_overwrite_a_newer(visit: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit()
    ask(page, "slow, and teaches the estimate", 8)
    page.wait_for_selector(".board")
    plan, slow, asked = server.engine.plan, threading.Event(), threading.Event()

    def slowly(*args: Any, **more: Any) -> Any:
        if slow.is_set():
            asked.set()
            time.sleep(3)
        return plan(*args, **more)

    monkeypatch.setattr(server.engine, "plan", slowly)
    slow.set()  # the estimate that follows the end of the job takes long
    server.groups.let_go.set()
    wait_state(page, "finished")
    assert asked.wait(60)
    page.fill("#seed :is(input, textarea)", "12x")
    page.keyboard.press("Tab")
    page.wait_for_selector(".estimate.bad")
    page.wait_for_timeout(4000)
    assert page.locator(".estimate.bad").count() == 1, "the older estimate came back last"


def test_loading_engine_takes_jobs_at_once(browser: Any, tmp_path: Path) -> None:
    server = Server(tmp_path, can_load=False)
    page = browser.new_context().new_page()
    page.set_default_timeout(DEADLINE_MS)
    page.goto(server.url)
    page.wait_for_selector(".chip.starting")
    page.wait_for_selector(".estimate b")
    page.fill("#prompt textarea", "patience")
    page.click("#generate")
    page.wait_for_selector("text=the model is loading")
    shoot(page, "loading")
    page.click("#stop")
    wait_state(page, "cancelled")
    page.context.close()
    server.close()


@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, False), (390, 844, True), (1440, 1000, True)])
def test_layouts(visit: Any, server: Server, width: int, height: int, dark: bool) -> None:
    page = visit(width=width, height=height, dark=dark)
    name = f"{width}-{'dark' if dark else 'light'}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"idle-{name}", full_page=True)
    server.groups.slow_at = 3
    ask(page, "a quiet harbour at dusk, boats slowly rocking", 12)
    page.wait_for_selector(".block.ready", state="attached")
    shoot(page, f"running-{name}", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 500:  # the stage has been scrolled to, and Stop is within reach
        page.wait_for_function("document.querySelector('#video').getBoundingClientRect().top < innerHeight / 2")
        assert page.evaluate("document.querySelector('#stop').getBoundingClientRect().bottom <= innerHeight")
    server.groups.let_go.set()
    wait_state(page, "finished")
    page.wait_for_selector("#gallery li")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"done-{name}", full_page=True)


def test_the_whole_way_by_keyboard(visit: Any, server: Server) -> None:
    page = visit()
    page.focus("#prompt textarea")
    page.keyboard.type("by keyboard")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "generate":
            break
    assert seen[-1] == "generate", seen
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focused button cannot be seen"
    page.keyboard.press("Enter")
    wait_state(page, "finished")
