"""Saved sweeps: what rank 0 needs to go on with a job as if nothing had happened.

At the border after a sweep the state of a job is small: latents and sampler of the blocks in flight, and the ends of
neighbours that later items will see. Nothing of it is ever written in place, so a snapshot is a handful of references; a
thread of its own puts it on disk, under a temporary name first, and no oftener than its cost allows.

    outputs/<job id>/state/latents_0000.safetensors   a finished block, float32
                           sweep.safetensors          the newest saved border
                           sweep_before.safetensors   the one before, should the newest be found damaged

Follows METHOD.md, invariant 6. Files are safetensors: reading them runs no code.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dualparal.errors import OutputError
from dualparal.files import remove_partials
from dualparal.ring.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
VERSION = 2
SWEEP, SWEEP_BEFORE = "sweep.safetensors", "sweep_before.safetensors"
MIN_INTERVAL_S = 2.0


@dataclass(frozen=True)
class SweepState:
    """The border before item `next_index`, after `sweep`. `counts` and `samplers` are `BlockSampler.state()` of each block in
    flight."""

    next_index: int
    num_finished: int  # blocks that have left
    latents: dict[int, torch.Tensor]
    counts: dict[int, dict[str, int]]
    samplers: dict[int, dict[str, torch.Tensor]]
    tails: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    heads: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    sweep: int = 0

    def on_host(self) -> SweepState:
        """The same in host memory. What is there already is not copied: nothing of it is ever written in place."""
        return replace(
            self,
            latents={block: x.cpu() for block, x in self.latents.items()},
            samplers={block: {name: x.cpu() for name, x in named.items()} for block, named in self.samplers.items()},
            tails={key: x.cpu() for key, x in self.tails.items()},
            heads={key: x.cpu() for key, x in self.heads.items()},
        )


class StateWriter:
    """Writes finished blocks and sweep borders of one job, in order, from a thread of its own.

    At most `max_share` of the run's time goes into saving, the next sweep's included: it is saved when the time since the start
    allows for one more save like the last. The first comes after `MIN_INTERVAL_S`.
    A full disk ends the saving, not the job.
    """

    def __init__(self, folder: Path, *, max_share: float = 0.02) -> None:
        self._folder, self._max_share = folder, max_share
        self._work: queue.Queue[tuple[str, int, SweepState | torch.Tensor] | None] = queue.Queue()
        self._is_busy = False
        self._has_failed = False
        self._started_s = time.monotonic()
        self._next_s = self._started_s + MIN_INTERVAL_S
        self.seconds = 0.0  # spent saving
        try:
            folder.mkdir(exist_ok=True)
            remove_partials(folder)  # of a run that was killed; nobody writes yet
        except OSError as error:
            self._fail(error)
        self._thread = threading.Thread(target=self._run, name="state writer", daemon=True)
        self._thread.start()

    def wants_sweep(self) -> bool:
        """Whether a sweep may be saved now."""
        return not self._is_busy and not self._has_failed and time.monotonic() >= self._next_s

    def save_block(self, block: int, latents: torch.Tensor) -> None:
        """A finished block; in order with the sweeps, so that no sweep on disk lacks a block finished before it."""
        self._work.put(("block", block, latents.cpu()))

    def save_sweep(self, state: SweepState) -> None:
        """A border. On a GPU it is copied at once: the thread would wait for the block steps given to the device since."""
        self._is_busy = True
        self._work.put(("sweep", 0, state.on_host()))

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
                if isinstance(content, SweepState):
                    write_sweep(self._folder, content)
                else:
                    write_tensors(block_file(self._folder, block), {"latents": content}, {})
            except (OSError, SafetensorError) as error:
                self._fail(error)
            spent_s = time.monotonic() - started_s
            self.seconds += spent_s
            if kind == "sweep":
                allowed_s = self._started_s + (self.seconds + spent_s) / self._max_share
                self._next_s = max(time.monotonic() + MIN_INTERVAL_S, allowed_s)
                self._is_busy = False

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        log.warning("this job can no longer be resumed from here on: %s", error)


def block_file(folder: Path, block: int) -> Path:
    """Where a finished block's latents are kept."""
    return folder / f"latents_{block:04d}.safetensors"


def write_sweep(folder: Path, state: SweepState) -> None:
    """Write one border. The one before stays beside it, and the one before that goes."""
    tensors = {f"latents.{block}": x for block, x in state.latents.items()}
    for block, named in state.samplers.items():
        tensors |= {f"sampler.{block}.{name}": x for name, x in named.items()}
    for word, tape in (("tail", state.tails), ("head", state.heads)):
        tensors |= {f"{word}.{block}.{version}": x for (block, version), x in tape.items()}
    about = {
        "version": VERSION,
        "sweep": state.sweep,
        "next_index": state.next_index,
        "num_finished": state.num_finished,
        "counts": {str(b): c for b, c in state.counts.items()},
    }
    if (folder / SWEEP).exists():
        os.replace(folder / SWEEP, folder / SWEEP_BEFORE)
    write_tensors(folder / SWEEP, tensors, {"about": json.dumps(about)})


class FinishedBlocks:
    """The latents of a job's first finished blocks, in order, read one by one: of a long film they do not fit into memory."""

    def __init__(self, folder: Path, count: int = 0) -> None:
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Raises `OutputError` where a file is damaged, KeyError where it is another's."""
        for block in range(self._count):
            yield read_tensors(block_file(self._folder, block))[0]["latents"]


def read_state(folder: Path) -> tuple[SweepState | None, FinishedBlocks]:
    """(a saved border or None, latents of the finished blocks it builds on, in order).

    The newest border that is whole, and whose finished blocks are: where a file is damaged the log says so, and the job goes on
    from the border before, or from its start, to the same bits.
    """
    for file in (folder / SWEEP, folder / SWEEP_BEFORE):
        if not os.path.lexists(file):
            continue
        try:
            state = _read_sweep(file)
            finished = FinishedBlocks(folder, state.num_finished)
            for _ in finished:
                pass
            return state, finished
        except (OutputError, KeyError, TypeError, ValueError) as error:
            log.warning("the saved state of this job is damaged, so that more of it is denoised again: %s", error)
    return None, FinishedBlocks(folder)


def _read_sweep(file: Path) -> SweepState:
    tensors, metadata = read_tensors(file, written_as=SWEEP)
    about = json.loads(metadata["about"])
    if about["version"] != VERSION:
        raise OutputError(f"{file} was saved by another version of this program")
    return _sorted_out(about, tensors)


def _sorted_out(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SweepState:
    counts: dict[str, dict[str, int]] = about["counts"]
    state = SweepState(
        int(about["next_index"]),
        int(about["num_finished"]),
        {},
        {int(b): c for b, c in counts.items()},
        {int(b): {} for b in counts},
        sweep=int(about["sweep"]),
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
