"""What strangers can cost a server: `python -m benchmarks.attack` starts one on this machine, attacks it and says what it bore.

Everything stays on the loopback interface, is bounded in number and time, and ends by itself. Each row has a figure and what
it must stay within; exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.common import hardware, table
from benchmarks.visitors import DEADLINE_S, Bystander, Target, ask, call, config_of, timed

LONG = {"prompt": "a red circle bouncing on a navy background", "seconds": 300, "num_inference_steps": 100}
SHORT = {"prompt": "a red circle bouncing on a navy background", "seconds": 1, "num_inference_steps": 2}
Row = tuple[str, str, str, bool]


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
