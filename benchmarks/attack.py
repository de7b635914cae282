"""What strangers can cost a server: `python -m benchmarks.attack` starts one on this machine, attacks it and says what it bore.

Everything stays on the loopback interface, is bounded in number and time, and ends by itself. Each row has a figure and what
it must stay within; exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common import hardware, table

DEADLINE_S = 120.0
MAX_LINE = 2**24  # bytes
LONG = {"prompt": "a red circle bouncing on a navy background", "seconds": 300, "num_inference_steps": 100}
SHORT = {"prompt": "a red circle bouncing on a navy background", "seconds": 1, "num_inference_steps": 2}
Row = tuple[str, str, str, bool]


class Target:
    """A server of our own in a process of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        held = socket.socket()
        held.bind(("127.0.0.1", 0))
        self.port = held.getsockname()[1]
        held.close()
        self.url, self.outputs = f"http://127.0.0.1:{self.port}", folder / "outputs"
        command = [sys.executable, "-m", "dualparal", "serve", "--model_id", "pocket", "--port", str(self.port), *flags]
        environment = {**os.environ, "DUALPARAL_OPERATOR_KEY": "operator", "OMP_WAIT_POLICY": "PASSIVE"}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([*command, "--outputs", str(self.outputs)], stderr=log, env=environment)
        until = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            assert time.monotonic() < until and self.process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None))

    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE_S)


async def call(target: Target, name: str, **values: Any) -> Any:
    """An API call's last answer, None when it was refused."""
    body = b"".join([line async for line in ask(target, f"/gradio_api/call/v2/{name}", values)])
    last = None
    async for line in ask(target, f"/gradio_api/call/{name}/{json.loads(body)['event_id']}"):
        if line.startswith(b"data: "):
            last = json.loads(line[6:])
    return last[-1] if isinstance(last, list) else None


async def ask(target: Target, path: str, values: Any = None) -> AsyncIterator[bytes]:
    """The lines of an answer, over a connection of its own: hundreds at once cost a pool of them more than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=MAX_LINE)
    try:
        body = b"" if values is None else json.dumps(values).encode()
        head = f"{'GET' if values is None else 'POST'} {path} HTTP/1.0\r\nHost: 127.0.0.1:{target.port}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while (await reader.readline()).strip():
            pass
        while line := await reader.readline():
            yield line
    finally:
        writer.close()


async def timed(work: Awaitable[Any]) -> float:
    started_s = time.monotonic()
    await work
    return time.monotonic() - started_s


class Bystander:
    """Somebody else meanwhile, in a process of their own: the attackers' is too busy to hold a watch."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    async def __aenter__(self) -> Bystander:
        await self._ask(_slowest_s, [])  # it is there
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.shutdown()

    async def slowest_s(self, path: str, times: int = 5) -> float:
        """The slowest of so many answers, one after another."""
        return await self._ask(_slowest_s, [f"{self._target.url}{path}"] * times)

    async def status_s(self, job_id: str, times: int = 5) -> float:
        return await self._ask(_slowest_status_s, self._target.url, job_id, times)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[list[float]]:
        """Meanwhile asks for /healthz, which the page's loop answers; the list holds the slowest answer afterwards."""
        found: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            end = Path(folder) / "end"
            watch = asyncio.create_task(self._ask(_slowest_until_s, f"{self._target.url}/healthz", end))
            yield found
            end.touch()
            found.append(await watch)

    async def _ask(self, work: Any, *values: Any) -> float:
        found: float = await asyncio.get_running_loop().run_in_executor(self._pool, work, *values)
        return found


def _slowest_s(urls: list[str]) -> float:
    slowest_s = 0.0
    for url in urls:
        started_s = time.monotonic()
        httpx.get(url, timeout=DEADLINE_S).raise_for_status()
        slowest_s = max(slowest_s, time.monotonic() - started_s)
    return slowest_s


def _slowest_until_s(url: str, end: Path) -> float:
    slowest_s = 0.0
    while not end.exists():
        slowest_s = max(slowest_s, _slowest_s([url]))
        time.sleep(0.05)
    return slowest_s


def _slowest_status_s(url: str, job_id: str, times: int) -> float:
    slowest_s = 0.0
    for _ in range(times):
        started_s = time.monotonic()
        asked = httpx.post(f"{url}/gradio_api/call/v2/status", json={"job_id": job_id}, timeout=DEADLINE_S).json()
        httpx.get(f"{url}/gradio_api/call/status/{asked['event_id']}", timeout=DEADLINE_S)
        slowest_s = max(slowest_s, time.monotonic() - started_s)
    return slowest_s


async def config_of(target: Target) -> Any:
    return json.loads(b"".join([line async for line in ask(target, "/config")]))


async def watchers(target: Target, num_tabs: int = 300, num_callers: int = 64) -> list[Row]:
    """Tabs that follow a long job and callers that wait for theirs, and somebody who opens the page."""
    follow = await _follower(target)
    made = await call(target, "submit", **LONG, owner="")
    async with Bystander(target) as bystander:
        tasks = [asyncio.create_task(_follow(target, follow, made["job_id"], f"tab{n}")) for n in range(num_tabs)]
        tasks += [asyncio.create_task(call(target, "generate", **LONG, owner=f"caller{n}")) for n in range(num_callers)]
        await asyncio.sleep(8.0)
        page_s = await bystander.slowest_s("/")
        status_s = await bystander.status_s(made["job_id"])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await _stop_all(target)
    crowd = f"{num_tabs} tabs that watch, {num_callers} calls that wait"
    return [
        (f"{crowd}: the page", f"{page_s:.2f} s", "2 s", page_s < 2),
        (f"{crowd}: /status", f"{status_s:.2f} s", "2 s", status_s < 2),
    ]


async def _follower(target: Target) -> int:
    """The page's function that follows a job."""
    found = [
        one["id"]
        for one in (await config_of(target))["dependencies"]
        if one["types"]["generator"] and one["api_visibility"] == "private"
    ]
    return int(found[0])


async def _follow(target: Target, fn: int, job_id: str, session: str) -> None:
    joining = {"data": ["", job_id], "fn_index": fn, "session_hash": session}
    async for _ in ask(target, "/gradio_api/queue/join", joining):
        pass
    async for line in ask(target, f"/gradio_api/queue/data?session_hash={session}"):
        if b"close_stream" in line:
            return


async def _stop_all(target: Target) -> None:
    for folder in sorted(target.outputs.iterdir(), reverse=True):
        await call(target, "cancel", job_id=folder.name, owner="operator")


async def bodies(target: Target) -> list[Row]:
    """Large bodies of JSON, and headers that never end."""
    rows = []
    async with target.client() as client, Bystander(target) as bystander:
        for size in (10**6, 5 * 10**7):
            codes = []
            async with bystander.watching() as slowest:
                body = b'{"data": ["' + b"x" * size + b'"]}'
                for _ in range(3):
                    with contextlib.suppress(httpx.HTTPError):  # it hangs up on what it does not read
                        codes.append((await client.post("/gradio_api/queue/join", content=body)).status_code)
                await asyncio.sleep(0.3)
            is_good = set(codes) <= {413} and slowest[0] < 1
            rows.append((f"bodies of {size // 10**6} MB: worst /healthz", f"{slowest[0]:.2f} s", "1 s", is_good))
        idle = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(300)]
        for one in idle:
            one.send(b"GET / HTTP/1.1\r\nHost: x\r\n")
        started_s = time.monotonic()
        health_s = await bystander.slowest_s("/healthz", 1)
        for one in idle:
            one.settimeout(DEADLINE_S)
            await asyncio.to_thread(one.recv, 100)
            one.close()
        rows.append(("300 connections without an end of headers: closed after", f"{time.monotonic() - started_s:.0f} s", "30 s",
                     health_s < 1 and time.monotonic() - started_s < 30))  # fmt: skip
    return rows


async def memory(target: Target, num_calls: int, num_tabs: int = 50) -> list[Row]:
    """Calls without a session name, and tabs that show a finished video block by block."""
    await call(target, "presets")
    before, times = target.megabytes(), []
    for _ in range(num_calls):
        times.append(await timed(call(target, "presets")))
    after, tenth = target.megabytes(), max(1, num_calls // 10)
    early, late = sum(times[:tenth]) / tenth, sum(times[-tenth:]) / tenth
    follow = await _follower(target)
    made = await call(target, "submit", **{**SHORT, "seconds": 60}, owner="")
    await asyncio.gather(*(_follow(target, follow, made["job_id"], f"show{n}") for n in range(num_tabs)))
    tabs = target.megabytes()
    return [
        (f"{num_calls:,} calls: memory", f"+{after - before:.0f} MB", "100 MB", after - before < 100),
        (f"{num_calls:,} calls: last tenth over first", f"{late / early:.2f}", "1.5", late / early < 1.5),
        (f"{num_tabs} tabs that watched a minute: memory", f"+{tabs - after:.0f} MB", "100 MB", tabs - after < 100),
    ]


async def guesses(target: Target) -> list[Row]:
    """Other sites, other names, addresses as files."""
    async with target.client() as client:
        tries = {
            "another site's POST": client.post(
                "/gradio_api/call/submit", json={"data": []}, headers={"Origin": "https://evil.example"}
            ),
            "a rebound name": client.get("/config", headers={"Host": "evil.example"}),
            "another site's player": client.get(
                "/config", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
            ),
            "an address as a file": client.get("/gradio_api/file=http://127.0.0.1:1/x"),
        }
        codes = {name: (await answer).status_code for name, answer in tries.items()}
    return [(name, str(code), "403", code == 403) for name, code in codes.items()]


async def queue(target: Target) -> list[Row]:
    """One address under two hundred names at once."""
    async with target.client() as client, Bystander(target) as bystander:
        async with bystander.watching() as slowest:
            started_s = time.monotonic()
            made = await asyncio.gather(*(call(target, "submit", **SHORT, owner=f"name{n}") for n in range(200)))
            took_s = time.monotonic() - started_s
        taken = sum(one is not None for one in made)
        page = next(d["id"] for d in (await config_of(target))["dependencies"] if "turn" in str(d["targets"]))
        turn = client.post("/gradio_api/queue/join", json={
            "data": [""], "fn_index": page, "session_hash": "turn", "event_data": {"id": "1000000"}})  # fmt: skip
        turned_s = await timed(turn)
        await _stop_all(target)
    return [
        ("200 submits at once", f"{took_s:.1f} s", "7 s", took_s < 7),
        ("worst /healthz meanwhile", f"{slowest[0]:.2f} s", "1 s", slowest[0] < 1),
        ("jobs that one address got into the queue", str(taken), "at most 32", 0 < taken <= 32),
        ("gallery page 1,000,000", f"{turned_s:.2f} s", "1 s", turned_s < 1),
    ]


async def logins(folder: Path) -> list[Row]:
    """A thousand passwords for one name."""
    target = Target(folder, "--auth", "ann:secret")
    try:
        async with target.client() as client:
            codes = []
            for number in range(1000):
                form = {"username": "ann", "password": str(number)}
                codes.append((await client.post("/login", data=form)).status_code)
            before = [
                (await client.get(f"/gradio_api/{path}")).status_code for path in ("heartbeat/x", "info", "stream/a/b/c/d.ts")
            ]
        log = (folder / "log").read_text()
    finally:
        target.close()
    heard = codes.count(400)
    return [
        ("passwords listened to, of 1,000", str(heard), "at most 20", heard <= 20),
        ("routes open before the login", str(sum(code != 401 for code in before)), "0", set(before) == {401}),
        ("passwords in the log", str(len(re.findall(r"\bsecret\b", log))), "0", "secret" not in log),
    ]


async def run(options: argparse.Namespace) -> list[Row]:
    """All attacks on fresh servers."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        target = Target(Path(name), "--max_queue", "500", "--max_per_owner", "0", "--max_per_address", "0")
        try:
            rows += await guesses(target)
            rows += await bodies(target)
            rows += await watchers(target)
            rows += await memory(target, options.calls)
        finally:
            target.close()
    with tempfile.TemporaryDirectory() as name:
        target = Target(Path(name))
        try:
            rows += await queue(target)
        finally:
            target.close()
    with tempfile.TemporaryDirectory() as name:
        rows += await logins(Path(name))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="API calls without a session name (default: 10000)")
    options = parser.parse_args()
    print(hardware(), flush=True)
    rows = asyncio.run(run(options))
    print(table(["attack", "found", "must stay within", ""], [[*row[:3], "" if row[3] else "FAULT"] for row in rows]))
    return int(not all(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
