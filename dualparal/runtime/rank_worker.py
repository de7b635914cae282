"""The process of one rank: join the ring, load the own layers, then coordinate (rank 0) or serve as a stage."""

from __future__ import annotations

import datetime
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dualparal.model.layout import Checkpoint
from dualparal.model.low_memory import stored_bytes
from dualparal.model.stage import Stage
from dualparal.runtime.messages import Ready, Spans, StorePort, WorkerOptions
from dualparal.runtime.network import listen_at
from dualparal.runtime.rank_zero import Coordinator
from dualparal.runtime.stage_worker import serve_stage
from dualparal.runtime.transport import IDLE_TIMEOUT, DistributedLinks, Links, SoloLinks
from dualparal.runtime.worker import Uplink, call_hook, quiet_libraries, run_worker


def rank_main(
    rank: int,
    connection: Connection,
    options: WorkerOptions,
    requests: Queue[Any] | None,
    to_codec: Queue[Any] | None,
    from_codec: Queue[Any] | None,
) -> None:
    """Entry point of a rank's process; the queues are rank 0's."""

    def serve(uplink: Uplink) -> None:
        quiet_libraries()
        started_s = time.monotonic()
        torch.set_num_threads(options.threads)
        device = torch.device(options.devices[rank])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        links = join_ring(rank, options, uplink, device)
        checkpoint = Checkpoint(Path(options.folder))
        stage = Stage(
            checkpoint, options.layers[rank], dtype=options.dtype, device=options.devices[rank], loras=options.loras,
            attention=options.attention, is_compiled=options.is_compiled, quantization=options.quantization,
            is_offloaded=options.is_offloaded, is_cache_offloaded=options.is_cache_offloaded,
        )  # fmt: skip
        parts = call_hook(options, rank=rank, stage=stage, links=links, uplink=uplink, requests=requests)
        stage, links, inbox = parts["stage"], parts["links"], parts["requests"]
        about = {
            "parameters": [name for model in stage.models for name, _ in model.named_parameters()],
            "weight_bytes": sum(stored_bytes(model) for model in stage.models),
            "pid": os.getpid(),
            "load_s": time.monotonic() - started_s,
        }
        uplink.send(Ready(uplink.name, about))
        if rank:
            ahead_s = options.clock_ahead_s
            serve_stage(stage, links, lambda job_id, spans: uplink.send(Spans(job_id, tuple(s.later(ahead_s) for s in spans))))
        else:
            assert inbox is not None and to_codec is not None and from_codec is not None
            Coordinator(stage, links, checkpoint, uplink, inbox, to_codec, from_codec, options).serve()

    run_worker(f"rank {rank}", connection, options, serve)


def join_ring(rank: int, options: WorkerOptions, uplink: Uplink, device: torch.device) -> Links:
    """Meet the other ranks over a store on a free port of rank 0's host; the front end says when all are there.

    Where all ranks are on one host nobody outside can reach what listens: neither torch's store nor gloo asks who calls.
    """
    if options.ranks == 1:
        return SoloLinks()
    timeout = datetime.timedelta(seconds=options.timeout_s)
    if rank == 0:
        store = open_store("127.0.0.1" if options.gate_address is None else options.gate_address, options.ranks, timeout)
        uplink.send(StorePort(store.port))
    meeting: StorePort = uplink.receive()
    if meeting.interface is not None:
        if options.gate_address is None:
            os.environ["GLOO_SOCKET_IFNAME"] = meeting.interface
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    if rank:
        store = dist.TCPStore(meeting.host, meeting.port, options.ranks, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks, timeout=IDLE_TIMEOUT)
    return DistributedLinks(rank, options.ranks, device=device, timeout_s=options.timeout_s)


def open_store(address: str, ranks: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store, on `address` alone ("": on every address). By itself it would listen everywhere, whatever host it is given."""
    listener = listen_at(address)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address or "127.0.0.1", port, ranks, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )  # fmt: skip
