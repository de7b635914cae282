"""What a message between ranks costs its two ends: 20 MB each over gloo, with buffers used again and with new ones.

The receiver reads what comes and sends nothing back; both ends go through the runtime's own edges. Processor seconds mean
something on a loaded machine too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import hardware, table
from dualparal.method.grid import Grid
from dualparal.ring import transport


def one_end(rank: int, port: int, is_reused: bool, num_elements: int, count: int, line: Any) -> None:
    """Send (rank 0) or receive (rank 1) `count` messages; tells (seconds, processor seconds, page faults) of one."""
    torch.set_num_threads(1)
    if not is_reused:
        transport._buffers.give_back = lambda buffer: None  # type: ignore[method-assign]
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    links = transport.DistributedLinks(rank, Grid(2), device=torch.device("cpu"), timeout_s=600, key=b"benchmark")
    out, into = links.outgoing, links.incoming
    assert out is not None and into is not None
    hidden = torch.ones(num_elements)
    before = (0.0, 0.0, 0)
    if rank == 1:
        into.post(num_elements + 1, torch.float32)
    for number in range(count + 3):
        if number == 3:  # the first few are not counted
            before = spent()
        if rank == 0:
            out.send(transport.pack(hidden))
            continue
        message = into.take()
        if number < count + 2:
            into.post(num_elements + 1, torch.float32)
        assert message.sum() > 0
        into.give_back(message)
    out.flush()
    line.send([(now - then) / count for now, then in zip(spent(), before, strict=True)])


def spent() -> tuple[float, float, int]:
    """(clock, processor seconds, page faults) of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), used.ru_utime + used.ru_stime, used.ru_minflt


def measure(is_reused: bool, num_elements: int, count: int) -> list[list[float]]:
    """(seconds, processor seconds, page faults) a message, of the sender and of the receiver."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ends = []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=one_end, args=(rank, store.port, is_reused, num_elements, count, there))
        process.start()
        ends.append((here, process))
    found = [here.recv() for here, _ in ends]
    for _, process in ends:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    print(hardware(), f"{options.count} messages of {options.megabytes:g} MB", sep="\n")
    rows = []
    for is_reused in (False, True, False, True):
        sender, receiver = measure(is_reused, int(options.megabytes * 1e6 / 4), options.count)
        name = "used again" if is_reused else "new for each message"
        ends = [cell for end in (sender, receiver) for cell in (f"{end[1] * 1000:.1f}", f"{end[2]:.0f}")]
        rows.append([name, f"{receiver[0] * 1000:.1f}", *ends])
    header = ["buffers", "ms a message", "sender: processor ms", "page faults", "receiver: processor ms", "page faults"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
