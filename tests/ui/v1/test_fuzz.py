"""Requests below /v1 that nobody should send, a handful at once: no answer shows the inside of the server, each refusal is in
OpenAI's form, and nothing is left over, whatever was asked.

600 requests, always the same ones. `DUALPARAL_FUZZ=5000` sends so many, drawn anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio.utils import get_upload_folder

from dualparal.planning.calibration import cache_folder
from dualparal.request import GenerationRequest
from dualparal.ui.v1 import asked, events
from tests.api_fuzz import LARGE_BYTES, MAX_REFUSAL, NEVER_SHOWN, RAW, ROOT, Faults, encoded
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server

NUM_REQUESTS = int(os.environ.get("DUALPARAL_FUZZ", "600"))
IS_DRAWN_ANEW = "DUALPARAL_FUZZ" in os.environ
AT_ONCE = 20
ANN, BOB = "ann-has-this-key-0001", "bob-has-this-key-0002"
CODES = {200, 202, 204, 206, 400, 401, 403, 404, 405, 408, 413, 416, 429, 503}
PNG = bytes.fromhex(  # 1 x 1
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cf500f0003030101e1"
    "c0b5cb0000000049454e44ae426082"
)

pytestmark = [*GRADIO_WARNINGS, pytest.mark.timeout(600 + NUM_REQUESTS)]


@dataclass(frozen=True)
class Wire:
    """One request."""

    method: str
    path: str
    body: bytes = field(default=b"", repr=False)
    headers: dict[str, str] = field(default_factory=dict)


# What is drawn

NAMES = [
    "size", "model", "preset", "input_reference", "start_image", "n", "__class__", "prompt\x00", "owner", "user",
    *GenerationRequest.model_fields,
]  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.0, 1e-320, "", " ", "0", "1", "NaN", "null", "1e999", "0x10",
    f"{RAW}1e999", f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}{'9' * 5000}", f"{RAW}{'[' * 200}{']' * 200}", f'{RAW}"\\ud800"',
    f'{RAW}"\\u0000"', "x" * 4001, "\x00\x01\x1b[2J\x7f", "\u202e\u2066", "a\nb\r\nc", "<script>alert(1)</script>", "%s%n%x",
    "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/", "pocket", "paper", "cached", "96x96", "0x0",
    [1], [[]], [None] * 500, {}, {"a": 1}, {"__proto__": {}}, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    [{"prompt": "x", "seconds": 1}], [{"prompt": "x"}], "data:image/png;base64,eA==", "data:image/png;base64,?",
    {"image_url": "file:///etc/passwd"}, {"image_url": "data:text/html;base64,eA=="}, {"file_id": "x"}, {"image_url": {"u": 1}},
]  # fmt: skip
TEXTS = ["", "x", "-1", "0", "1", "20", "101", "asc", "desc", "ts", "mp4", "video", "thumbnail", "look", "end", "1.2.3", "\r\n",
         "\x7f", "9" * 30, "x" * 9000, "\u00e9" * 40, "../x", "%00", "\u202e", "{}", "*"]  # fmt: skip
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b"[" * 60_000,
    b'{"prompt": "x", "prompt": 1}',
    b"x" * 70_000,
    b"prompt=x",
    b'"x"',
]
PARTS = [
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na kite\r\n', b"--x\r\n\r\n", b"--x--\r\n", b"--x", b"\r\n",
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na kite\r\n', b"--x--\r\n", b"--x--\r\n",
    b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="../../x.png"\r\n\r\n' + PNG + b"\r\n",
    b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\nContent-Type: \xff\r\n\r\nx\r\n',
    b'--x\r\nContent-Disposition: form-data; name="shots"\r\n\r\n' + b"[" * 5000 + b"\r\n",
    b'--x\r\nContent-Disposition: form-data; name="seconds"\r\n\r\nNaN\r\n',
    b'--x\r\nContent-Disposition: form-data; name="seconds"\r\n\r\n1\r\n',
    b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n",
    b'--x\r\nContent-Disposition: form-data; name="' + b"y" * 5000 + b'"\r\n\r\nx\r\n',
    b"--x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
]  # fmt: skip
FORM = "multipart/form-data; boundary=x"
KINDS = ["application/json"] * 4 + [FORM, FORM, "multipart/form-data", "multipart/x; boundary=", "text/plain", ""]
RANGES = [
    "bytes=0-",
    "bytes=5-2",
    "bytes=-0",
    "bytes=-1",
    "bytes=0-0,2-3",
    "bytes=x",
    "lines=1-2",
    f"bytes={'9' * 17}-",
    "bytes=-",
]
BEHIND = [
    "", "", "/content", "/content", "/content", "/events", "/live.m3u8", "/cancel", "/segments/0.ts", "/segments/-1.ts",
    "/segments/9999999999999.ts", "/looks/0.jpg", "/looks/..%2f0.jpg", "/content/", "/steer", "/finish", "/takes", "/%2e%2e",
]  # fmt: skip
IDS = [
    "ID",
    "..",
    ".",
    "-" * 36,
    "0" * 37,
    "ABCDEF",
    "abcdef%00",
    "abcdef%0a",
    "%2e%2e%2f",
    "0123456789abcdef",
    "x" * 3000,
    "%ff",
    " ",
]


class Drawn:
    """Draws requests; `ids` are videos that are there, the first one the caller's."""

    def __init__(self, seed: int, ids: Sequence[str]) -> None:
        self._random, self._ids = random.Random(seed), ids

    def batch(self) -> list[tuple[Wire, str | None]]:
        """Requests to be sent at the same time, each with a key or none."""
        keys = [ANN] * 12 + [BOB, None, "nobody", "\x00", ANN + " "]
        kinds = [self.creation, self.reading, self.reading, self.elsewhere]
        return [(self._random.choice(kinds)(), self._random.choice(keys)) for _ in range(AT_ONCE)]

    def creation(self) -> Wire:
        """A request for a video, good or odd."""
        pick, kind = self._random.choice, self._random.choice(KINDS)
        if kind == FORM and self._random.random() < 0.8:
            body = b"".join(pick(PARTS) for _ in range(self._random.randrange(6)))
        else:
            body = pick(BODIES) if self._random.random() < 0.2 else encoded(self._values())
        return Wire("POST", "/videos", body, {"Content-Type": kind})

    def _values(self) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt": "a kite", "seconds": 1, "num_inference_steps": 3}
        for _ in range(self._random.choice([0, 1, 1, 3])):
            found[self._random.choice(NAMES)] = self._odd()
        if self._random.random() < 0.1:
            del found[self._random.choice(sorted(found))]
        return found

    def _odd(self) -> Any:
        return self._random.choice([*ODD, self._random.uniform(-10, 1e5), self._random.randrange(-9, 1 << 40), self._text()])

    def _text(self) -> str:
        return "".join(
            chr(self._random.choice([self._random.randrange(1, 127), self._random.randrange(160, 0xD7FF)])) for _ in range(9)
        )

    def reading(self) -> Wire:
        """Something of a video that is there, is somebody else's or is none."""
        pick = self._random.choice
        video_id = pick([*self._ids, self._ids[0], self._ids[0], pick(IDS)])
        method = pick(["GET"] * 8 + ["HEAD", "POST", "DELETE", "PUT", "OPTIONS"])
        if method == "DELETE" and video_id in self._ids:
            method = "GET"
        headers = {"Range": pick(RANGES)} if self._random.random() < 0.5 else {}
        body = b""
        if method == "POST":
            body = pick(BODIES) if self._random.random() < 0.3 else encoded({pick(NAMES): self._odd(), "prompt": self._odd()})
        if self._random.random() < 0.25:
            headers |= {"Last-Event-ID": pick(["end", "1.2.3", "9" * 100, "x", "-1.0.0"]), "If-Range": pick(['"x"', "x"])}
        return Wire(
            method,
            self._asking(f"/videos/{video_id}{pick(BEHIND)}", ["variant", "format", "link", "last_event_id"]),
            body,
            headers,
        )

    def elsewhere(self) -> Wire:
        """Lists, models, and addresses that are none."""
        pick = self._random.choice
        path = pick(
            ["/videos", "/videos", "/models", "/openapi.json", "", "/", "//", "/../config", "/videos/", f"/{self._text()}"]
        )
        method = pick(["GET", "GET", "GET", "POST", "PATCH"])
        body = self._random.randbytes(20) if method != "GET" else b""
        return Wire(method, self._asking(path, ["after", "limit", "order"]), body)

    def _asking(self, path: str, names: Sequence[str]) -> str:
        given = {name: self._random.choice(TEXTS) for name in names if self._random.random() < 0.12}
        return f"{path}?{httpx.QueryParams(given)}" if given else path


# Sending and judging


class Fuzzer:
    """Sends batches to a server and checks what must hold. `counts` tells what came back."""

    def __init__(self, server: Server) -> None:
        self.server, self.engine = server, server.engine
        self.counts: Counter[str] = Counter()
        self._never_told = [str(path) for path in (self.engine.outputs, cache_folder(), ROOT, get_upload_folder())]
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            base_url=f"{server.url}v1", timeout=DEADLINE_S, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._faults = Faults()
        logging.getLogger().addHandler(self._faults)
        self.ids = [self._made(ANN), self._made(BOB)]
        self._before = self._folders()

    def _made(self, key: str) -> str:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": "a kite", "seconds": 1, "num_inference_steps": 3}
        with httpx.Client(base_url=f"{self.server.url}v1", headers=headers, timeout=DEADLINE_S) as client:
            video_id = str(client.post("/videos", json=body).json()["id"])
            deadline_s = time.monotonic() + DEADLINE_S
            while client.get(f"/videos/{video_id}").json()["status"] != "completed":
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        return video_id

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()
        logging.getLogger().removeHandler(self._faults)

    def send(self, batch: Sequence[tuple[Wire, str | None]]) -> None:
        """Send `batch` at once, then look at what is left."""
        told = self._runner.run(self._all(batch))
        made = {video_id for video_id in told if video_id}
        assert self._folders() - self._before == made, "folders of jobs that nobody was told of, or the other way round"
        for job in self.engine.jobs():
            assert job.id in made, f"job {job.id} is in the queue though it was refused"
            job.cancel()
        deadline_s = time.monotonic() + DEADLINE_S
        while self.engine.jobs() or asked._num_forms or events._num_followers:
            assert time.monotonic() < deadline_s, (self.engine.jobs(), asked._num_forms, events._num_followers)
            time.sleep(0.005)
        self._before |= made
        assert not list(Path(get_upload_folder()).glob("v1-*")), "pictures were left behind"
        assert not self._faults.found, self._faults.found
        assert httpx.get(f"{self.server.url}healthz", timeout=DEADLINE_S).json() == {"status": "alive"}

    def _folders(self) -> set[str]:
        return {path.name for path in self.engine.outputs.iterdir()}

    async def _all(self, batch: Sequence[tuple[Wire, str | None]]) -> list[str | None]:
        async with asyncio.timeout(DEADLINE_S):
            return list(await asyncio.gather(*(self._one(wire, key) for wire, key in batch)))

    async def _one(self, wire: Wire, key: str | None) -> str | None:
        """The id of the video that was made, if one was."""
        self.counts["requests"] += 1
        headers = {**wire.headers, **({"Authorization": f"Bearer {key}"} if key else {})}
        raw = [
            (name.encode(), value.encode("utf-8", "replace").replace(b"\r", b"").replace(b"\n", b""))
            for name, value in headers.items()
        ]
        try:
            request = self._http.build_request(wire.method, wire.path, content=wire.body or None, headers=raw)
            answer = await self._http.send(request)
        except (httpx.InvalidURL, httpx.LocalProtocolError):
            self.counts["not sent"] += 1
            return None
        except httpx.TransportError:  # a header that is none, or a body that is refused before its end
            assert key == "\x00" or len(wire.body) > 64_000 or len(wire.body) > LARGE_BYTES, f"{wire!r} was not answered"
            self.counts["cut off"] += 1
            return None
        self.counts[str(answer.status_code)] += 1
        self._judge(wire, key, answer)
        is_made = wire.method == "POST" and answer.status_code == 200 and wire.path.split("?")[0] == "/videos"
        return str(answer.json()["id"]) if is_made else None

    def _judge(self, wire: Wire, key: str | None, answer: httpx.Response) -> None:
        text = answer.text if len(answer.content) < LARGE_BYTES else ""
        if not answer.request.url.path.startswith("/v1/"):  # it has led out of /v1
            assert answer.status_code < 500
            return
        if key == "\x00" and answer.status_code == 400 and not text.startswith("{"):  # no HTTP: not our answer
            return
        assert answer.status_code in CODES, f"{wire!r} was answered with {answer.status_code} {text[:500]!r}"
        assert not NEVER_SHOWN.search(text), f"{wire!r} was answered with {text[:2000]!r}"
        if self.ids[1] in wire.path and key != BOB and "link=" not in wire.path:
            assert answer.status_code >= 400 or wire.method == "OPTIONS", f"{wire!r} reads somebody else's video"
        if answer.status_code >= 400:
            self.counts["refusals"] += 1
            assert len(text) < MAX_REFUSAL
            if wire.method != "HEAD":
                error = json.loads(text)["error"]
                assert set(error) == {"message", "type", "code", "param"} and error["message"], text
            reported = [path for path in self._never_told if path in text and path.encode() not in wire.body]
            assert not reported, f"{wire!r} was told of {reported}: {text[:2000]!r}"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    server = Server(tmp_path_factory.mktemp("fuzz"), item_s=0.02, max_queue=10 * AT_ONCE, keys=(ANN, BOB))
    made = Fuzzer(server)
    yield made
    print(dict(made.counts.most_common()))
    made.close()
    server.close()


@pytest.mark.parametrize("number", range(max(1, NUM_REQUESTS // AT_ONCE)))
def test_bad_requests(fuzzer: Fuzzer, number: int) -> None:
    seed = secrets.randbits(32) if IS_DRAWN_ANEW else number
    try:
        fuzzer.send(Drawn(seed, fuzzer.ids).batch())
    except AssertionError:
        print(f"seed {seed}")
        raise


def test_the_server_is_well_afterwards(fuzzer: Fuzzer) -> None:
    assert fuzzer._made(ANN)
    expected = {"200", "400", "401", "404", "405", "413"} | ({"204", "206", "416"} if NUM_REQUESTS >= 5000 else set())
    assert expected <= set(fuzzer.counts), "what was sent is not odd enough"
    assert fuzzer.counts["refusals"] > NUM_REQUESTS // 10
