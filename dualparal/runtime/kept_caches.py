"""The stages' share of a saved sweep: K/V of left neighbours, which `context="cached"` keeps from sweep to sweep.

Rank 0 chooses the border and says so with the border's last block step; every stage then puts what it holds on disk, each
layer under its number, so that a job may go on with another number of ranks or another split. A sweep counts as saved when all
layers of the model are there.

    outputs/<job id>/state/caches_000017_1.safetensors   K/V that rank 1 held after sweep 17

Follows METHOD.md, invariant 6.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dualparal.errors import OutputError
from dualparal.model.stage import Tails
from dualparal.runtime.tensor_files import write_tensors

log = logging.getLogger(__name__)
MAX_BYTES = 2**30  # of one border, all layers together; larger ones are not saved
NAME = re.compile(r"caches_(\d{6})_\d+\.safetensors")


class CacheWriter:
    """Writes one stage's K/V, from a thread of its own that is started by the first border. A full disk ends the saving, not
    the job; where the folder of the job is not at hand (another host's) nothing is written, and the border stays incomplete."""

    def __init__(self, folder: Path, rank: int, layers: range) -> None:
        self._folder, self._rank, self._layers = folder, rank, layers
        self._work: queue.Queue[tuple[int, Tails] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def save(self, sweep: int, tails: Tails) -> None:
        """Keep `tails` as held after `sweep`. Tensors on a GPU are copied at once: it has no room for two generations."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cache writer", daemon=True)
            self._thread.start()
        held = {key: {n: (k.cpu(), v.cpu()) for n, (k, v) in by_layer.items()} for key, by_layer in tails.items()}
        self._work.put((sweep, held))

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._has_failed or not self._folder.is_dir():
                continue
            try:
                write_caches(self._folder, *work, self._rank, self._layers)
            except (OSError, SafetensorError) as error:
                if not self._folder.is_dir():  # the job has finished meanwhile
                    continue
                self._has_failed = True
                log.warning("from here on a cut-off job is run again from an earlier sweep: %s", error)


def write_caches(folder: Path, sweep: int, tails: Tails, rank: int, layers: range) -> None:
    """Write the K/V of one stage, which has `layers`, under a name that says the sweep; whole or not at all."""
    tensors = {}
    for (block, half), by_layer in tails.items():
        for layer, pair in by_layer.items():
            for word, x in zip("kv", pair, strict=True):
                tensors[f"{block}.{'both' if half is None else half}.{layer}.{word}"] = x
    write_tensors(folder / f"caches_{sweep:06d}_{rank}.safetensors", tensors, {"layers": json.dumps(list(layers))})


def read_caches(folder: Path, sweep: int, layers: range) -> Tails:
    """The K/V of `layers` as held after `sweep`, whichever ranks wrote them. Raises `OutputError` when they are damaged."""
    found: Tails = {}
    parts: dict[tuple[int, int | None, int], dict[str, torch.Tensor]] = {}
    try:
        for file in files_of(folder, sweep):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not iterable by itself
                    block, half, layer, word = key.split(".")
                    if int(layer) in layers:
                        place = (int(block), None if half == "both" else int(half), int(layer))
                        parts.setdefault(place, {})[word] = opened.get_tensor(key).clone()
        for (block, which, number), pair in parts.items():
            found.setdefault((block, which), {})[number] = (pair["k"], pair["v"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OutputError(f"the saved state in {folder} is damaged ({error}); start the job again") from None
    return found


def files_of(folder: Path, sweep: int) -> list[Path]:
    """All stages' files of one sweep."""
    return sorted(folder.glob(f"caches_{sweep:06d}_*.safetensors"))


def is_complete(folder: Path, sweep: int, num_layers: int) -> bool:
    """Whether the K/V of every layer after `sweep` are on disk."""
    there: set[int] = set()
    for file in files_of(folder, sweep):
        try:
            with safe_open(file, framework="pt") as opened:
                there |= set(json.loads(opened.metadata()["layers"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False
    return there == set(range(num_layers))


def drop_older(folder: Path, sweep: int) -> None:
    """Delete the stages' files of all sweeps before `sweep`."""
    for file in folder.glob("caches_*.safetensors"):
        match = NAME.fullmatch(file.name)
        if match and int(match[1]) < sweep:
            file.unlink(missing_ok=True)
