"""No log line can be forged, and with `--log-json` each is one JSON object, whoever wrote it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dualparal.logs import PlainLines
from dualparal.options import EngineOptions
from dualparal.ring.worker import Uplink, run_worker

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 240
FORGED = "2026-01-01 00:00:00,000 ERROR [front end] dualparal: forged"
HOSTILE = f"x\n{FORGED}\r{FORGED}\x1b[2J\x9b1A\u202e\u2066\u2028\x85{FORGED}"

# Everything that writes without asking our loggers, in one process.
ALL_WAYS = f"""
import gc, logging, sys, threading, traceback, warnings
from dualparal.logs import set_up_logs
set_up_logs(verbose=True, as_json=sys.argv[1] == "json", worker="rank 1", owns_streams=True)
hostile = {HOSTILE!r}
def fails(): raise ValueError(hostile)
logging.getLogger("lib").warning("logged %s", hostile)
logging.getLogger("lib").warning("%d", "badly formatted")
warnings.warn("warned " + hostile)
try: fails()
except ValueError:
    logging.getLogger("lib").exception("traced")
    traceback.print_exc()
thread = threading.Thread(target=fails, name="th" + hostile); thread.start(); thread.join()
class Bad:
    def __del__(self): fails()
Bad(); gc.collect()
print("printed " + hostile, file=sys.stderr)
print("printed to stdout")
sys.stderr.write("no end of line")
sys.stderr.flush()
fails()
"""


def said(mode: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", ALL_WAYS, mode], env=env, capture_output=True, encoding="utf-8", timeout=DEADLINE_S, check=False
    )


def objects(text: str) -> list[dict[str, Any]]:
    """Every line as JSON; lines end at line feeds only, and nothing else in them could be taken for an end."""
    assert text.isascii() and "\r" not in text and "\x1b" not in text, text
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "worker", "job", "message"} <= line.keys() for line in lines), text
    return lines


def test_whatever_a_process_says_is_json() -> None:
    done = said("json")
    assert done.returncode == 1 and done.stdout == ""
    lines = objects(done.stderr)
    assert {line["worker"] for line in lines} == {"rank 1"}
    reported = [line["message"] for line in lines]
    assert f"logged {HOSTILE}" in reported and "printed to stdout" in reported and "no end of line" in reported
    assert any("UserWarning: warned x" in line["message"] and line["logger"] == "py.warnings" for line in lines)
    assert any("badly formatted" in message for message in reported)
    traced = [line["message"] for line in lines if HOSTILE in line.get("traceback", "")]
    for word in ("traced", "thread", "ignored", "ends"):
        assert any(word in message for message in traced), (word, traced)


def test_no_plain_line_is_forged() -> None:
    done = said("plain")
    assert done.returncode == 1 and done.stdout == "printed to stdout\n"
    for line in done.stderr.split("\n"):
        assert line.isprintable(), line
        assert not line.startswith(FORGED), line
        assert not line or line.startswith("  | ") or " [rank 1] " in line, line
    assert len(done.stderr.splitlines()) == len(done.stderr.split("\n")) - 1


def start_worker() -> None:
    """As the front end does; run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=a_worker, args=(there,))
    worker.start()
    worker.join(DEADLINE_S)
    here.close()


def a_worker(connection: Any) -> None:
    """A worker's whole process, whose work prints, warns and fails."""
    options: Any = SimpleNamespace(engine=EngineOptions(verbose=True, log_json=True), meeting_folder=None)
    run_worker("rank 0", connection, options, _says_a_lot)


def _says_a_lot(_: Uplink) -> None:
    print("printed", HOSTILE)
    print("complained", file=sys.stderr)
    warnings.warn("warned", stacklevel=1)
    raise RuntimeError(HOSTILE)


def test_a_worker_logs_json_to_the_last_line() -> None:
    command = [sys.executable, "-c", "from tests.test_logs import start_worker; start_worker()"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=DEADLINE_S, check=True)
    assert done.stdout == ""
    lines = objects(done.stderr)
    assert {line["worker"] for line in lines} == {"rank 0"}
    assert {"stdout", "stderr", "py.warnings", "dualparal.ring.worker"} <= {line["logger"] for line in lines}
    assert lines[-1]["message"].startswith("rank 0 ends: x\n") and HOSTILE in lines[-1]["traceback"]


def test_a_traceback_keeps_its_lines_but_each_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.logs._working_on", None)  # whatever another test of this process was at
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed %s", (HOSTILE,), sys.exc_info())
    record.exc_text = FORGED  # as another handler's formatter leaves it
    first, *others = PlainLines("codec").format(record).split("\n")
    assert "ERROR [codec] x: failed x\\n2026" in first and first.isprintable()
    assert others[0] == "  | Traceback (most recent call last):" and len(others) > 3
    assert all(line.startswith("  | ") and line.isprintable() for line in others)


@pytest.mark.timeout(3 * DEADLINE_S)
def test_a_server_logs_json_to_the_last_line(tmp_path: Path) -> None:
    """A real one, told garbage, then stopped: Gradio's and uvicorn's lines included, on both streams."""
    port = _free_port()
    command = [
        sys.executable, "-m", "dualparal", "serve", "--log-json", "--verbose", "--model_id", "pocket", "--device", "cpu",
        "--threads", "1", "--port", str(port), "--outputs", str(tmp_path / "outputs"),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
        try:
            _until_ready(server, url)
            _tell_garbage(url, port)
            server.send_signal(signal.SIGTERM)
            assert server.wait(DEADLINE_S) == 0
        finally:
            server.kill()
            server.wait()
    assert (tmp_path / "out").read_text() == ""
    lines = objects((tmp_path / "err").read_text())
    assert any("Running on" in line["message"] and url in line["message"] for line in lines)
    assert any(line["logger"] == "uvicorn.error" and "Invalid HTTP request" in line["message"] for line in lines)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None
        try:
            if httpx.get(f"{url}/readyz", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError("the server is not ready")


def _tell_garbage(url: str, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        raw.sendall(b"\x1b[2J\r\n" + FORGED.encode() + b"\r\n\r\n")
        raw.recv(1000)
    for body in (b"{", b"[" * 5000, json.dumps({"data": [HOSTILE], "fn_index": -1, "session_hash": HOSTILE}).encode()):
        for path in ("queue/join", "run/predict", "call/generate", "call/%0a%1b%5b2J", "upload"):
            httpx.post(f"{url}/gradio_api/{path}", content=body, headers={"content-type": "application/json"}, timeout=60)
