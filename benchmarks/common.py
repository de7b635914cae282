"""What the benchmarks share: the hardware's name, a table, a checkpoint, and one timed job."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from dualparal import Engine, GenerationRequest
from dualparal.jobs.job import JobResult
from dualparal.model.tiny import write_tiny_checkpoint


def hardware() -> str:
    """One line: processor, cores, memory, torch, load."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}, "
        f"torch {torch.__version__}, load before start {load:.1f}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def checkpoint(name: str, **shape: Any) -> Path:
    """A random checkpoint of the given shape, written once per machine."""
    folder = Path(tempfile.gettempdir()) / f"dualparal-bench-{name}"
    if not (folder / "model_index.json").is_file():
        write_tiny_checkpoint(folder, **shape)
    return folder


class PeakMemory:
    """Context manager: the most anonymous memory (RssAnon: what cannot be dropped) of this process, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self._start = self._most = _anonymous_bytes()
        self._is_done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._watcher.join()
        self._most = max(self._most, _anonymous_bytes())

    @property
    def grown_bytes(self) -> int:
        """The most, less what was held at the start."""
        return self._most - self._start

    def _watch(self) -> None:
        while not self._is_done.wait(0.005):
            self._most = max(self._most, _anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def timed_job(engine: Engine, request: GenerationRequest) -> tuple[JobResult, float]:
    """Run one job; its result and the wall seconds of denoising."""
    started_s = time.monotonic()
    job = engine.submit(request)
    result = job.result()
    return result, result.timings.get("denoise_s", time.monotonic() - started_s)
