"""A file that is replaced again and again while it is asked for arrives whole each time, with its own length."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.page_server import GRADIO_WARNINGS, Server

pytestmark = GRADIO_WARNINGS
NUM_ASKED = 300


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def test_a_file_replaced_while_it_is_sent_arrives_whole(server: Server) -> None:
    path = Path(server.studio.outputs) / "look.jpg"
    versions = [bytes([65 + k]) * (1000 + 700 * k) for k in range(8)]
    path.write_bytes(versions[0])
    is_over = threading.Event()

    def replace() -> None:
        while not is_over.is_set():
            for version in versions:
                partial = path.with_suffix(".part")
                partial.write_bytes(version)
                os.replace(partial, path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(NUM_ASKED):
                answer = client.get(f"gradio_api/file={path}")
                assert answer.status_code == 200 and answer.content in versions
                assert int(answer.headers["content-length"]) == len(answer.content)
    finally:
        is_over.set()
        writer.join()


def test_files_keep_their_headers_ranges_and_absence(server: Server) -> None:
    folder = Path(server.studio.outputs)
    (folder / "small.mp4").write_bytes(b"x" * 1000)
    (folder / "long.mp4").write_bytes(b"y" * (3 << 20))
    with httpx.Client(base_url=server.url) as client:
        for name, size in (("small", 1000), ("long", 3 << 20)):
            answer = client.get(f"gradio_api/file={folder / name}.mp4")
            assert len(answer.content) == size and answer.headers["content-type"] == "video/mp4"
            assert {"etag", "last-modified", "accept-ranges", "content-disposition"} <= set(answer.headers)
            part = client.get(f"gradio_api/file={folder / name}.mp4", headers={"range": "bytes=10-19"})
            assert part.status_code == 206 and len(part.content) == 10
            assert client.head(f"gradio_api/file={folder / name}.mp4").headers["content-length"] == str(size)
        assert client.get(f"gradio_api/file={folder}/none.mp4").status_code in (403, 404)
