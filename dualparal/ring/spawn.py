"""Starts worker processes on this host.

`spawn` as it ships imports the caller's `__main__` again in every worker, so that an unguarded script would start itself; a
stand-in main module is shown to it while processes start. Needs no torch: a worker imports what it runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from dualparal.limits import grow_in_place, wait_passively
from dualparal.messages import WorkerOptions

_start_lock = threading.Lock()


@contextlib.contextmanager
def plain_main() -> Iterator[None]:
    """While processes start: an empty `__main__`, and Ctrl-C kept from workers that cannot ignore it yet."""
    with _start_lock:
        real = sys.modules["__main__"]
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = real
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def start_rank(rank: int, options: WorkerOptions, *queues: Any) -> tuple[SpawnProcess, Connection]:
    """Start the worker of `rank` on this host: (its process, our end of its line)."""
    return _start(f"rank {rank}", _run_rank, (rank,), (options, *queues))


def start_codec(options: WorkerOptions, *queues: Any) -> tuple[SpawnProcess, Connection]:
    """Start the codec: (its process, our end of its line)."""
    return _start("codec", _run_codec, (), (options, *queues))


def start_baseline(options: WorkerOptions, *queues: Any) -> tuple[SpawnProcess, Connection]:
    """Start the worker of plain Wan: (its process, our end of its line)."""
    return _start("baseline", _run_baseline, (), (options, *queues))


def _start(name: str, target: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*before, there, *after), name=f"dualparal {name}", daemon=True)
    try:
        process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()
    return process, here


def _prepare(options: WorkerOptions) -> None:
    """What has to be before torch and diffusers are loaded."""
    wait_passively()
    grow_in_place()
    from dualparal.model.lean import import_diffusers

    import_diffusers(is_compiled=options.engine.compile)


def _run_rank(rank: int, connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    _prepare(options)
    from dualparal.ring.rank_process import rank_main

    rank_main(rank, connection, options, *queues)


def _run_codec(connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    _prepare(options)
    from dualparal.ring.codec_process import codec_main

    codec_main(connection, options, *queues)


def _run_baseline(connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    wait_passively()
    grow_in_place()
    from dualparal.ring.baseline_process import baseline_main

    baseline_main(connection, options, *queues)
