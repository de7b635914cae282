"""Secrets stay where they were given: a server that runs, is attacked and breaks tells nobody its tokens and passwords."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from pathlib import Path

import httpx
import psutil
import pytest

from dualparal import network
from dualparal.errors import DualParalError, EngineError
from dualparal.hosts import listener as listener_module
from dualparal.hosts.listener import HostListener
from dualparal.hosts.torchrun import SECRET_VARIABLE, Notice, Team
from dualparal.ui import serve

ROOT = Path(__file__).resolve().parents[1]
PASSWORD, TOKEN, SECRET = "correct-horse-9431", "hf_NeverTellThisToAnybody", "battery-staple-2207"
KEY = "sk-lama-crossing-7731"
DEADLINE_S = 600.0  # a loaded machine starts workers in minutes
TEAM = Team(rank=0, ranks=3, local_rank=0, local_ranks=1, master_addr="127.0.0.1", master_port=1, run_id="test")


def address_of(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server says that it runs."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, log.read_text()
        if found := re.search(r"local URL: +(http://[\d.:]+)", log.read_text()):
            return found[1]
        time.sleep(0.3)
    raise AssertionError("the page did not open")


def until(url: str, code: int) -> httpx.Response:
    """The answer of /readyz once it has that code."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        if (answer := httpx.get(f"{url}/readyz", timeout=60)).status_code == code:
            return answer
        time.sleep(0.3)
    raise AssertionError(f"/readyz did not answer {code}")


@pytest.mark.slow
@pytest.mark.timeout(3 * DEADLINE_S)
def test_a_server_tells_nobody(tiny: Path, tmp_path: Path) -> None:
    """Its logs, at their most talkative, its answers, its metrics and its files; a worker is killed meanwhile."""
    outputs = tmp_path / "outputs"
    command = [
        sys.executable, "-u", "-m", "dualparal", "serve", "--preset", str(tiny), "--device", "cpu", "--threads", "1",
        "--outputs", str(outputs), "--auth", f"ada:{PASSWORD}", "--verbose", "--log-json",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN, SECRET_VARIABLE: SECRET, "DUALPARAL_API_KEYS": KEY}
    answers: list[str] = []
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            url = address_of(server, tmp_path / "log")
            until(url, 200)
            for password in ("guess", PASSWORD[:-1], PASSWORD):
                answers.append(httpx.post(f"{url}/login", data={"username": "ada", "password": password}, timeout=60).text)
            for path in ("/config", "/gradio_api/info", f"/gradio_api/file={tmp_path}/log", "/metrics", "/no/such/page"):
                answers.append(httpx.get(url + path, timeout=60).text)
            for key, code in ((KEY[:-1], 401), (KEY, 200)):
                answer = httpx.get(f"{url}/v1/videos", headers={"Authorization": f"Bearer {key}"}, timeout=60)
                assert answer.status_code == code
                answers.append(answer.text)
            answers.append(httpx.post(f"{url}/gradio_api/run/predict", content=b"[" * 5000, timeout=60).text)
            worker = next(child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline()))
            worker.kill()
            until(url, 503)
            answers.append(until(url, 200).text)
        finally:
            server.terminate()
            assert server.wait(DEADLINE_S) == 0
    written = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    assert any("SIGKILL" in line["message"] and line["worker"] == "front end" for line in lines), written
    files = "".join(path.read_text(errors="replace") for path in outputs.rglob("*") if path.is_file())
    for secret in (PASSWORD, TOKEN, SECRET, KEY):
        assert secret not in written and secret not in files
        assert all(secret not in answer for answer in answers)


def test_a_login_that_cannot_be_read_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (PASSWORD, f"ada:{PASSWORD},{PASSWORD}", f":{PASSWORD}"):
        with pytest.raises(DualParalError, match="USER:PASSWORD") as error:
            serve.logins(text)
        assert PASSWORD not in str(error.value)
    with pytest.raises(SystemExit):
        serve.parser().parse_args(["--auth", f"ada:{PASSWORD}", "--no_such_flag"])
    assert PASSWORD not in capsys.readouterr().err


def test_the_hosts_secret_is_in_no_notice_and_no_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    left: list[Notice] = []
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    monkeypatch.setattr(listener_module, "leave_notice", lambda team, notice: left.append(notice))
    turned_away = threading.Event()
    with caplog.at_level(logging.DEBUG):
        listener = HostListener(TEAM)
        try:
            with pytest.raises((AuthenticationError, EOFError, OSError)) as refused:
                network.dial(listener.notice.host, listener.notice.port, SECRET.encode())
            deadline_s = time.monotonic() + DEADLINE_S
            while "turned away" not in caplog.text and time.monotonic() < deadline_s:
                turned_away.wait(0.01)
        finally:
            listener.close()
    assert "turned away" in caplog.text
    monkeypatch.delenv(SECRET_VARIABLE)
    with pytest.raises(EngineError, match=SECRET_VARIABLE) as lacking:
        listener.notice.shared_key(TEAM)
    key = Notice(host="a", port=1, key=SECRET)  # the drawn key of a notice is a secret too
    reported = f"{caplog.text} {refused.value} {lacking.value} {left} {listener.notice}"
    assert SECRET not in reported and SECRET not in repr(key)
