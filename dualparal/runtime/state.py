"""Saved sweeps: what rank 0 needs to go on with a job as if nothing had happened.

At the border after a sweep the state of a job is small: latents and sampler of the blocks in flight, and the ends of
neighbours that later items will see. Nothing of it is ever written in place, so a snapshot is a handful of references; a
thread of its own puts it on disk, under a temporary name first, and no oftener than its cost allows.

    outputs/<job id>/state/latents_0000.safetensors   a finished block, float32
                           sweep.safetensors          the newest saved border
                           sweep_000017.safetensors   the same where the stages hold K/V, which `kept_caches` saves

Follows METHOD.md, invariant 6. Files are safetensors: reading them runs no code.
"""

from __future__ import annotations

import json
import logging
import queue
import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dualparal.errors import OutputError
from dualparal.model.stage import Tails
from dualparal.runtime.kept_caches import MAX_BYTES, drop_older, is_complete, write_caches
from dualparal.runtime.tensor_files import write_tensors

log = logging.getLogger(__name__)
VERSION = 1
MIN_INTERVAL_S = 2.0


@dataclass(frozen=True)
class SweepState:
    """The border before item `next_index`, after `sweep`. `counts` and `samplers` are `BlockSampler.state()` of each block in
    flight, `caches` the K/V that stage 0 holds (on disk they are `kept_caches`' business)."""

    next_index: int
    num_finished: int  # blocks that have left
    latents: dict[int, torch.Tensor]
    counts: dict[int, dict[str, int]]
    samplers: dict[int, dict[str, torch.Tensor]]
    tails: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    heads: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    sweep: int = 0
    caches: Tails = field(default_factory=dict)

    def on_host(self) -> SweepState:
        """The same in host memory. What is there already is not copied: nothing of it is ever written in place."""
        return replace(
            self,
            latents={block: x.cpu() for block, x in self.latents.items()},
            samplers={block: {name: x.cpu() for name, x in named.items()} for block, named in self.samplers.items()},
            tails={key: x.cpu() for key, x in self.tails.items()},
            heads={key: x.cpu() for key, x in self.heads.items()},
            caches={key: {n: (k.cpu(), v.cpu()) for n, (k, v) in held.items()} for key, held in self.caches.items()},
        )


@dataclass(frozen=True)
class StageShare:
    """Stage 0's layers and how many the model has: what a writer needs to know where K/V are saved too."""

    layers: range
    num_layers: int


class StateWriter:
    """Writes finished blocks and sweep borders of one job, in order, from a thread of its own.

    At most `max_share` of the run's time goes into saving, the next sweep's included: it is saved when the time since the start
    allows for one more save like the last. The first comes after `MIN_INTERVAL_S`.
    A full disk ends the saving, not the job. With a `share` the stages' K/V belong to a border; borders whose K/V are larger
    than `MAX_BYTES` are not saved.
    """

    def __init__(self, folder: Path, *, max_share: float = 0.02, share: StageShare | None = None) -> None:
        self._folder, self._share = folder, share
        self._max_share = max_share
        self._sweep: int | None = None  # the last one saved
        self._work: queue.Queue[tuple[str, int, SweepState | torch.Tensor] | None] = queue.Queue()
        self._is_busy = False
        self._has_failed = False
        self._started_s = time.monotonic()
        self._next_s = self._started_s + MIN_INTERVAL_S
        self.seconds = 0.0  # spent saving
        try:
            folder.mkdir(exist_ok=True)  # before other ranks look for it
            for partial in folder.glob(".*.part"):  # of a run that was killed; nobody writes yet
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._fail(error)
        self._thread = threading.Thread(target=self._run, name="state writer", daemon=True)
        self._thread.start()

    @property
    def keeps_caches(self) -> bool:
        """Whether the stages' K/V are saved too."""
        return self._share is not None

    def wants_sweep(self, cache_bytes: int = 0) -> bool:
        """Whether a sweep may be saved now; `cache_bytes` of the K/V that stage 0 holds, where they belong to it."""
        if self._is_busy or self._has_failed or time.monotonic() < self._next_s:
            return False
        if self._share is None:
            return True
        if self._sweep is not None and not is_complete(self._folder, self._sweep, self._share.num_layers):
            return False  # another rank still writes, or cannot
        return self._has_room(cache_bytes * self._share.num_layers // len(self._share.layers))

    def _has_room(self, num_bytes: int) -> bool:
        """Whether all stages' K/V may be saved: two borders are on disk for a while, and videos come first."""
        if num_bytes > MAX_BYTES:
            self._has_failed = True
            log.warning(
                "the cached left context takes %.1f GB, more than the %.1f GB that are saved: a job that is cut off from here "
                "on is run again from its last border, or from its start", num_bytes / 1e9, MAX_BYTES / 1e9,
            )  # fmt: skip
            return False
        try:
            return shutil.disk_usage(self._folder.parent).free > 4 * num_bytes
        except OSError as error:  # the job's folder was deleted
            self._fail(error)
            return False

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
                    write_sweep(self._folder, content, self._share)
                    self._sweep = content.sweep
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


def write_sweep(folder: Path, state: SweepState, share: StageShare | None = None) -> None:
    """Write one border; the one before is replaced at once or not at all. With a `share` it stays beside the new one until
    all ranks' K/V of that are there."""
    tensors = {f"latents.{block}": x for block, x in state.latents.items()}
    for block, named in state.samplers.items():
        tensors |= {f"sampler.{block}.{name}": x for name, x in named.items()}
    for word, tape in (("tail", state.tails), ("head", state.heads)):
        tensors |= {f"{word}.{block}.{version}": x for (block, version), x in tape.items()}
    if share is not None:
        write_caches(folder, state.sweep, state.caches, 0, share.layers)
    about = {
        "version": VERSION,
        "sweep": state.sweep,
        "next_index": state.next_index,
        "num_finished": state.num_finished,
        "counts": {str(b): c for b, c in state.counts.items()},
    }
    name = "sweep.safetensors" if share is None else f"sweep_{state.sweep:06d}.safetensors"
    write_tensors(folder / name, tensors, {"about": json.dumps(about)})
    if share is not None:
        _drop_older(folder, share.num_layers)


def _drop_older(folder: Path, num_layers: int) -> None:
    """Keep the newest border that is complete, and those after it."""
    newest = _newest_complete(folder, num_layers)
    if newest is not None:
        for file in _borders(folder):
            if _sweep_of(file) < _sweep_of(newest):
                file.unlink(missing_ok=True)
        drop_older(folder, _sweep_of(newest))


def _borders(folder: Path) -> list[Path]:
    return sorted(folder.glob("sweep_??????.safetensors"))


def _sweep_of(file: Path) -> int:
    return int(file.stem.removeprefix("sweep_"))


def _newest_complete(folder: Path, num_layers: int) -> Path | None:
    found = (file for file in reversed(_borders(folder)) if is_complete(folder, _sweep_of(file), num_layers))
    return next(found, None)


def read_state(folder: Path, num_layers: int | None = None) -> tuple[SweepState | None, list[torch.Tensor]]:
    """(newest saved border or None, latents of the finished blocks it builds on, in order).

    `num_layers` of the model where the stages' K/V belong to a border: only one whose K/V are all there counts. Raises
    `OutputError` when the files are damaged; the job can then only be run again.
    """
    file = folder / "sweep.safetensors" if num_layers is None else _newest_complete(folder, num_layers)
    if file is None or not file.is_file():
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
