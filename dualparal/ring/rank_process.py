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

from dualparal.messages import Ready, Spans, StorePort, WorkerOptions
from dualparal.model.latent_rgb import CACHE
from dualparal.model.layout import Checkpoint
from dualparal.model.low_memory import stored_bytes
from dualparal.model.stage import Stage
from dualparal.network import listen_at
from dualparal.planning.calibration import cache_folder
from dualparal.ring import meeting
from dualparal.ring.coordinator import Coordinator
from dualparal.ring.looks import MapFinder
from dualparal.ring.stage_loop import serve_stage
from dualparal.ring.transport import IDLE_TIMEOUT, DistributedLinks, Links, SoloLinks
from dualparal.ring.worker import Uplink, call_hook, quiet_libraries, run_worker


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
        torch.set_num_threads(options.engine.threads or 1)
        device = torch.device(options.devices[rank])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        links = join_ring(rank, options, uplink, device)
        checkpoint = Checkpoint(Path(options.folder))
        stage = Stage(
            checkpoint, options.layers[rank], dtype=str(options.engine.dtype), device=options.devices[rank],
            loras=options.loras, attention=options.engine.attention, is_compiled=options.engine.compile,
            quantization=options.engine.quantization, is_offloaded=options.engine.offload,
            is_cache_offloaded=options.engine.offload_cache, lora_cache_bytes=options.engine.lora_cache_bytes,
            ring=options.grid.ring_of(rank),
        )  # fmt: skip
        find = MapFinder(checkpoint, cache_folder() / CACHE)
        parts = call_hook(options, rank=rank, stage=stage, links=links, uplink=uplink, requests=requests, find_map=find)
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
            Coordinator(stage, links, checkpoint, uplink, inbox, to_codec, from_codec, options, parts["find_map"]).serve()

    run_worker(f"rank {rank}", connection, options, serve)


def join_ring(rank: int, options: WorkerOptions, uplink: Uplink, device: torch.device) -> Links:
    """Meet the other ranks: on one host in a folder that no other user can open, else over a store on rank 0's host, once the
    front end says that all are there. Neither torch's stores nor gloo ask who calls; the ranks do (`authentication`)."""
    if options.ranks == 1:
        return SoloLinks()
    timeout = datetime.timedelta(seconds=options.engine.timeout_s)
    if options.meeting_folder is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look up the host's name, which need not resolve
        store: dist.Store = meeting.enter(options.meeting_folder, options.ranks)
    else:
        if rank == 0:
            store = open_store(options.listen_address or "", options.ranks, timeout)
            uplink.send(StorePort(store.port))
        told: StorePort = uplink.receive()
        if told.interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", told.interface)
        if rank:
            store = dist.TCPStore(told.host, told.port, options.ranks, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks, timeout=IDLE_TIMEOUT)
    links = DistributedLinks(rank, options.grid, device=device, timeout_s=options.engine.timeout_s, key=options.ring_key)
    if options.meeting_folder is not None:
        dist.barrier()  # nobody needs it any more
        if rank == 0:
            meeting.remove(options.meeting_folder)
    return links


def open_store(address: str, ranks: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store, on `address` alone ("": on every address). By itself it would listen everywhere, whatever host it is given."""
    listener = listen_at(address)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address or "127.0.0.1", port, ranks, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )  # fmt: skip
