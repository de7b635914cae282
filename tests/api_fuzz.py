"""Requests that nobody should send, sent to a page of an engine with fake workers, and what must hold whatever they are.

`calls()` draws them (hypothesis); `Fuzzer.send` sends a handful at once through Gradio's own routes and raises AssertionError
when an answer shows the inside of the server, when something refused leaves a job behind, or when the server is no longer well.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gradio.utils import get_upload_folder
from hypothesis import strategies as st

from dualparal.planning.calibration import cache_folder
from dualparal.ui.api import Calls
from dualparal.ui.studio import Studio
from tests.page_server import DEADLINE_S, Server

ROOT = Path(__file__).resolve().parents[1]
ROUTES = "gradio_api"
NEVER_SHOWN = re.compile(r'Traceback \(most|File "/|site-packages|, line \d+, in |<locals>| object at 0x')
MAX_REFUSAL = 70_000  # characters; one that repeats a long input is long
LARGE_BYTES = 1_000_000
SESSION = "@session"  # becomes one of its own when sent: two listeners to one would take each other's answers away
RAW = "@raw:"  # a text that stands for itself in the JSON, without quotation marks
JOB_TAKERS = ("submit", "generate")


@dataclass(frozen=True)
class Wire:
    """One HTTP request. `endpoint` is the one it is meant for ("" for none)."""

    path: str
    body: bytes | None = None  # None: GET
    endpoint: str = ""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def __repr__(self) -> str:
        shown = self.body if self.body is None or len(self.body) < 400 else self.body[:400] + b"..."
        return f"{'GET' if self.body is None else 'POST'} {self.path[:200]} {shown!r}"


# What is drawn

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.just({}), st.just([]),
    st.sampled_from([
        0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.0, 1e-320, "", " ", "0", "1", "NaN", "null", "true", "1e999", "0x10", "١٢",
        f"{RAW}1e999", f"{RAW}-1e999", f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}{'9' * 5000}", f"{RAW}{'[' * 200}{']' * 200}",
        f'{RAW}"\\ud800"', f'{RAW}"\\u0000"', "x" * 4001, "x" * 200_000, "\x00\x01\x1b[2J\x7f", "\u202e\u2066", "a\nb\r\nc",
        "<script>alert(1)</script>", "'; DROP TABLE jobs; --", "{{7*7}}", "${7*7}", "%s%n%x", "../../etc/passwd", "/etc/passwd",
        "..\\..\\boot.ini", "file:///etc/passwd", "http://127.0.0.1:1/", "C:\\", "pocket", "paper", "preview", "cached",
        [1], [[]], [None] * 500, {"a": 1}, {"__proto__": {}}, {"__type__": "update", "value": 1},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"url": "http://127.0.0.1:1/x", "path": "x"},
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], {"name": "/etc/passwd", "is_file": True},
    ]),
    st.recursive(st.none() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x), max_leaves=8),
)  # fmt: skip
BAD_IDS = st.one_of(
    st.text(max_size=40), st.text("0123456789abcdef-", max_size=40), ODD,
    st.sampled_from(["../../../etc/passwd", "..", ".", "/", "-" * 36, "0" * 37, "abcdef\n", "ABCDEF", "abcde/", "abcdef/..",
                     "abcdef\x00", "%2e%2e%2f", "‐" * 8, "０１２３４５"]),
)  # fmt: skip
GOOD = {
    "prompt": st.sampled_from(["a kite", "two boats\nat sea"]), "seconds": st.sampled_from([1, 2.5]), "seed": st.just(7),
    "num_inference_steps": st.sampled_from([3, 12]), "num_per_block": st.sampled_from([2, 4]), "num_cat": st.just(2),
    "height": st.just(32), "width": st.just(32), "guidance_scale": st.sampled_from([1.0, 3]), "schedule": st.just("paper"),
}  # fmt: skip
NAMES = [
    "submit", "submit", "generate", "status", "cancel", "result", "presets", "predict", "", "load", "../config",
    "%2e%2e/config", "status/", "a" * 3000, "\u202e", "lambda", "0", "-1",
]  # fmt: skip
PATHS = [
    "file=/etc/passwd", "file=../../../../etc/passwd", "file=%2fetc%2fpasswd", "file=http://127.0.0.1:1/", "file/etc/passwd",
    "file=//etc/passwd", "file=/proc/self/environ", "file=/proc/self/cmdline", "file=\x00".replace("\x00", "%00"), "file=",
    "proxy=http://127.0.0.1:1/", "call/submit/none", "call/v2/status/none", "call/x/../../config", "queue/data",
    "queue/data?session_hash=none", "queue/status", "stream/a/b/c/playlist.m3u8", "stream/../../x/playlist-file", "info?all=x",
    "openapi.json", "component_server", "upload_progress?upload_id=x", "token", "runs", "monitoring/x",
    "custom_component/../../x/y", "deep_link?session_hash=../../x", "heartbeat", "vibe-code/", "process_recording",
]  # fmt: skip

POSTED = ["queue/join", "cancel", "reset", "component_server", "upload", "process_recording", "stream/x", "stream/x/close"]
KINDS = ["application/json"] * 5 + ["text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "a/b; \xfc", ""]
BODIES = [
    b"", b"[" * 100_000, b'{"data":' * 5000, b'{"data": [], "data": 1}', b"\xef\xbb\xbf{}", b"null", b"data=1&data=2",
    b'{"data": ["' + b"x" * 2_000_000 + b'"]}',
]  # fmt: skip


class Drawn:
    """Strategies that need to know the server: its parameters, its function numbers, jobs of somebody else."""

    def __init__(self, parameters: dict[str, list[str]], numbers: dict[str, int], foreign: Sequence[str]) -> None:
        self.parameters, self.numbers, self.foreign = parameters, numbers, list(foreign)

    def batches(self, most: int) -> st.SearchStrategy[list[Wire]]:
        """Up to `most` requests to be sent at the same time."""
        one = st.one_of(self.named(), self.named(), self.named(), self.mangled(), self.elsewhere())
        return st.lists(one, min_size=most, max_size=most)

    def named(self) -> st.SearchStrategy[Wire]:
        """A call of one of the six endpoints by one of Gradio's three ways, with values of any kind."""

        @st.composite
        def build(draw: Any) -> Wire:
            endpoint = draw(st.sampled_from(["submit", *self.parameters]))
            values = draw(_values(self, endpoint))
            way = draw(st.sampled_from(["call", "call", "v2", "join"]))
            if way == "v2":
                return Wire(f"{ROUTES}/call/v2/{endpoint}", encoded(values), endpoint)
            data = [values.get(name) for name in self.parameters[endpoint]]
            data += draw(st.sampled_from([[], [], [], [None], ["more"] * 40]))
            data = data[: draw(st.sampled_from([len(data)] * 5 + [0, 1]))]
            if way == "call":
                return Wire(f"{ROUTES}/call/{endpoint}", encoded({"data": data}), endpoint)
            body = {"data": data, "fn_index": self.numbers[endpoint], "session_hash": SESSION}
            return Wire(f"{ROUTES}/queue/join", encoded(body), endpoint)

        return build()

    def mangled(self) -> st.SearchStrategy[Wire]:
        """Something that is not the JSON the server expects, posted where JSON is expected."""

        @st.composite
        def build(draw: Any) -> Wire:
            whole = encoded({"data": ["a kite"], "session_hash": SESSION, "fn_index": draw(ODD)})
            cut = draw(st.integers(0, len(whole)))
            pieces = st.sampled_from([whole[:cut], whole[:cut] + b"\xff" + whole[cut:], whole])
            odd = st.one_of(ODD.map(encoded), ODD.map(lambda x: encoded({"data": x})))
            body = draw(st.one_of(st.binary(max_size=200), pieces, odd, st.sampled_from(BODIES)))
            name, kind = draw(st.sampled_from(NAMES)), draw(st.sampled_from(KINDS))
            path = draw(st.sampled_from([*POSTED, f"call/{name}", f"call/v2/{name}", f"run/{name}", f"api/{name}"]))
            return Wire(f"{ROUTES}/{path}", body, headers={"Content-Type": kind})

        return build()

    def elsewhere(self) -> st.SearchStrategy[Wire]:
        """A path that leads nowhere or must not lead anywhere."""
        odd = st.text(max_size=30).map(lambda text: f"{ROUTES}/file={text}")
        return st.one_of(st.sampled_from(PATHS).map(lambda path: f"{ROUTES}/{path}"), odd).map(Wire)


@st.composite
def _values(draw: Any, own: Drawn, endpoint: str) -> dict[str, Any]:
    """Arguments of an endpoint: some good, some odd, some missing, some that do not exist."""
    values: dict[str, Any] = {}
    for name in own.parameters[endpoint]:
        if name == "job_id":
            values[name] = draw(BAD_IDS | st.sampled_from(own.foreign))
        elif name == "prompt" or (name in GOOD and draw(st.integers(0, 3)) == 0):
            values[name] = draw(GOOD[name])
    for name in draw(st.lists(st.sampled_from(own.parameters[endpoint] or ["x"]), max_size=3)):
        if name != "job_id":
            values[name] = draw(ODD)
    if draw(st.integers(0, 5)) == 0:
        values[draw(st.sampled_from(["extra", "__class__", "http", "self", "request", "job_id", "prompt\x00"]))] = draw(ODD)
    if values and draw(st.integers(0, 7)) == 0:
        del values[draw(st.sampled_from(sorted(values)))]
    return values


def encoded(value: Any) -> bytes:
    """`value` as JSON as a hostile client would write it: NaN, texts marked `RAW` as they are."""
    text = json.dumps(value)
    return re.sub(rf'"{RAW}((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text).encode("utf-8", "replace")


# Sending and judging


class Fuzzer:
    """Sends batches of requests to `server` and checks what must hold. `counts` tells what came back."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.engine = server.engine
        self.never_told = [str(path) for path in (self.engine.outputs, cache_folder(), ROOT, get_upload_folder())]
        self.counts: Counter[str] = Counter()
        self._sessions = itertools.count()
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            base_url=server.url, timeout=DEADLINE_S, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._faults = Faults()
        logging.getLogger("dualparal").addHandler(self._faults)
        config = httpx.get(f"{server.url}config", timeout=DEADLINE_S).json()
        endpoints = Calls(Studio(self.engine)).endpoints()
        parameters = {name: _names(function) for name, function in endpoints.items()}
        numbers = {d["api_name"]: d["id"] for d in config["dependencies"] if d["api_name"] in endpoints}
        begun = server.client.predict(prompt="somebody else's", owner="a secret", seconds=1, api_name="/submit")
        server.wait(begun["job_id"], lambda status: status["state"] == "finished", owner="a secret")
        self.foreign = begun["job_id"]
        self.drawn = Drawn(parameters, numbers, [self.foreign])

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()
        logging.getLogger("dualparal").removeHandler(self._faults)

    def send(self, batch: Sequence[Wire]) -> None:
        """Send `batch` at once, then look at the answers and at what is left."""
        before = self._folders()
        reported = self._runner.run(self._all(batch))
        accepted = {job_id for answer in reported for job_id in answer}
        new = self._folders() - before
        assert new == accepted, f"folders of jobs nobody was told of: {new - accepted}; told and not there: {accepted - new}"
        for job in self.engine.jobs():
            assert job.id in accepted, f"job {job.id} is in the queue though it was refused"
            job.cancel()
        deadline_s = time.monotonic() + DEADLINE_S
        while self.engine.jobs():
            assert time.monotonic() < deadline_s, "stopped jobs do not leave the queue"
            time.sleep(0.005)
        assert not self._faults.found, self._faults.found
        alive = httpx.get(f"{self.server.url}healthz", timeout=DEADLINE_S)
        assert alive.json() == {"status": "alive"}

    def _folders(self) -> set[str]:
        return {path.name for path in self.engine.outputs.iterdir()}

    async def _all(self, batch: Sequence[Wire]) -> list[set[str]]:
        return list(await asyncio.gather(*(self._in_time(wire) for wire in batch)))

    async def _in_time(self, wire: Wire) -> set[str]:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._one(wire)
        except TimeoutError:
            raise AssertionError(f"{wire!r} was not answered within {DEADLINE_S} s") from None

    async def _one(self, wire: Wire) -> set[str]:
        """Send one request and follow its event to the end; the ids of the jobs it was told of."""
        self.counts["requests"] += 1
        try:
            headers = {name: value.encode("latin-1") for name, value in wire.headers.items()}
            session = f"session{next(self._sessions)}"
            body = None if wire.body is None else wire.body.replace(SESSION.encode(), session.encode())
            if body is None:
                answer = await self._http.get(wire.path)
            else:
                answer = await self._http.post(wire.path, content=body, headers=headers)
        except httpx.InvalidURL:
            self.counts["not a URL"] += 1
            return set()
        except httpx.TransportError:  # a server may refuse a large body without reading it to its end
            assert wire.body is not None and len(wire.body) > LARGE_BYTES, f"{wire!r} was not answered"
            self.counts["cut off"] += 1
            return set()
        self.counts[f"{answer.status_code}"] += 1
        self._judge(wire, answer.status_code, answer.text, is_refusal=answer.status_code >= 400)
        event_id = _field(answer, "event_id")
        if event_id is None:
            return set()
        is_joined = wire.path.endswith("queue/join")
        path = f"{ROUTES}/queue/data?session_hash={session}" if is_joined else f"{ROUTES}/call/x/{event_id}"
        return await self._follow(wire, path)

    async def _follow(self, wire: Wire, path: str) -> set[str]:
        """Read an event's answers until its end; a job that was taken is stopped at once."""
        found: set[str] = set()
        is_refusal = False
        async with self._http.stream("GET", path) as stream:
            async for line in stream.aiter_lines():
                is_refusal = line.startswith("event: error") or '"success":false' in line or (is_refusal and line != "")
                self._judge(wire, stream.status_code, line, is_refusal=is_refusal or stream.status_code >= 400)
                for job_id in re.findall(r'"job_id": ?"([0-9a-f-]+)"', line) if wire.endpoint in JOB_TAKERS else ():
                    found.add(job_id)
                    if (job := self.engine.job(job_id)) is not None:
                        job.cancel()
                if line.startswith("event: "):
                    self.counts[line] += 1
                if "process_completed" in line:
                    break
                if line.startswith("data: ") and wire.endpoint in ("status", "cancel", "result"):
                    assert self.foreign not in line or "there is no job" in line, f"{wire!r} was told of a foreign job: {line}"
        return found

    def _judge(self, wire: Wire, status: int, text: str, *, is_refusal: bool) -> None:
        assert status < 500 or status == 503, f"{wire!r} was answered with {status} {text[:500]!r}"
        assert not NEVER_SHOWN.search(text), f"{wire!r} was answered with {text[:2000]!r}"
        if is_refusal:
            self.counts["refusals"] += 1
            reported = [path for path in self.never_told if path in text and path.encode() not in (wire.body or b"")]
            assert not reported, f"{wire!r} was told of {reported}: {text[:2000]!r}"
        if status >= 400:
            assert len(text) < MAX_REFUSAL, f"{wire!r} was refused with {len(text)} characters"


class Faults(logging.Handler):
    """Exceptions that our own code did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}" if record.exc_info else record.getMessage())


def _names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "http"]


def _field(answer: httpx.Response, name: str) -> str | None:
    try:
        found = answer.json()
    except ValueError:
        return None
    return found.get(name) if isinstance(found, dict) else None
