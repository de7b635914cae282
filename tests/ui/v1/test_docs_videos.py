"""The lines of docs/videos_api.md and docs/live.md, run by bash and Python against a page over fake workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dualparal.media.ffmpeg import ffmpeg_path
from dualparal.media.metadata import describe
from tests.page_server import GRADIO_WARNINGS, Server
from tests.ui.v1.test_videos import ANN, raw, until

pytestmark = GRADIO_WARNINGS
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "videos_api.md").read_text(encoding="utf-8")
PLAIN, _, REST = PAGE.partition("## Directing")
DIRECTING = REST.partition("## A video object")[0]
CURL = [block for block in re.findall(r"```bash\n(.*?)```", PLAIN, re.S) if "curl" in block]
PYTHON = {"completed 65\n": PLAIN, "completed completed 97\n": DIRECTING}
TIMEOUT_S = 300  # of a script, on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("v1"), item_s=0.001, keys=(ANN,))
    yield made
    made.close()


def test_the_curl_lines(server: Server, tmp_path: Path) -> None:
    assert len(CURL) == 4
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "first.png")
    waits = (
        'until curl -s $STUDIO/v1/videos/$VIDEO -H "Authorization: Bearer $KEY" | grep -q \'"completed"\'; do sleep 0.2; done\n'
    )
    script = "set -euo pipefail\n" + CURL[0] + waits + "".join(CURL[1:])
    environment = {**os.environ, "STUDIO": server.url.rstrip("/"), "KEY": ANN}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert describe(tmp_path / "video.mp4")["num_frames"] == 65
    assert (tmp_path / "so_far.ts").stat().st_size > 1000 and Image.open(tmp_path / "first.jpg").size == (96, 96)
    told = [json.loads(line) for line in done.stdout.replace("}{", "}\n{").splitlines()]
    assert told[-1]["deleted"] and told[-2]["status"] == "completed"
    assert [one["settings"]["start_image"] is not None for one in told if "start_image" in one.get("settings", {})] == [True]


@pytest.mark.parametrize("says", PYTHON)
def test_the_python_lines(says: str, server: Server, tmp_path: Path) -> None:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}v1", "OPENAI_API_KEY": ANN}
    (block,) = re.findall(r"```python\n(.*?)```", PYTHON[says], re.S)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == says
    (video,) = tmp_path.glob("*.mp4")
    assert describe(video)["num_frames"] == int(says.split()[-1])


def test_the_lines_about_directing(server: Server, tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", DIRECTING, re.S)
    assert len(blocks) == 2
    environment = {**os.environ, "STUDIO": server.url.rstrip("/"), "KEY": ANN}
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + "".join(blocks)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    takes, chosen, steered, film = [json.loads(line) for line in done.stdout.replace("}{", "}\n{").splitlines()]
    assert [one["take"] for one in takes["data"]] == [1, 2, 3] and chosen["id"] == takes["data"][1]["id"]
    assert steered["steered"]["block"] > 0 and film["num_frames"] > 0 and not film["settings"]["is_endless"]
    assert b"nothing can be seen of it yet" in (tmp_path / "take.webp").read_bytes(), "these workers take no looks"


def test_the_names_that_it_tells(server: Server) -> None:
    with raw(server) as client:
        video_id = client.post("/videos", json={"prompt": "a kite", "seconds": 1}).json()["id"]
        found = until(client, video_id, lambda found: found["status"] == "completed")
    text = PAGE.partition("## A video object")[2].partition("## Refusals")[0]
    names = set(re.findall(r"`(\w+)`", text)) - {
        "queued",
        "in_progress",
        "completed",
        "failed",
        "cancelled",
        "interrupted",
        "resting",
        "url",
    }
    assert names <= set(found), names - set(found)
    source = "".join(
        path.read_text(encoding="utf-8") for path in (Path(__file__).resolve().parents[3] / "dualparal/ui").rglob("*.py")
    )
    for code in re.findall(r"`([a-z_]+)`", PAGE.partition("## Refusals")[2]):
        assert f'"{code}"' in source, code


LIVE = (Path(__file__).resolve().parents[3] / "docs" / "live.md").read_text(encoding="utf-8")


def test_the_lines_of_the_page_about_watching(server: Server, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(ffmpeg_path())
    with raw(server) as client:
        video_id = client.post("/videos", json={"prompt": "a kite", "seconds": 2}).json()["id"]
    found = dict(re.findall(r"```(bash|python)\n(.*?)```", LIVE.partition("## In a program")[2], re.S))
    player = re.findall(r"```bash\n(.*?)```", LIVE, re.S)[0]
    environment = {**os.environ, "STUDIO": server.url.rstrip("/"), "KEY": ANN, "VIDEO": video_id}
    environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    (tmp_path / "follow.py").write_text(found["python"])
    script = f"set -euo pipefail\n{found['bash']}\n{player}\n{sys.executable} follow.py"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: completed\n" in done.stdout and done.stdout.endswith("block 0\nblock 1\ncompleted\n")
    assert describe(tmp_path / "live.mp4")["num_frames"] == 33
    source = (Path(__file__).resolve().parents[3] / "dualparal" / "ui" / "v1" / "events.py").read_text(encoding="utf-8")
    for name in ("items_done", "num_items", "block_steps", "num_pictures", "first_frame", "gone"):
        assert f'"{name}"' in source and f"`{name}`" in LIVE
