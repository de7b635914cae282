"""Rank 0: owns latents, noise and samplers, walks the schedule, hands finished blocks on.

`Denoiser` runs one job over stage 0 and the other ranks; it knows nothing of queues and processes, and what ranks make of a
block step is the affair of `Rings`. At most twice as many block steps as a ring has stages are under way at once: enough to
keep every stage busy, few enough that finished blocks leave at once and buffers stay small.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from dualparal.errors import NotFinite
from dualparal.method.borders import Border, Ends, borders
from dualparal.method.noise import CoordinatedNoise, Ghost
from dualparal.method.sampler import BlockSampler, SamplerFactory
from dualparal.method.schedule import Item, Schedule
from dualparal.ring.rings import Rings, Trips
from dualparal.ring.saved_sweeps import StateWriter, SweepState
from dualparal.ring.stage_loop import RunsItems, SpanLog
from dualparal.ring.transport import STOP, TURN, Links


class SeesSteps(Protocol):
    """Is shown each block's sampler after every step; `looks.Looks` is one."""

    def see(self, block: int, steps_done: int, sampler: BlockSampler) -> None: ...


class Denoiser:
    """One job on rank 0. `run` returns True when all items were run, False when stopped or turning; it raises `NotFinite`."""

    def __init__(
        self,
        stage: RunsItems,
        links: Links,
        schedule: Schedule,
        samplers: SamplerFactory,
        noise: Iterator[torch.Tensor],
        *,
        is_stopped: Callable[[], bool],
        on_step: Callable[[Item], None],
        on_block: Callable[[int, torch.Tensor], None],
        spans: SpanLog,
        saver: StateWriter | None = None,
        looks: SeesSteps | None = None,
        trips: Trips | None = None,
        say: Callable[[int], torch.Tensor] | None = None,
        turns: Callable[[Item], bool] = lambda item: False,
        ghost: Ghost | None = None,
        rest: Border | None = None,
    ) -> None:
        """`noise` yields each block's initial latents in order. `on_step` is told of every block step done, `on_block` gets
        each finished block's latents [1, C, F, h, w] float32, `saver` finished blocks and sweep borders. `trips` are those of
        texts that are not announced, and `say` gives one as it travels. `turns` is asked before every block step whether from
        there on another schedule is followed. `ghost` is what the plan has before block 0. At `rest` the state is saved, and
        `run` ends as if stopped."""
        self.is_turning = False  # `run` has returned for that
        self._turns = turns
        self._looks, self._ghost = looks, ghost
        self._schedule = schedule
        self._new_sampler, self._noise = functools.partial(samplers.new, schedule.max_order), noise
        self._device = samplers.timesteps.device
        self._is_stopped, self._on_step, self._on_block, self._spans = is_stopped, on_step, on_block, spans
        self._latents: dict[int, torch.Tensor] = {}  # of the blocks in flight
        self._samplers: dict[int, BlockSampler] = {}
        self._version: dict[int, int] = {}  # steps done by each block
        self._ends: Ends[torch.Tensor] = Ends(schedule)
        self._rings = Rings(stage, links, schedule, self._device, spans, trips, say)
        self._to_skip: dict[int, deque[Item]] = defaultdict(deque)  # skipped steps by block, until the block is there
        self._saver, self._rest = saver, rest
        self._to_save: Border | None = None  # under way
        self._error: NotFinite | None = None
        self.next_index = 0  # the item that `run` begins with
        self._num_done = 0  # block steps
        self._border_after = {border.last.index: border for border in borders(schedule)}

    def restore(self, state: SweepState) -> None:
        """Go on from a saved border instead of from the start; the finished blocks before it are the caller's business."""
        self.next_index = state.next_index
        before = self._schedule.items[: state.next_index]
        self._num_done = sum(item.is_whole for item in before)
        done = {item.block for item in before}
        for block in sorted(done):
            if isinstance(self._noise, CoordinatedNoise):  # so that the blocks still to come get theirs
                self._noise.skip()
            else:
                next(self._noise)
            self._version[block] = self._schedule.num_steps
            if block in state.latents:
                self._latents[block] = state.latents[block].to(self._device)
                self._samplers[block] = self._new_sampler()
                self._samplers[block].restore(state.counts[block], state.samplers[block])
                self._version[block] = state.counts[block]["step"]
        tails, heads = ({key: x.to(self._device) for key, x in ends.items()} for ends in (state.tails, state.heads))
        self._ends.follow(self._schedule, tails, heads)

    def turn(self, schedule: Schedule, trips: Trips) -> None:
        """Go on where `run` turned, by another schedule, which agrees with the present one so far, as the noise does from here
        on; all else as in the constructor."""
        self._schedule = schedule
        self._rings.follow(schedule, trips)
        self._ends.follow(schedule, self._ends.tails, self._ends.heads)
        self._border_after = {border.last.index: border for border in borders(schedule)}
        self.is_turning = False

    def run(self) -> bool:
        """Walk the schedule. However it ends, no posted receive is left unmatched.

        Raises `NotFinite` for a prediction that is not made of numbers, when all ranks have left the job.
        """
        finished = self._walk()
        if self._error is not None:
            raise self._error
        return finished

    def _walk(self) -> bool:
        for item in self._schedule.items[self.next_index :]:
            if self._rings.has_left(item):
                self._begin_save(item)
                continue
            is_resting = self._rest is not None and item.index == self._rest.next_index
            if is_resting or self._is_stopped() or self._error is not None:
                self._rings.end(item.index, STOP)
                self._drain()
                return False
            if item.is_skipped:
                self._to_skip[item.block].append(item)
                self._extrapolate(item.block)
                continue
            if item.half != 1 and self._turns(item):
                self._rings.end(item.index, TURN)
                self._drain()
                self.next_index, self.is_turning = item.index, True
                return False
            if item.block not in self._latents:
                self._enter(item.block)
            while self._version[item.block] < item.step or not self._has_context(item) or self._rings.is_full:
                self._take_prediction()
            prediction = self._rings.start(item, self._window(item))
            self._begin_save(item)
            if prediction is not None:
                self._apply(item, prediction)
        self._drain()
        return True

    def _begin_save(self, item: Item) -> None:
        """Choose `item`'s border to be saved, once its prediction has been applied."""
        border = self._border_after.get(item.index)
        if self._saver is not None and self._rest is not None and border == self._rest:
            self._to_save = border  # whatever was to be saved before it
        elif self._saver is not None and border is not None and self._to_save is None and self._saver.wants_sweep():
            self._to_save = border

    def _enter(self, block: int) -> None:
        self._latents[block] = next(self._noise).to(self._device, torch.float32)
        self._samplers[block] = self._new_sampler()
        self._version[block] = 0
        self._record(block)

    def _has_context(self, item: Item) -> bool:
        left = item.left_version is None or item.block == 0 or (item.block - 1, item.left_version) in self._ends.tails
        right = item.right_version is None or (item.block + 1, item.right_version) in self._ends.heads
        return left and right

    def _window(self, item: Item) -> torch.Tensor:
        """[left context | own | right latents] along time, float32."""
        parts = [self._latents[item.block]]
        if item.left_version is not None:
            parts.insert(0, self._left(item.block - 1, item.left_version))
        if item.right_version is not None:
            parts.append(self._ends.heads[item.block + 1, item.right_version])
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _left(self, block: int, version: int) -> torch.Tensor:
        if block >= 0:
            return self._ends.tails[block, version]
        assert self._ghost is not None
        return self._ghost.seen_at(version).to(self._device)

    def _take_prediction(self) -> None:
        item, prediction = self._rings.take()
        self._apply(item, prediction)
        self._extrapolate(item.block)

    def _extrapolate(self, block: int) -> None:
        """Do the skipped steps that the block has come to. They overtake other blocks' predictions, so that no stage waits for
        them; `borders` knows."""
        while self._to_skip[block] and self._to_skip[block][0].step == self._version[block]:
            item = self._to_skip[block].popleft()
            with torch.inference_mode():
                prediction = self._samplers[block].predict()
            self._apply(item, prediction)

    def _drain(self) -> None:
        while not self._rings.is_empty:
            self._take_prediction()
        self._rings.flush()
        self._spans.flush()

    def _apply(self, item: Item, prediction: torch.Tensor) -> None:
        """Step the block's own sampler; a finished block leaves."""
        block = item.block
        with torch.inference_mode():
            self._check(item, prediction)
            if not item.is_skipped:
                self._samplers[block].record(prediction, item.mode)
            self._latents[block] = self._samplers[block].step(prediction, self._latents[block])
        self._version[block] = item.step + 1
        self._record(block)
        if self._looks is not None and self._error is None:
            self._looks.see(block, item.step + 1, self._samplers[block])
        self._on_step(item)
        self._ends.release(item)
        if item.step + 1 == self._schedule.num_steps:
            del self._samplers[block]
            latents = self._latents.pop(block)
            if self._error is None:
                if self._saver is not None:
                    self._saver.save_block(block, latents)
                self._on_block(block, latents)
        self._num_done += 1
        border = self._to_save
        if self._saver is not None and border is not None and border.num_done == self._num_done and self._error is None:
            self._saver.save_sweep(self._snapshot(border))
            self._to_save = None

    def _check(self, item: Item, prediction: torch.Tensor) -> None:
        """One reduction: a sum of numbers of any use is finite, and one NaN or infinity spoils it."""
        if self._error is None and not math.isfinite(float(prediction.sum())):
            self._error = NotFinite(
                f"the model's prediction for block {item.block} at step {item.step} has NaN or infinite numbers: try "
                "--dtype float32 or bfloat16, leave out --quantization, --attention and --lora, or download the model again"
            )

    def _snapshot(self, border: Border) -> SweepState:
        """The state at `border`. All there is is as old as the border, but for blocks that have entered since; they enter
        again."""
        blocks = [block for block in self._latents if self._version[block] > 0]
        states = {block: self._samplers[block].state() for block in blocks}
        return SweepState(
            next_index=border.next_index,
            num_finished=sum(version == self._schedule.num_steps for version in self._version.values()),
            latents={block: self._latents[block] for block in blocks},
            counts={block: counts for block, (counts, _) in states.items()},
            samplers={block: tensors for block, (_, tensors) in states.items()},
            tails={key: x for key, x in self._ends.tails.items() if self._version[key[0]] > 0},
            heads={key: x for key, x in self._ends.heads.items() if self._version[key[0]] > 0},
            sweep=border.last.sweep,
        )

    def _record(self, block: int) -> None:
        """Keep the ends of the block that later items will ask for at this version."""
        latents = self._latents[block]
        self._ends.record(block, self._version[block], lambda frames: latents[:, :, frames].clone())
