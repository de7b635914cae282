"""The lines of docs/live.md for a page on another site, with hls.js, which is not shipped: a video plays while it is made.

`npm install --no-save hls.js`, or `DUALPARAL_HLS_JS` names its hls.min.js.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.ui.http.sites import Sites
from tests.browser.test_page import browser  # noqa: F401
from tests.page_server import GRADIO_WARNINGS, Server
from tests.ui.v1.test_videos import ANN, raw, started, until

DEADLINE_MS = 300_000
ROOT = Path(__file__).resolve().parents[2]
LINES = re.findall(r"```html\n(.*?)```", (ROOT / "docs" / "live.md").read_text(encoding="utf-8"), re.S)
HLS_JS = Path(os.environ.get("DUALPARAL_HLS_JS") or ROOT / "node_modules" / "hls.js" / "dist" / "hls.min.js")
pytestmark = [
    *GRADIO_WARNINGS,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not HLS_JS.is_file(), reason="no hls.js (npm install --no-save hls.js)"),
]
BEFORE = "<script>const studio = %r, video = {live_url: %r};</script>"
AFTER = """<script>
window.failed = [];
hls.on(Hls.Events.ERROR, (_, data) => data.fatal && window.failed.push(data.details));
document.getElementById("film").muted = true;
document.getElementById("film").play();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """Another site, with the files of `folder`."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        served.server_close()


def test_hls_js_plays_a_growing_video(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    (page,) = LINES
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "hls.min.js").write_bytes(HLS_JS.read_bytes())
    with contextlib.ExitStack() as life:
        origin = life.enter_context(site(elsewhere))
        server = Server(tmp_path / "outputs", sites=Sites.of(origins=[origin]), item_s=0.005, keys=(ANN,))
        life.callback(server.close)
        video_id = started(server)
        client = life.enter_context(raw(server))
        address = client.get(f"/videos/{video_id}").json()["live_url"]
        (elsewhere / "index.html").write_text(BEFORE % (server.url.rstrip("/"), address) + page + AFTER)
        context = browser.new_context()
        life.callback(context.close)
        tab = context.new_page()
        tab.set_default_timeout(DEADLINE_MS)
        tab.goto(f"{origin}/index.html")
        tab.wait_for_function("document.getElementById('film').currentTime > 0.3")
        server.groups.let_go.set()
        until(client, video_id, lambda told: told["status"] == "completed")
        tab.wait_for_function("document.getElementById('film').ended")
        assert abs(tab.evaluate("document.getElementById('film').currentTime") - 97 / 16) < 0.2
        assert tab.evaluate("window.failed") == []
