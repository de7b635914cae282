"""Other users of the machine: where ranks meet is closed to them, who takes a rank's place is found out, and nothing that
travels between ranks can run code."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal import Engine, GenerationRequest
from dualparal.engine import worker_group
from dualparal.messages import JobSpec
from dualparal.method.grid import Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules
from dualparal.method.step_cache import StepCache
from dualparal.model.stage import Conditions, JobShape
from dualparal.ring import announcement
from dualparal.ring.announcement import decode, encode

PACKAGE = Path(announcement.__file__).parents[1]
DEADLINE_S = 240.0


def spec(dtype: torch.dtype = torch.float32) -> JobSpec:
    texts = [[torch.randn(1, 3, 4).to(dtype), torch.randn(1, 2, 4).to(dtype)]]
    conditions = [Conditions(torch.randn(2, 4), torch.randn(2, 6, 4).to(dtype), texts)]
    rules = Rules(guided_steps=(1, 5), step_cache=StepCache(interval=2))
    return JobSpec("0a1b", rules, BlockPlan.of(9, 4, 2), (0, 1), JobShape(4, 6, 2, (5.0, 3.5), (0, 0)), conditions, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_announcement_comes_back_as_it_was(dtype: torch.dtype) -> None:
    said = spec(dtype)
    found = decode(encode(said))
    assert (found.rules, found.plan, found.experts, found.shape) == (said.rules, said.plan, said.experts, said.shape)
    assert (found.job_id, found.start) == ("0a1b", 7)
    ours, theirs = ([x.temb, x.timestep_proj, *x.texts[0]] for x in (said.conditions[0], found.conditions[0]))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    assert decode(encode(None)) is None


def test_shared_and_strided_tensors_are_announced_whole() -> None:
    x = torch.arange(12.0).view(3, 4)
    first, second = decode(encode([x.T, x[:, 1]]))
    assert torch.equal(first, x.T) and torch.equal(second, x[:, 1])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_what_is_no_announcement_makes_nothing(noise: bytes, place: int) -> None:
    data = bytearray(encode(spec()))
    at = place % len(data)
    data[at : at + len(noise)] = noise
    try:
        found = decode(bytes(data))
    except Exception as error:
        assert not isinstance(error, (SystemExit, KeyboardInterrupt))
    else:
        assert found is None or type(found).__name__ in announcement.KINDS or isinstance(found, (list, tuple, int, float, str))


def test_only_what_is_known_is_announced() -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        encode(Path("/"))  # type: ignore[arg-type]


@pytest.mark.parametrize("room", ["ring", "model", "method"])
def test_nothing_between_ranks_is_pickled(room: str) -> None:
    for path in (PACKAGE / room).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("pickle", "object_list", "torch.load", "_object("):
            assert word not in text.replace("with a pickle", "").replace("pickled weights", "").replace("pickled", ""), path


def _member(rank: int, ranks: int, folder: str, key: bytes, reported: Any) -> None:
    from dualparal.ring.transport import DistributedLinks

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=DEADLINE_S))
    try:
        links = DistributedLinks(rank, Grid(ranks), device=torch.device("cpu"), timeout_s=DEADLINE_S, key=key)
        reported.put((rank, "met", links.broadcast(spec() if rank == 0 else None) is not None))
    except Exception as error:
        reported.put((rank, type(error).__name__, str(error)))


@pytest.mark.parametrize(
    ("keys", "is_well"), [((b"a", b"a", b"a"), True), ((b"a", b"b", b"a"), False), ((b"", b"a", b"a"), False)]
)
def test_a_rank_without_the_key_is_found_out(keys: tuple[bytes, ...], is_well: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    reported = context.Queue()
    members = [context.Process(target=_member, args=(n, len(keys), str(tmp_path), key, reported)) for n, key in enumerate(keys)]
    for member in members:
        member.start()
    try:
        found = sorted(reported.get(timeout=DEADLINE_S) for _ in members)
    finally:
        for member in members:
            member.kill()
            member.join()
        reported.close()
    assert all((kind == "met") is is_well for _, kind, _ in found), found
    if not is_well:
        assert all("in place of rank" in sentence for _, _, sentence in found), found


real = tempfile.mkdtemp
NOSY = """
import os, sys
os.setgid(65534), os.setuid(65534)
folder = sys.argv[1]
for deed in (lambda: os.listdir(folder), lambda: open(folder + "/store", "rb"), lambda: open(folder + "/x", "wb")):
    try:
        deed()
    except PermissionError:
        continue
    sys.exit("it could")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_cannot_come_where_ranks_meet(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def watched(**more: Any) -> str:
        made.append(Path(real(**more)))
        assert stat.S_IMODE(made[-1].stat().st_mode) == 0o700
        nosy = subprocess.run([sys.executable, "-c", NOSY, str(made[-1])], capture_output=True, text=True, check=False)
        assert nosy.returncode == 0, nosy.stderr
        return str(made[-1])

    monkeypatch.setattr(worker_group.tempfile, "mkdtemp", watched)
    with Engine(tiny, ranks=2, device="cpu", threads=1, outputs=tmp_path) as engine:
        small = {"latents_num": 5, "num_per_block": 4, "num_cat": 2, "num_inference_steps": 2, "height": 32, "width": 32}
        assert engine.submit(GenerationRequest(prompt="x", **small)).result(DEADLINE_S).num_frames == 17
        assert made and not any(folder.exists() for folder in made), "it goes when all have met, whatever ends them later"
