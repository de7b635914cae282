"""A ring of threads in one process: the runtime's loops over real stages without any process, with messages delayed at will."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dualparal.method.grid import Edge, Grid
from dualparal.method.noise import Ghost, coordinated_noise
from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules, make_schedule
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_source import Lora
from dualparal.model.stage import JobShape, Stage
from dualparal.planning.layer_split import split_layers
from dualparal.request import SolverName
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.saved_sweeps import SweepState
from dualparal.ring.stage_loop import SpanLog, run_stage
from dualparal.ring.texts import TextTrips
from dualparal.ring.transport import RingBeside

DEADLINE_S = 120


class LocalEdge:
    """One end of a queue; checks the size that was posted against what arrives."""

    def __init__(self, channel: queue.Queue[torch.Tensor], delays: random.Random | None, is_nccl: bool = False) -> None:
        self.holds_up_the_device = is_nccl
        self._channel, self._delays, self._posted = channel, delays, deque[int]()

    def _sleep(self) -> None:
        if self._delays:
            time.sleep(self._delays.random() * 0.004)

    def send(self, message: torch.Tensor) -> None:
        self._sleep()
        self._channel.put(message.clone())

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        self._posted.append(num_elements)

    def take(self) -> torch.Tensor:
        self._sleep()
        message = self._channel.get(timeout=DEADLINE_S)
        assert message.numel() == self._posted.popleft(), "a message met a receive of another size"
        return message

    def give_back(self, message: torch.Tensor) -> None:
        message.fill_(float("nan"))  # whoever still looks at it will be found out

    def flush(self) -> None:
        pass


class LocalLinks:
    def __init__(
        self,
        rank: int,
        grid: Grid,
        channels: dict[Edge, queue.Queue[torch.Tensor]],
        delays: random.Random | None,
        is_nccl: bool,
    ) -> None:
        self.rank, self.grid = rank, grid
        ends = {
            (edge.ring, rank == edge.source): LocalEdge(channel, delays, is_nccl and not edge.is_latents)
            for edge, channel in channels.items()
            if rank in (edge.source, edge.target)
        }
        own = grid.ring_of(rank) or 0
        self.outgoing, self.incoming = ends.get((own, True)), ends.get((own, False))
        self.beside = RingBeside(ends[1, True], ends[1, False]) if (rank, self.grid.guidance) == (0, 2) else None

    def broadcast(self, message: Any) -> Any:
        raise NotImplementedError


_stages: dict[tuple[Any, ...], Stage] = {}


def stages_of(
    checkpoint: Checkpoint, grid: Grid, layer_split: Sequence[int] | None, dtype: str, device: str = "cpu", **options: Any
) -> list[Stage]:
    """Of every rank. They are kept: many tests share a checkpoint and a split."""
    found = []
    split = split_layers(checkpoint.num_layers, grid.stages, layer_split)
    for rank in range(grid.ranks):
        layers, ring = split[grid.stage_of(rank)], grid.ring_of(rank)
        key = (checkpoint.folder, layers, ring, dtype, device, *options.items())
        if key not in _stages:
            _stages[key] = Stage(checkpoint, layers, dtype=dtype, device=device, ring=ring, **options)
        found.append(_stages[key])
    return found


def denoise_in_threads(
    folder: Path,
    *,
    latents_num: int,
    num_per_block: int,
    num_cat: int,
    steps: int,
    texts: Sequence[Sequence[torch.Tensor]],
    text_of_block: Sequence[int] | None = None,
    guidance: tuple[float, float] = (5.0, 5.0),
    boundary_ratio: float | None = None,
    flow_shift: float = 3.0,
    solver: SolverName = "unipc",
    seed: int = 0,
    size: tuple[int, int] = (4, 4),
    ranks: int = 1,
    guidance_parallel: int = 1,
    layer_split: Sequence[int] | None = None,
    delay_seed: int | None = None,
    stop_after: int | None = None,
    may_end: bool = False,
    noise: Sequence[torch.Tensor] | None = None,
    rules: Rules | None = None,
    saver: Any = None,
    looks: Any = None,
    resume: SweepState | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    is_nccl: bool = False,
    scenes: Sequence[Sequence[int]] | None = None,
    num_known: int | None = None,
    ghost: torch.Tensor | None = None,
    beside: Sequence[Lora] = (),
    **options: Any,
) -> dict[int, torch.Tensor]:
    """Latents of each finished block. `scenes`: latents of each scene's shots. `texts[i]`: guidance halves of text i, of which
    the first `num_known` are announced and the others travel; `stop_after` items the job is stopped (`may_end`:
    or ends before); `ranks` are those of a ring, of which there are `guidance_parallel`; `is_nccl`: receives are posted as on
    GPUs; `ghost`: one latent before block 0; `beside`: LoRAs of this video alone; `options` are the stages' own (LoRAs,
    attention)."""
    checkpoint, grid = Checkpoint(folder), Grid(ranks, guidance_parallel)
    stages = stages_of(checkpoint, grid, layer_split, dtype, device, **options)
    for stage in stages:
        stage.use_loras(beside)
    plan = BlockPlan.of(latents_num + (ghost is not None), num_per_block, num_cat, picture=ghost is not None)
    if scenes is not None:
        plan = BlockPlan.of_scenes(scenes, num_per_block, num_cat)
    config = checkpoint.config("scheduler")
    samplers = SamplerFactory(config, num_steps=steps, flow_shift=flow_shift, device=device, solver=solver)
    experts = samplers.experts(boundary_ratio)
    schedule = make_schedule(rules or Rules(), plan, experts)
    shape = JobShape(*size, len(texts[0]), guidance, tuple(text_of_block or (0,) * plan.num_blocks))
    conditions = stages[0].embed_conditions(samplers.timesteps, texts[:num_known])
    channels: dict[Edge, queue.Queue[torch.Tensor]] = {edge: queue.Queue() for edge in grid.edges()}
    delays = random.Random(delay_seed) if delay_seed is not None else None
    links = [LocalLinks(rank, grid, channels, delays, is_nccl) for rank in range(grid.ranks)]
    for stage in stages:
        stage.begin(shape, schedule, conditions)
    blocks: dict[int, torch.Tensor] = {}
    done: list[Any] = []
    if noise is None:
        noise = list(coordinated_noise(plan, num_per_block, seed, channels=stages[0].channels, height=size[0], width=size[1]))
    launched = iter(range(10**9))
    denoiser = Denoiser(
        stages[0], links[0], schedule, samplers, iter(noise),
        is_stopped=lambda: stop_after is not None and next(launched) >= stop_after,
        on_step=done.append, on_block=lambda b, x: blocks.update({b: x.cpu()}), spans=SpanLog("stage 0", lambda _: None),
        saver=saver, looks=looks, trips={ring: TextTrips(shape, schedule, conditions, ring) for ring in grid.rings},
        say=lambda text: stages[0].embed_text(texts[text][0]),
        ghost=None if ghost is None else Ghost(ghost, seed, samplers.sigmas, is_clean=stages[0].has_token_times),
    )  # fmt: skip
    if resume is not None:
        denoiser.restore(resume)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            spans = SpanLog(grid.names[rank], lambda _: None)
            start = resume.next_index if resume else 0
            trips = TextTrips(shape, schedule, conditions, grid.ring_of(rank))
            run_stage(stages[rank], links[rank], schedule, spans, trips, start=start)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, grid.ranks)]
    for thread in threads:
        thread.start()
    try:
        finished = denoiser.run()
    finally:
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not errors, errors
        assert not any(thread.is_alive() for thread in threads)
        assert all(channel.empty() for channel in channels.values()), "a message was sent that nobody expected"
    assert may_end or finished == (stop_after is None or stop_after >= len(schedule.items))
    assert (not denoiser._ends.tails and not denoiser._ends.heads) or not finished, "context was kept that nobody asked for"
    for stage in stages:
        if finished:
            assert not any(cross._key_values for crosses in stage._crosses for cross in crosses), "K and V of a text were kept"
            assert all(len(heard) == len(conditions[0].texts) for heard in stage._texts), "a text was kept"
        stage.end()
    return blocks
