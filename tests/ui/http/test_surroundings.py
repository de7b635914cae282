"""What a machine sets around a server: proxies, temporary folders, odd spellings of paths and addresses, variables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualparal.ui import serve
from dualparal.ui.http.surroundings import PREFIX, host_of, is_port, private_folder, remove_leftovers, root_of, set_aside

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 240
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port(address: str) -> int:
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, *flags: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A real server of the tiny model; its temporary folder is `folder`/tmp."""
    (folder / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "app.py", "--device", "cpu", "--outputs", str(folder / "outputs"), *flags], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), **environment}, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], url: str) -> str:
    until_s = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            return str(DIRECT.open(url, timeout=10).read().decode())
        except OSError:
            time.sleep(0.3)
    raise AssertionError(process.communicate(timeout=10)[1] if process.poll() is not None else "it does not answer")


HOSTILE = {
    "HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9",
    "NO_PROXY": "10.0.0.0/8,::1,fd00::/8,[::1],.example.org", "GRADIO_DEBUG": "1", "GRADIO_SERVER_PORT": "",
}  # fmt: skip


@pytest.mark.parametrize(("host", "number", "more"), [
    ("::1", signal.SIGTERM, {"SYSTEM": "spaces", "SPACE_ID": "a/b"}), ("[::1]", signal.SIGINT, {"GRADIO_ROOT_PATH": "/"}),
])  # fmt: skip
def test_a_server_in_hostile_surroundings(
    tiny: Path, tmp_path: Path, host: str, number: signal.Signals, more: dict[str, str]
) -> None:
    """All at once: each by itself kept a server from starting, or from ending."""
    try:
        port = free_port("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "gradio").touch()  # as closed as another user's folder
    root = ["--root_path", "studio"] if "GRADIO_ROOT_PATH" not in more else []
    flags = ["--model_id", str(tiny), "--host", host, "--port", str(port), *root]
    with serving(tmp_path, *flags, **HOSTILE, **more) as process:
        url = f"http://[::1]:{port}"
        assert json.loads(answer(process, f"{url}/healthz")) == {"status": "alive"}
        config = json.loads(answer(process, f"{url}/config"))
        assert config["root"].removeprefix(url) == ("/studio" if root else "")
        (own,) = (tmp_path / "tmp").glob(f"{PREFIX}*")
        assert own.stat().st_mode & 0o777 == 0o700
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert not list((tmp_path / "tmp").glob(f"{PREFIX}*"))


def test_what_is_set_aside_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**HOSTILE, "GRADIO_SERVER_PORT": "70000", "GRADIO_ALLOWED_PATHS": "/x"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with set_aside():
        assert set(before) - set(os.environ) == set(HOSTILE) and "GRADIO_ALLOWED_PATHS" in os.environ
    assert dict(os.environ) == before
    monkeypatch.setenv("GRADIO_SERVER_PORT", "8000")
    with set_aside():
        assert os.environ["GRADIO_SERVER_PORT"] == "8000"


def test_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    (tmp_path / f"{PREFIX}left" / "upload").mkdir(parents=True)
    (tmp_path / f"{PREFIX}link").symlink_to("/")
    with private_folder():
        own = Path(os.environ["GRADIO_TEMP_DIR"])
        assert own.stat().st_mode & 0o777 == 0o700 and not (tmp_path / f"{PREFIX}left").exists()
        remove_leftovers(tmp_path)
        assert own.is_dir(), "another server of this user leaves it alone"
    assert "GRADIO_TEMP_DIR" not in os.environ and [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}link"]
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    with private_folder():
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_addresses_and_paths_in_other_spellings() -> None:
    assert [host_of(host) for host in ("::1", "[::1]", "127.0.0.1", "", None)] == ["[::1]", "[::1]", "127.0.0.1", "", None]
    roots = {"": "", "/": "", "studio": "/studio", "/studio/": "/studio", "a/b": "/a/b", "https://x.org/a/": "https://x.org/a"}
    assert {given: root_of(given) for given in roots} == roots
    assert is_port("1") and is_port("65535")
    assert not any(map(is_port, ("0", "65536", "70000", "-1", "x", "", "9" * 5000)))


@pytest.mark.parametrize(("flag", "wrong"), [
    ("port", "70000"), ("port", "0"), ("port", "-1"), ("port", "x"), ("host", ""), ("max_queue", "0"), ("max_queue", "nan"),
    ("max_disk_gb", "nan"), ("max_disk_gb", "inf"), ("max_disk_gb", "-1"), ("max_per_owner", "-1"), ("max_per_address", "-1"),
    ("max_per_address", "x"), ("replicas", "0"),
])  # fmt: skip
def test_numbers_of_a_server(flag: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serve.parser().parse_args([f"--{flag}={wrong}"])
    assert end.value.code == 2 and f"argument --{flag}" in capsys.readouterr().err
