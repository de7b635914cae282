"""Takes the README's pictures of the page from a running server:  python docs/take_pictures.py [address] [prompt]

Needs `chromium` and the packages of requirements-dev.txt. Writes docs/images/page.png, page-dark.png and page-phone.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parent / "images"
DEADLINE_MS = 300_000
SECONDS = "60"  # long enough to be still at work when the picture is taken


def take(browser: Browser, address: str, prompt: str, name: str, width: int, height: int, theme: str) -> None:
    """Ask for a video, take the picture when a few of its blocks are ready and one is playing, and stop it."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(DEADLINE_MS)
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector(".chip.ready")
    page.wait_for_selector(".estimate b")
    page.fill("#prompt textarea", prompt)
    page.fill("#seconds input[type=number]", SECONDS)
    page.keyboard.press("Tab")
    page.wait_for_timeout(1000)
    page.click("#generate")
    page.wait_for_selector(".block.ready >> nth=2", state="attached")
    page.wait_for_function("document.querySelector('#video video')?.currentTime > 0.6")
    top = "#stage" if width <= 760 else "body"  # a phone shows the form or the film
    page.evaluate("(top) => document.querySelector(top).scrollIntoView({behavior: 'instant'})", top)
    page.wait_for_timeout(300)
    page.screenshot(path=IMAGES / f"{name}.png")
    page.click("#stop")
    page.wait_for_selector(".board.cancelled")
    context.close()


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860/"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "a red circle bouncing on a navy background"
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        take(browser, address, prompt, "page", 1280, 860, "light")
        take(browser, address, prompt, "page-dark", 1280, 860, "dark")
        take(browser, address, prompt, "page-phone", 390, 844, "light")
        browser.close()


if __name__ == "__main__":
    main()
