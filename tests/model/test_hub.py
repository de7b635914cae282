"""Downloads, from a small server on this host that speaks the hub's API: only what is needed, resumed, explained."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.errors import CheckpointError, PresetError
from dualparal.presets import load_presets

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
        self.instead: tuple[int, bytes, dict[str, str]] | None = None  # what answers every request in the hub's place

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
        if hub.instead is not None:
            self._send(*hub.instead, has_body)
        elif hub.status != 200:
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
    http = importlib.import_module("huggingface_hub.utils._http")
    monkeypatch.setattr(http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))  # before it tries again
    importlib.import_module("huggingface_hub").close_session()  # a client keeps the proxies of its making
    yield server
    server.shutdown()
    server.server_close()


def download(revision: str | None = None) -> Path:
    from dualparal.model.hub import download_snapshot

    return download_snapshot(REPO, revision)


def test_only_what_is_needed_and_only_once(hub: Hub, tiny_sharded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dualparal.model.layout import Checkpoint
    from dualparal.model.validation import validate

    folder = download(COMMIT)
    validate(Checkpoint(folder))
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
    printed = capfd.readouterr()
    assert token not in str(error.value) + caplog.text + printed.out + printed.err


def test_no_such_revision(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="has no revision gone; correct the preset's revision"):
        download("gone")


def test_pins_can_be_checked(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`presets --check` asks for every pin and downloads nothing."""
    from dualparal.cli.main import main
    from dualparal.model.hub import check_revision

    assert check_revision(REPO, COMMIT) == f"{REPO}: commit {COMMIT}, {len(hub.files)} files"
    assert "pins no commit" in check_revision(REPO, None)
    assert not hub.fetched()
    assert main(["presets", "--check"]) == 1, "Wan's own models are not on this hub"
    models = {preset.model for preset in load_presets().values() if "/" in preset.model}
    assert capsys.readouterr().err.count("there is no model Wan-AI/") == len(models) > 3
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


PAGE = b"<!DOCTYPE html><html><body>Welcome to the hotel. Please log in.</body></html>"
Fault = Callable[[Hub, pytest.MonkeyPatch], Any]


def cannot_be_reached(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()


def answers(status: int, body: bytes = b"{}", **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda hub, patch: setattr(hub, "instead", (status, body, named))


def at(endpoint: str) -> Fault:
    def change(hub: Hub, patch: pytest.MonkeyPatch) -> None:
        constants, template = importlib.import_module("huggingface_hub.constants"), "HUGGINGFACE_CO_URL_TEMPLATE"
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, template, endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(importlib.import_module("huggingface_hub.hf_api").api, "endpoint", endpoint)

    return change


def surroundings(**values: str) -> Fault:
    def change(hub: Hub, patch: pytest.MonkeyPatch) -> None:
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)

    return change


def raises(error: Exception) -> Fault:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return lambda hub, patch: [
        patch.setattr(importlib.import_module("huggingface_hub.hf_api").HfApi, name, fail)
        for name in ("repo_info", "list_repo_tree", "list_repo_files")
    ]


def both(*faults: Fault) -> Fault:
    return lambda hub, patch: [fault(hub, patch) for fault in faults]


FAULTS: dict[str, tuple[Fault, str]] = {
    "nobody there": (cannot_be_reached, "the hub cannot be reached at http://127"),
    "a mirror without a scheme": (at("hf-mirror.example"), "HF_ENDPOINT=hf-mirror.example is no address; write https://"),
    "a mirror that is a path": (at("/models"), "HF_ENDPOINT=/models is no address"),
    "a login page": (answers(200, PAGE, Content_Type="text/html"), "is not the hub, perhaps a network's login page"),
    "the way to a login page": (answers(302, b"", Location="/login"), "login page|cannot be reached|could not be"),
    "a word": (answers(200, b'"hello"', Content_Type="application/json"), "could not be downloaded"),
    "a token beyond ASCII": (surroundings(HF_TOKEN="hf_geheim\u00fc"), "HF_TOKEN holds characters that no token has"),
    "a bad token": (
        both(surroundings(HF_TOKEN="hf_geheim"), answers(401, X_Error_Message="Invalid credentials in Authorization header")),
        r"the hub refused the token \(401\); correct HF_TOKEN",
    ),
    "a bad token, unsaid": (both(surroundings(HF_TOKEN="hf_geheim"), answers(401)), r"the hub refused the token \(401\)"),
    "no right to read": (answers(403), r"forbids it \(403\); accept its terms"),
    "no consent": (answers(403, X_Error_Code="GatedRepo"), "asks for consent"),
    "too many asked": (answers(429, Retry_After="7"), r"busy or being mended \(429\); wait 7 s, then run again"),
    "being mended": (answers(503), r"busy or being mended \(503\); wait some minutes, then run again"),
    "broken": (answers(500), r"busy or being mended \(500\)"),
    "a strange refusal": (answers(418), "the hub answered 418"),
    "a proxy that is gone": (surroundings(HTTP_PROXY="http://127.0.0.1:9", ALL_PROXY=""), "cannot be reached|the proxy failed"),
    "a proxy of no kind": (surroundings(HTTP_PROXY="gopher://x:1"), "the proxy failed .*correct or unset HTTPS_PROXY"),
    "no memory for a name": (raises(RuntimeError("first line\nsecond")), "RuntimeError: first line; run again"),
    "a full disk": (raises(OSError(errno.ENOSPC, "No space left on device")), "no space left in .*free some"),
    "a folder of another user": (raises(PermissionError(errno.EACCES, "denied")), "cannot be written; make it writable"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_of_the_hub(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the way out, of one error of ours, for the model, for a file and for a list of files."""
    from dualparal.model.hub import check_revision, download_file, list_files

    fault, says = FAULTS[name]
    fault(hub, monkeypatch)
    importlib.import_module("huggingface_hub").close_session()
    asked: list[Callable[[], object]] = [download, lambda: list_files(REPO)]
    if "raise" not in fault.__qualname__:
        asked += [lambda: download(COMMIT), lambda: check_revision(REPO, None), lambda: download_file(REPO, "README.md")]
    for ask in asked:
        with pytest.raises(CheckpointError, match=says) as caught:
            ask()
        message = str(caught.value)
        assert "\n" not in message and REPO in message and "geheim" not in message
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", list(FAULTS))
def test_what_is_here_is_used_whenever_the_hub_cannot_be_asked(
    hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dualparal.model.hub import download_file, list_files

    folder, file = download("main"), download_file(REPO, "README.md")
    FAULTS[name][0](hub, monkeypatch)
    importlib.import_module("huggingface_hub").close_session()
    assert download("main") == folder == download(COMMIT)
    assert download_file(REPO, "README.md") == file
    assert {"README.md", "model_index.json"} <= set(list_files(REPO))
    assert not any("\n" in record.message or "geheim" in record.message for record in caplog.records)


def test_what_is_half_here_is_not_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = max(hub.files, key=lambda name: len(hub.files[name]))
    folder = download("main")
    (folder / name).unlink()
    hub.status = 503
    with pytest.raises(CheckpointError, match="503"):
        download("main")


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
