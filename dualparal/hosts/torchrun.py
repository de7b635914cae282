"""One pipeline over several hosts, started by torchrun: what its processes know about each other.

torchrun starts one process per rank with the same command line. The process of rank 0 is the front end (page, queue, files,
codec, and the worker of rank 0); each of the others hosts the worker of its rank. They meet through the store of torchrun's
own agents at MASTER_ADDR:MASTER_PORT, where the front end leaves a notice. Needs no torch: the store is spoken to by a
short-lived process, because the front end never imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from dualparal.errors import EngineError, RequestError

SECRET_VARIABLE = "DUALPARAL_SECRET"
NOTICE_TIMEOUT_S = 600.0  # how long a rank looks for the front end, at the start and after it was lost


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process's place among torchrun's processes."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int  # of this host
    master_addr: str
    master_port: int
    run_id: str

    @property
    def is_front_end(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """What this process is called in logs."""
        return "front end" if self.is_front_end else f"host of rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Where the front end listens. `key` is empty when all hosts have `DUALPARAL_SECRET`."""

    host: str
    port: int
    key: str = field(repr=False)

    def shared_key(self, team: Team) -> bytes:
        """What opens the connection; raises `EngineError` when the secret is not known here."""
        secret = os.environ.get(SECRET_VARIABLE, "")
        if not self.key and not secret:
            raise EngineError(f"rank 0 was started with {SECRET_VARIABLE}; set the same on every host")
        return bytes.fromhex(self.key) if self.key else hashlib.sha256(f"{team.run_id}\n{secret}".encode()).digest()


def find_team(environment: Mapping[str, str] | None = None) -> Team | None:
    """The team that torchrun's variables describe; None outside torchrun. Raises `RequestError` for a launch without its
    store."""
    env = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" not in env or "RANK" not in env:
        return None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise RequestError(
            "this torchrun shares no store with its processes; unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "ranks"
        )
    return Team(
        rank=int(env["RANK"]), ranks=int(env["WORLD_SIZE"]), local_rank=int(env["LOCAL_RANK"]),
        local_ranks=int(env["LOCAL_WORLD_SIZE"]), master_addr=env["MASTER_ADDR"], master_port=int(env["MASTER_PORT"]),
        run_id=env["TORCHELASTIC_RUN_ID"],
    )  # fmt: skip


def settle_ranks(team: Team | None, ranks: int, replicas: int) -> int:
    """The number of ranks: torchrun's where it starts them. Raises `RequestError` where flags say something else."""
    if team is None:
        return ranks
    if ranks not in (1, team.ranks):
        raise RequestError(f"ranks={ranks}, but torchrun runs {team.ranks} processes, one a rank; leave ranks out", "ranks")
    if replicas != 1:
        raise RequestError(f"replicas={replicas}, but torchrun runs one pipeline; start several, one for each", "replicas")
    return team.ranks


def leave_notice(team: Team, notice: Notice) -> None:
    """Tell all ranks where the front end is. Raises `EngineError`."""
    _ask_store(team, "put", json.dumps(asdict(notice)), timeout_s=60.0)


def read_notice(team: Team, timeout_s: float, *, is_known: bool = False) -> Notice:
    """The newest notice; waits for the first one, or with `is_known` only for the store. Raises `EngineError` after
    `timeout_s`, and when a notice that was there is gone with its store: then the agent of this host has to start anew too."""
    return Notice(**json.loads(_ask_store(team, "look" if is_known else "get", "", timeout_s=timeout_s)))


def _ask_store(team: Team, verb: str, value: str, *, timeout_s: float) -> str:
    command = [sys.executable, "-m", "dualparal.hosts.noticeboard", verb, team.master_addr, str(team.master_port),
               str(timeout_s)]  # fmt: skip
    try:
        # A notice holds a key: it travels through standard input, never on a command line.
        done = subprocess.run(command, input=value, capture_output=True, text=True, timeout=timeout_s + 60, check=False)
    except subprocess.TimeoutExpired:
        raise EngineError(f"torchrun's store at {team.master_addr}:{team.master_port} does not answer") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise EngineError(f"torchrun's store at {team.master_addr}:{team.master_port} is of no use: {reason}")
    return done.stdout


def end_with_the_agent() -> None:
    """End this process (as by SIGTERM) when the torchrun agent that started it is gone: another one may take its place."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="dualparal agent").start()
