"""The terminal's view of a running job: one progress bar with steps, blocks and time left."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from dualparal.events import FINAL, BlockReady, Progress, Queued, Started

if TYPE_CHECKING:
    from dualparal.cli.look import LookFile
    from dualparal.engine.engine import Engine
    from dualparal.jobs.job import Job

BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps{postfix}"


def follow(engine: Engine, job: Job, look: LookFile | None = None) -> None:
    """Show `job` on standard error, and in `look`'s file, until it has ended. Returns whatever its end; the caller asks for the
    result."""
    bar: tqdm[None] | None = None
    num_blocks = num_ready = 0
    try:
        if engine.state != "ready":
            print(f"loading {engine.checkpoint.folder} on {engine.ranks} rank(s)", file=sys.stderr, flush=True)
        for event in job.events(looks=look is not None):
            if look is not None:
                look.take(event)
            match event:
                case Queued() if event.reason:
                    print(f"waiting: {event.reason}", file=sys.stderr, flush=True)
                case Started() if event.notice:
                    tqdm.write(f"note: {event.notice}", file=sys.stderr)
                case Started():
                    num_blocks = event.num_blocks
                    bar = tqdm(total=event.num_items, file=sys.stderr, bar_format=BAR, desc="denoising", mininterval=0.2)
                case Progress() if bar is not None:
                    bar.set_postfix_str(_status(num_ready, num_blocks, event.eta_s), refresh=False)
                    bar.update(event.items_done - bar.n)
                case BlockReady() if bar is not None:
                    num_ready += 1
                    bar.set_postfix_str(_status(num_ready, num_blocks, None))
                case _ if isinstance(event, FINAL):
                    return
    finally:
        if bar is not None:
            bar.close()


def _status(num_ready: int, num_blocks: int, eta_s: float | None) -> str:
    left = "" if eta_s is None else f", {int(eta_s) // 60}:{int(eta_s) % 60:02d} left"
    return f"{num_ready}/{num_blocks} blocks{left}"
