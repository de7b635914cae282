"""The HTTP API over fake workers, through gradio_client as a user's script would: every endpoint, good and bad input."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from dualparal.errors import RequestError
from dualparal.files import checksum_of
from dualparal.media.metadata import describe, read_settings
from dualparal.messages import WorkerError
from dualparal.request import GenerationRequest
from dualparal.ui import owners
from dualparal.ui.api import MEANINGS, Calls
from dualparal.ui.studio import Studio
from tests.conftest import wait_until
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server

pytestmark = GRADIO_WARNINGS
SHORT = {"seconds": 1, "num_inference_steps": 3}
LONG = {"seconds": 20, "num_inference_steps": 50}


def has_ended(status: dict[str, Any]) -> bool:
    return status["state"] in ("finished", "failed", "cancelled")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("api"), item_s=0.003)
    yield made
    made.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, item_s=0.05, max_queue=2)
    yield made
    made.close()


# Good calls


def test_generate_yields_status_while_running_and_ends_with_the_video(slow: Server) -> None:
    job = slow.client.submit(prompt="a kite", seed=3, seconds=6, num_inference_steps=30, api_name="/generate")
    updates = list(job)
    assert len(updates) > 2, "only one update: nothing was told while it ran"
    assert all(video is None for video, _ in updates[:-1])
    assert any(status["state"] == "running" and 0 < status["progress"] < 1 for _, status in updates)
    path, status = updates[-1]
    assert status["state"] == "finished" and status["progress"] == 1.0
    assert describe(path)["num_frames"] == status["num_frames"] == 97
    assert read_settings(path).seed == 3
    assert [block["first_frame"] for block in status["blocks"]] == sorted({b["first_frame"] for b in status["blocks"]})
    assert sum(block["num_frames"] for block in status["blocks"]) == 97


def test_submit_status_result(server: Server) -> None:
    begun = server.client.predict(prompt="a red kite", api_name="/submit", **SHORT)
    assert begun["state"] in ("queued", "running")
    status = server.wait(begun["job_id"], has_ended)
    path, last = server.client.predict(job_id=begun["job_id"], api_name="/result")
    assert status["state"] == last["state"] == "finished"
    assert describe(path)["num_frames"] == last["num_frames"]
    assert last["settings"]["prompt"] == "a red kite" and last["settings"]["num_inference_steps"] == 3
    assert {"text_s", "denoise_s", "decode_s", "encode_s", "total_s", "first_frames_s"} <= set(last["timings"])


def test_prompt_alone_is_enough(server: Server) -> None:
    begun = server.client.predict("just words", api_name="/submit")
    assert begun["settings"]["num_per_block"] == server.engine.preset.num_per_block
    server.client.predict(job_id=begun["job_id"], api_name="/cancel")


def test_shots_are_written_in_the_prompt_or_given(server: Server) -> None:
    shots = [{"prompt": "red", "seconds": 1}, {"prompt": "blue", "seconds": 1, "transition": "cut"}]
    written = server.client.predict(prompt="a kite\n[1s] red\n[1s cut] blue", seed=3, api_name="/submit")
    given = server.client.predict(prompt="a kite", shots=shots, seed=3, api_name="/submit")
    assert written["settings"] == given["settings"]
    assert [shot["transition"] for shot in given["settings"]["shots"]] == ["switch", "cut"]
    for begun in (written, given):
        server.client.predict(job_id=begun["job_id"], api_name="/cancel")
    with pytest.raises(AppError, match="shots: shot 1 has no length"):
        server.client.predict(prompt="a kite", shots=[{"prompt": "red"}], api_name="/submit")


def test_the_longest_timeline_arrives(server: Server) -> None:
    text = "x" * 100 + "".join(f"\n[0.5s] {'é' * 115}" for _ in range(200))
    assert 47_000 < len(text.encode()) < 48_000
    begun = server.client.predict(prompt=text, api_name="/submit")
    assert len(begun["settings"]["shots"]) == 200
    server.client.predict(job_id=begun["job_id"], api_name="/cancel")


def test_presets_lists_the_usable_one_first(server: Server) -> None:
    presets = server.client.predict(api_name="/presets")
    assert presets[0]["name"] == "pocket" and presets[0]["usable"] and presets[0]["default"]
    assert presets[0]["limits"]["num_inference_steps"] == 60


def test_every_parameter_is_documented(server: Server) -> None:
    api = server.client.view_api(return_format="dict", print_info=False)
    names = {"generate", "submit", "status", "cancel", "resume", "steer", "finish", "delete", "result", "look", "presets"}
    assert set(api["named_endpoints"]) == {f"/{name}" for name in names}
    fields = set(GenerationRequest.model_fields) | {"preset", "continue_video", "owner"}
    for name in ("/generate", "/submit"):
        parameters = api["named_endpoints"][name]["parameters"]
        assert {parameter["parameter_name"] for parameter in parameters} == fields
        for parameter in parameters:
            assert parameter["label"] == MEANINGS[parameter["parameter_name"]]
            assert parameter["parameter_has_default"] == (parameter["parameter_name"] != "prompt")
    for name, function in Calls(Studio(server.engine)).endpoints().items():
        reported = api["named_endpoints"][f"/{name}"]["description"]
        assert reported.split() == str(inspect.getdoc(function)).split()


# A picture to begin with


def test_a_picture_is_uploaded(server: Server, tmp_path: Path) -> None:
    Image.effect_noise((90, 60), 90).save(path := tmp_path / "a rose.png")
    begun = server.client.predict(prompt="a kite", start_image=handle_file(str(path)), api_name="/submit", **SHORT)
    found = server.wait(begun["job_id"], has_ended)
    kept = server.engine.outputs / begun["job_id"] / "start.png"
    assert found["settings"]["start_image"] == checksum_of(kept.read_bytes())
    settings = found["settings"]
    with Image.open(kept) as picture:
        assert picture.size == (settings["width"], settings["height"])


@pytest.mark.parametrize(
    "value", [__file__, {"path": __file__}, {"path": "/etc/hostname"}, {"path": ""}, {"path": "\0"}, 5, []]
)
def test_nobody_names_a_file_of_the_server(server: Server, value: Any) -> None:
    before = set(server.engine.outputs.iterdir())
    with pytest.raises(AppError, match="start_image: it has to be uploaded"):
        server.client.predict(prompt="a kite", start_image=value, api_name="/submit", **SHORT)
    assert set(server.engine.outputs.iterdir()) == before


@pytest.mark.parametrize("is_file_data", [True, False])
def test_an_address_as_a_picture_is_not_fetched(server: Server, is_file_data: bool) -> None:
    """Neither by the endpoint nor by Gradio, which fetches what says that it is a file."""
    before = set(server.engine.outputs.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        picture = {"path": address, "url": address, "meta": {"_type": "gradio.FileData" if is_file_data else ""}}
        asked = {"prompt": "a kite", "start_image": picture, **SHORT}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            made = client.post("gradio_api/call/v2/submit", json=asked)
            answer = client.get(f"gradio_api/call/submit/{made.json()['event_id']}").text if made.is_success else "event: error"
        assert "event: error" in answer
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert set(server.engine.outputs.iterdir()) == before


def test_what_is_no_picture_is_refused(server: Server, tmp_path: Path) -> None:
    (path := tmp_path / "a.png").write_text("<svg/>")
    with pytest.raises(AppError, match="neither PNG, JPEG nor WebP"):
        server.client.predict(prompt="a kite", start_image=handle_file(str(path)), api_name="/submit", **SHORT)


# Bad calls


BAD = {
    "prompt None": ({"prompt": None}, "prompt"),
    "prompt number": ({"prompt": 5}, "prompt"),
    "prompt 50 kB": ({"prompt": "x" * 50_000}, "50000 characters"),
    "seed text": ({"seed": "abc"}, "seed"),
    "seed negative": ({"seed": -1}, "seed"),
    "seed fraction": ({"seed": 1.5}, "seed"),
    "seed huge": ({"seed": 2**63}, "seed"),
    "seed bool": ({"seed": True}, "seed"),
    "seconds zero": ({"seconds": 0}, "seconds"),
    "seconds list": ({"seconds": [1]}, "seconds"),
    "seconds over the limit": ({"seconds": 500}, "120 s"),
    "two lengths": ({"seconds": 1, "num_frames": 5}, "length"),
    "frames not 4k+1": ({"num_frames": 6}, "num_frames"),
    "latents text": ({"latents_num": "many"}, "latents_num"),
    "height odd": ({"height": 97}, "96 or 112"),
    "width huge": ({"width": 10**9}, "width"),
    "fps zero": ({"fps": 0}, "fps"),
    "steps zero": ({"num_inference_steps": 0}, "num_inference_steps"),
    "steps over the preset's limit": ({"num_inference_steps": 61}, "60"),
    "guidance text": ({"guidance_scale": "strong"}, "guidance_scale"),
    "guidance 2 negative": ({"guidance_scale_2": -1}, "guidance_scale_2"),
    "boundary above 1": ({"boundary_ratio": 1.5}, "boundary_ratio"),
    "shift zero": ({"flow_shift": 0}, "flow_shift"),
    "block zero": ({"num_per_block": 0}, "num_per_block"),
    "context above block": ({"num_per_block": 2, "num_cat": 3}, "num_cat"),
    "context negative": ({"num_cat": -1}, "num_cat"),
    "schedule unknown": ({"schedule": "fastest"}, "schedule"),
    "context unknown": ({"context": {"a": 1}}, "context"),
    "negative prompt list": ({"negative_prompt": ["a"]}, "negative_prompt"),
    "preset unknown": ({"preset": "pockt"}, "did you mean 'pocket'"),
    "preset list": ({"preset": ["pocket"]}, "preset"),
    "preset path": ({"preset": "../../etc/passwd"}, "preset"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_value_is_one_sentence_and_nothing_is_queued(server: Server, case: str) -> None:
    values, words = BAD[case]
    before = set(server.engine.outputs.iterdir())
    with pytest.raises(AppError) as caught:
        server.client.predict(**{"prompt": "a kite", **values}, api_name="/submit")
    message = str(caught.value)
    assert words in message
    assert "Traceback" not in message and "\n" not in message and len(message) < 600
    assert set(server.engine.outputs.iterdir()) == before


def test_generate_reports_bad_values_too(server: Server) -> None:
    with pytest.raises(AppError, match="num_inference_steps"):
        server.client.predict(prompt="a kite", num_inference_steps=-3, api_name="/generate")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_not_a_number_in_the_raw_body(server: Server, value: str) -> None:
    body = f'{{"data": ["a kite", null, {value}{", null" * len(GenerationRequest.model_fields)}]}}'
    posted = httpx.post(f"{server.url}gradio_api/call/submit", content=body, headers={"Content-Type": "application/json"})
    if posted.status_code == 200:
        answer = httpx.get(f"{server.url}gradio_api/call/submit/{posted.json()['event_id']}", timeout=30).text
        assert "event: error" in answer and "seconds" in answer and "Traceback" not in answer


def test_html_in_a_prompt_comes_back_as_it_was(server: Server) -> None:
    prompt = "<script>alert(1)</script><img src=x onerror=alert(2)> {{7*7}} ${1+1}"
    begun = server.client.predict(prompt=prompt, api_name="/submit", **SHORT)
    assert server.wait(begun["job_id"], has_ended)["settings"]["prompt"] == prompt


@pytest.mark.parametrize("endpoint", ["/status", "/cancel", "/result"])
@pytest.mark.parametrize("job_id", ["../../etc", "abcdef-000000", "", None, 5, ["a"], "A" * 5000, "0" * 36 + "\n"])
def test_bad_job_ids(server: Server, endpoint: str, job_id: Any) -> None:
    with pytest.raises(AppError) as caught:
        server.client.predict(job_id=job_id, api_name=endpoint)
    assert "job" in str(caught.value) and "Traceback" not in str(caught.value)


# Failing, stopping, waiting


def test_a_failed_job_is_a_sentence_and_keeps_its_finished_part(server: Server) -> None:
    with pytest.raises(AppError, match="ran out of memory"):
        server.client.predict(prompt="please fail", api_name="/generate", seconds=6)
    begun = server.client.predict(prompt="please fail", seconds=12, num_inference_steps=4, api_name="/submit")
    status = server.wait(begun["job_id"], has_ended)
    assert status["state"] == "failed" and "ran out of memory" in status["error"]
    path, status = server.client.predict(job_id=begun["job_id"], api_name="/result")
    assert 0 < describe(path)["num_frames"] == status["num_frames_ready"] < status["num_frames"]


def test_cancel_while_running_keeps_what_is_finished(slow: Server) -> None:
    job_id = slow.client.predict(prompt="long", seconds=20, num_inference_steps=5, api_name="/submit")["job_id"]
    slow.wait(job_id, lambda status: len(status["blocks"]) >= 2)
    slow.client.predict(job_id=job_id, api_name="/cancel")
    status = slow.wait(job_id, has_ended)
    assert status["state"] == "cancelled"
    path, _ = slow.client.predict(job_id=job_id, api_name="/result")
    assert describe(path)["num_frames"] == status["num_frames_ready"] >= 21 + 16


def test_cancel_while_queued_and_result_too_early(slow: Server) -> None:
    first = slow.client.predict(prompt="long", api_name="/submit", **LONG)["job_id"]
    slow.wait(first, lambda status: status["state"] == "running")
    second = slow.client.predict(prompt="waits", api_name="/submit", **LONG)
    assert second["state"] == "queued" and second["position"] == 1
    with pytest.raises(AppError, match="queued"):
        slow.client.predict(job_id=second["job_id"], api_name="/result")
    slow.client.predict(job_id=second["job_id"], api_name="/cancel")
    assert slow.wait(second["job_id"], has_ended)["state"] == "cancelled"
    assert slow.client.predict(job_id=second["job_id"], api_name="/result")[0] is None
    slow.client.predict(job_id=first, api_name="/cancel")


def test_full_queue_is_refused_with_the_number(slow: Server) -> None:
    begun = [slow.client.predict(prompt=f"job {n}", api_name="/submit", **LONG)["job_id"] for n in range(1)]
    slow.wait(begun[0], lambda status: status["state"] == "running")
    begun += [slow.client.predict(prompt=f"job {n}", api_name="/submit", **LONG)["job_id"] for n in range(2)]
    with pytest.raises(AppError, match="2 jobs are waiting"):
        slow.client.predict(prompt="one too many", api_name="/submit", **LONG)
    for job_id in begun:
        slow.client.predict(job_id=job_id, api_name="/cancel")


def test_a_client_that_hangs_up_does_not_stop_its_job(slow: Server) -> None:
    other = slow.new_client()
    running = other.submit(prompt="goes on", seconds=4, api_name="/generate")
    _, status = next(iter(running))
    other.close()
    assert slow.wait(status["job_id"], has_ended)["state"] == "finished"


def test_status_answers_within_a_second_while_several_jobs_run(slow: Server) -> None:
    job_id = slow.client.predict(prompt="long", api_name="/submit", **LONG)["job_id"]
    for _ in range(5):
        began = time.monotonic()
        slow.client.predict(job_id=job_id, api_name="/status")
        assert time.monotonic() - began < 5  # the second, with room for a busy test machine
    slow.client.predict(job_id=job_id, api_name="/cancel")


# Owners


def test_a_job_with_an_owner_is_unknown_to_others(slow: Server) -> None:
    job_id = slow.client.predict(prompt="mine", owner="my secret", api_name="/submit", **LONG)["job_id"]
    for owner in (None, "", "guess"):
        for endpoint in ("/status", "/cancel", "/result"):
            with pytest.raises(AppError, match="there is no job"):
                slow.client.predict(job_id=job_id, owner=owner, api_name=endpoint)
    studio = Studio(slow.engine)
    for owner in ("", owners.owner_of("guess")):
        for action in (studio.resume, studio.compare, studio.cancel, studio.delete):  # the page's buttons
            with pytest.raises(RequestError, match="there is no job"):
                action(job_id, owner)
    assert slow.client.predict(job_id=job_id, owner="my secret", api_name="/cancel")["job_id"] == job_id
    assert slow.wait(job_id, has_ended, owner="my secret")["state"] == "cancelled"
    assert "my secret" not in (slow.engine.outputs / job_id / "request.json").read_text()


def test_with_logins_the_login_is_the_owner(tmp_path: Path) -> None:
    server = Server(tmp_path, auth=[("ada", "one"), ("bob", "two")])
    try:
        assert httpx.get(f"{server.url}config").status_code == 401
        assert httpx.get(f"{server.url}healthz").status_code == 200
        job_id = server.client.predict(prompt="mine", api_name="/submit", **SHORT)["job_id"]
        server.wait(job_id, has_ended)
        bob = server.new_client(auth=("bob", "two"))
        with pytest.raises(AppError, match="there is no job"):
            bob.predict(job_id=job_id, api_name="/result")
        video = server.engine.outputs / job_id / "video.mp4"
        assert httpx.get(f"{server.url}gradio_api/file={video}").status_code == 401
        bob.close()
    finally:
        server.close()


# The server around it


def test_health_and_readiness(tmp_path: Path) -> None:
    server = Server(tmp_path, can_load=False)
    url = server.url
    try:
        assert httpx.get(f"{url}healthz").json() == {"status": "alive"}
        starting = httpx.get(f"{url}readyz")
        assert starting.status_code == 503 and starting.json()["state"] == "starting"
        server.groups.can_load.set()
        server.engine.wait_ready(DEADLINE_S)
        assert httpx.get(f"{url}readyz").status_code == 200
        server.groups.start_errors = [WorkerError("rank 0", "CheckpointError", "no weights")]
        server.groups.groups[-1].kill()
        assert wait_until(lambda: server.engine.state == "failed", DEADLINE_S)
        assert httpx.get(f"{url}readyz").json() == {"state": "failed", "model": "pocket", "error": "no weights"}
    finally:
        server.close()


def test_only_the_outputs_folder_is_served(server: Server) -> None:
    for path in ("/etc/passwd", str(Path(__file__)), f"{server.engine.outputs}/../../../../../../../../etc/passwd"):
        answer = httpx.get(f"{server.url}gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "/" not in answer.json()["detail"], "it names no path of the server"


def test_an_upload_above_the_limit_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.ui.http.bodies.MAX_UPLOAD_BYTES", 100_000)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    made = Server(tmp_path / "outputs")
    try:
        for size, code in ((50_000, 200), (150_000, 413)):
            answer = httpx.post(f"{made.url}gradio_api/upload", files={"files": ("video.mp4", b"0" * size, "video/mp4")})
            assert answer.status_code == code, answer.text
        kept = [path.stat().st_size for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
        assert kept == [50_000]
    finally:
        made.close()


def test_events_of_the_page_cannot_be_called_by_name_or_past_the_queue(server: Server) -> None:
    config = httpx.get(f"{server.url}config").json()
    private = [d["id"] for d in config["dependencies"] if d["api_visibility"] == "private" and d["queue"] is not False]
    assert private
    for body in ({"data": [], "fn_index": private[0]}, {"data": ["x"], "fn_index": private[-1]}):
        answer = httpx.post(f"{server.url}gradio_api/run/predict", json=body)
        assert answer.status_code >= 400 and "Traceback" not in answer.text


@pytest.mark.slow
def test_the_front_end_never_imports_torch(tmp_path: Path) -> None:
    """Everything that the server's process imports, a page built and a job run included; and it is quick."""
    script = f"""
import json, sys, time
from pathlib import Path
began = time.monotonic()
from tests.page_server import Server
server = Server(Path({str(tmp_path)!r}))
took_s = time.monotonic() - began
server.client.predict(prompt="a kite", seconds=1, num_inference_steps=2, api_name="/generate")
heavy = sorted(name for name in ("torch", "diffusers", "transformers", "matplotlib") if name in sys.modules)
print("RESULT", json.dumps([heavy, took_s]), flush=True)
import os
os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line, ran.stderr[-2000:]
    heavy, took_s = json.loads(line.removeprefix("RESULT "))
    assert heavy == []
    assert took_s < 60  # about 3 s on an idle machine
