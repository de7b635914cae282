"""A server of our own to be visited, callers by the hundred, and bystanders who time what they are answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
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

DEADLINE_S = 120.0
MAX_LINE = 2**24  # bytes


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
