"""The bits of pocket videos with recomputed context, for any number of ranks: as before the package got its rooms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.digests import CASES, digests

MACHINE = "AuthenticAMD AVX512, torch 2.13.0+cpu"  # where these were taken, at commit 16ac779
STORED = {
    "paper": "477d0763005811e8",
    "preview": "52a66ea247f50446",
    "paper, micro-batches": "477d0763005811e8",
    "step caching": "8f2a028dcd91e241",
    "guidance interval": "3402d0f020992e71",
    "one block": "6e85987e4e148178",
}


def this_machine() -> str:
    """What decides how this processor multiplies and adds."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_bit_has_changed(ranks: int) -> None:
    if (machine := this_machine()) != MACHINE:
        pytest.skip(f"the digests are those of {MACHINE}; this is {machine}, which multiplies differently")
    assert digests(ranks, {name: CASES[name] for name in STORED}) == STORED
