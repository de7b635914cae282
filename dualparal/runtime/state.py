"""Saved sweeps: what rank 0 needs to go on with a job as if nothing had happened.

At the border after a sweep the state of a job is small: latents and sampler of the blocks in flight, and the ends of
neighbours that later items will see. Nothing of it is ever written in place, so a snapshot is a handful of references; a
thread of its own puts it on disk, under a temporary name first, and no oftener than its cost allows.

    outputs/<job id>/state/latents_0000.safetensors   a finished block, float32
                           sweep.safetensors          the newest saved border

Follows METHOD.md, invariant 6. Files are safetensors: reading them runs no code.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dualparal.errors import OutputError

log = logging.getLogger(__name__)
VERSION = 1
MIN_INTERVAL_S = 2.0


@dataclass(frozen=True)
class SweepState:
    """The border before item `next_index`. `counts` and `samplers` are `BlockSampler.state()` of each block in flight."""

    next_index: int
    num_finished: int  # blocks that have left
    latents: dict[int, torch.Tensor]
    counts: dict[int, dict[str, int]]
    samplers: dict[int, dict[str, torch.Tensor]]
    tails: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    heads: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class StateWriter:
    """Writes finished blocks and sweep borders of one job, in order, from a thread of its own.

    At most `max_share` of the run's time goes into saving: after a save that took t seconds the next one waits t / max_share.
    A full disk ends the saving, not the job.
    """

    def __init__(self, folder: Path, *, max_share: float = 0.02) -> None:
        self._folder = folder
        self._max_share = max_share
        self._work: queue.Queue[tuple[str, int, SweepState | torch.Tensor] | None] = queue.Queue()
        self._is_busy = False
        self._has_failed = False
        self._next_s = 0.0
        self.seconds = 0.0  # spent saving
        self._thread = threading.Thread(target=self._run, name="state writer", daemon=True)
        self._thread.start()

    def wants_sweep(self) -> bool:
        """Whether a sweep may be saved now."""
        return not self._is_busy and not self._has_failed and time.monotonic() >= self._next_s

    def save_block(self, block: int, latents: torch.Tensor) -> None:
        """A finished block; in order with the sweeps, so that no sweep on disk lacks a block finished before it."""
        self._work.put(("block", block, latents))

    def save_sweep(self, state: SweepState) -> None:
        self._is_busy = True
        self._work.put(("sweep", 0, state))

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            kind, block, content = work
            if self._has_failed:
                continue
            started_s = time.monotonic()
            try:
                self._folder.mkdir(exist_ok=True)
                if isinstance(content, SweepState):
                    write_sweep(self._folder, content)
                else:
                    _write(block_file(self._folder, block), {"latents": content}, {})
            except (OSError, SafetensorError) as error:
                self._has_failed = True
                log.warning("this job can no longer be resumed from here on: %s", error)
            spent_s = time.monotonic() - started_s
            self.seconds += spent_s
            if kind == "sweep":
                self._next_s = time.monotonic() + max(MIN_INTERVAL_S, spent_s / self._max_share)
                self._is_busy = False


def block_file(folder: Path, block: int) -> Path:
    """Where a finished block's latents are kept."""
    return folder / f"latents_{block:04d}.safetensors"


def write_sweep(folder: Path, state: SweepState) -> None:
    """Write one border; the one before is replaced at once or not at all."""
    tensors = {f"latents.{block}": x for block, x in state.latents.items()}
    for block, named in state.samplers.items():
        tensors |= {f"sampler.{block}.{name}": x for name, x in named.items()}
    for word, tape in (("tail", state.tails), ("head", state.heads)):
        tensors |= {f"{word}.{block}.{version}": x for (block, version), x in tape.items()}
    about = {
        "version": VERSION,
        "next_index": state.next_index,
        "num_finished": state.num_finished,
        "counts": {str(b): c for b, c in state.counts.items()},
    }
    _write(folder / "sweep.safetensors", tensors, {"about": json.dumps(about)})


def read_state(folder: Path) -> tuple[SweepState | None, list[torch.Tensor]]:
    """(newest saved border or None, latents of the finished blocks it builds on, in order).

    Raises `OutputError` when the files are damaged; the job can then only be run again.
    """
    file = folder / "sweep.safetensors"
    if not file.is_file():
        return None, []
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["about"])
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not iterable by itself
        if about["version"] != VERSION:
            raise OutputError(f"{file} was saved by another version of this program; start the job again")
        state = _sorted_out(about, tensors)
        finished = []
        for block in range(state.num_finished):
            with safe_open(block_file(folder, block), framework="pt") as opened:
                finished.append(opened.get_tensor("latents").clone())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"the saved state in {folder} is damaged ({error}); start the job again") from None
    return state, finished


def _sorted_out(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SweepState:
    counts: dict[str, dict[str, int]] = about["counts"]
    state = SweepState(
        int(about["next_index"]),
        int(about["num_finished"]),
        {},
        {int(b): c for b, c in counts.items()},
        {int(b): {} for b in counts},
    )
    for key, value in tensors.items():
        word, block, *rest = key.split(".")
        if word == "latents":
            state.latents[int(block)] = value
        elif word == "sampler":
            state.samplers[int(block)][".".join(rest)] = value
        else:
            {"tail": state.tails, "head": state.heads}[word][int(block), int(rest[0])] = value
    return state


def _write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_name(f".{file.name}.part")
    try:
        # One tensor may be held under two names; safetensors wants each to have memory of its own.
        save_file({key: x.detach().cpu().clone().contiguous() for key, x in tensors.items()}, partial, metadata)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
