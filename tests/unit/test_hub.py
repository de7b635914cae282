"""Downloads, from a small server on this host that speaks the hub's API: only what is needed, resumed, explained."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dualparal.errors import CheckpointError, PresetError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/Tiny-Wan"


class Hub(ThreadingHTTPServer):
    """One model repository. `asked`: (method, path, Range header) of every request."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.asked: list[tuple[str, str, str | None]] = []
        self.logins: set[str | None] = set()
        self.status = 200
        self.cut_off: str | None = None  # a file that ends halfway, once

    def fetched(self) -> list[str]:
        return [
            path.split("/resolve/", 1)[1].split("/", 1)[1]
            for method, path, _ in self.asked
            if "/resolve/" in path and method == "GET"
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        hub.logins.add(self.headers.get("Authorization"))
        if hub.status != 200:
            code = {401: "GatedRepo", 404: "RepoNotFound"}.get(hub.status, "")
            self._send(hub.status, b"{}", {"X-Error-Code": code} if code else {}, has_body)
        elif path.startswith(f"/api/models/{REPO}/tree"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, has_body)
        elif path.startswith(f"/api/models/{REPO}"):
            if path.endswith("/gone"):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, has_body)
                return
            about = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, has_body)
        elif path.startswith(f"/{REPO}/resolve/"):
            self._send_file(path.split("/resolve/", 1)[1].split("/", 1)[1], has_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, has_body)

    def _send_file(self, name: str, has_body: bool) -> None:
        data = self.server.files.get(name)
        if data is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, has_body)
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, ranged = 200, self.headers.get("Range")
        whole = len(data)
        if ranged and has_body:
            start = int(ranged.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            status, data = 206, data[start:]
        if self.server.cut_off == name and has_body:
            self.server.cut_off = None
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self._send(status, data, headers, has_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], has_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if has_body:
            self.wfile.write(data)


@pytest.fixture
def hub(tiny_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tiny_sharded)
    server.files |= {"README.md": b"#", "examples/a.mp4": b"x" * 99, "transformer/pickled.bin": b"y", "vae/extra.pth": b"z"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = importlib.import_module("huggingface_hub.constants")
    endpoint = f"http://127.0.0.1:{server.server_port}"
    # huggingface_hub reads its environment when it is imported, which other tests have done before.
    for name, value in {
        "ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    api = importlib.import_module("huggingface_hub.hf_api")
    monkeypatch.setattr(api.api, "endpoint", endpoint)
    yield server
    server.shutdown()
    server.server_close()


def download(revision: str | None = None) -> Path:
    from dualparal.model.hub import download_snapshot

    return download_snapshot(REPO, revision)


def test_only_what_is_needed_and_only_once(hub: Hub, tiny_sharded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dualparal.model.layout import Checkpoint

    folder = download(COMMIT)
    Checkpoint(folder).validate()
    assert folder.name == COMMIT
    got = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    left_out = {"README.md", "examples/a.mp4", "transformer/pickled.bin", "vae/extra.pth"}
    assert not got & left_out and len(got) > 20
    assert sorted(set(hub.fetched())) == sorted(hub.fetched()), "a file was fetched twice"
    assert not set(hub.fetched()) & left_out
    assert all((folder / name).read_bytes() == hub.files[name] for name in got)
    before = len(hub.fetched())
    assert download(COMMIT) == folder
    assert len(hub.fetched()) == before
    assert "%|" not in capfd.readouterr().err, "no progress bar where nobody watches"


def test_resumed_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = max(hub.files, key=lambda name: len(hub.files[name]))
    hub.cut_off = name
    # What has arrived is written chunk by chunk; the files here are smaller than one.
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "DOWNLOAD_CHUNK_SIZE", 1024)
    try:
        folder = download(COMMIT)  # huggingface_hub may go on by itself
    except CheckpointError as error:
        assert "run again to go on" in str(error)
        folder = download(COMMIT)
    assert (folder / name).read_bytes() == hub.files[name]
    ranges = [ranged for method, path, ranged in hub.asked if path.endswith(name) and method == "GET"]
    assert len(ranges) == 2 and ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").partition("-")[0]) > len(hub.files[name]) // 2 - 2048


def test_whole_and_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(COMMIT)
    hub.shutdown()
    hub.server_close()
    assert download(COMMIT) == folder


@pytest.mark.parametrize(
    ("status", "says"), [(401, "asks for consent: accept its terms"), (404, "there is no model"), (500, "someone/Tiny-Wan ")]
)
def test_refusals_of_the_hub(hub: Hub, status: int, says: str) -> None:
    hub.status = status
    with pytest.raises(CheckpointError, match=says) as error:
        download()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_the_token_is_sent_and_never_told(
    hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_NeverTellThisToAnybody"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.status = status
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError) as error:
        download()
    assert f"Bearer {token}" in hub.logins, "a gated model could not be had"
    told = capfd.readouterr()
    assert token not in str(error.value) + caplog.text + told.out + told.err


def test_no_such_revision(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="has no revision gone; correct the preset's revision"):
        download("gone")


def test_pins_can_be_checked(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`presets --check` asks for every pin and downloads nothing."""
    from dualparal.cli import main
    from dualparal.model.hub import check_revision

    assert check_revision(REPO, COMMIT) == f"{REPO}: commit {COMMIT}, {len(hub.files)} files"
    assert "pins no commit" in check_revision(REPO, None)
    assert not hub.fetched()
    assert main(["presets", "--check"]) == 1, "Wan's own models are not on this hub"
    assert capsys.readouterr().err.count("there is no model Wan-AI/") == 3
    del hub.files["vae/config.json"]
    with pytest.raises(CheckpointError, match=r"has no vae/config\.json"):
        check_revision(REPO, COMMIT)


def test_nothing_here_and_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match="not whole on this host and the hub cannot be reached"):
        download(COMMIT)
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not whole on this host"):
        download()


def test_neither_folder_nor_hub_id() -> None:
    from dualparal.model.hub import download_snapshot

    with pytest.raises(PresetError, match="neither a folder nor a hub id"):
        download_snapshot("--bad..id/x")


def test_a_lora_of_the_hub(hub: Hub) -> None:
    from dualparal.model.lora_source import find_loras

    hub.files["one.safetensors"] = (
        lambda header: len(header).to_bytes(8, "little") + header
    )(b'{"transformer.blocks.0.attn1.to_q.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')  # fmt: skip
    (found,) = find_loras([f"{REPO}/one.safetensors:0.5"], 1)
    assert found.label == f"{REPO}/one.safetensors:0.5" and Path(found.file).is_file()
    with pytest.raises(CheckpointError, match="LoRA files"):
        find_loras([REPO], 1)


def test_the_environment_is_left_alone() -> None:
    import os

    sources: list[Any] = [Path("dualparal/model/hub.py").read_text(), Path("dualparal/model/source.py").read_text()]
    assert not any("environ" in source for source in sources)
    assert os.environ.get("HF_HUB_OFFLINE") == "1"  # as conftest set it
