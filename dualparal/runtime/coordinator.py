"""Rank 0: owns latents, noise and samplers, walks the schedule, hands finished blocks on.

`Denoiser` runs one job over stage 0 and the ring; it knows nothing of queues and processes. At most `2 * ranks` block steps
are under way at once: enough to keep every stage busy, few enough that finished blocks leave at once and buffers stay small.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dualparal.core.sampler import BlockSampler, SamplerFactory
from dualparal.core.schedule import Item, Schedule
from dualparal.model.stage import Tails
from dualparal.runtime.stage_worker import RunsItems, SpanLog
from dualparal.runtime.state import StateWriter, SweepState
from dualparal.runtime.transport import GO, SAVE, STOP, Links, pack


class Denoiser:
    """One job on rank 0. `run` returns True when all items were run, False when stopped."""

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
    ) -> None:
        """`noise` yields each block's initial latents in order. `on_step` is told of every block step done, `on_block` gets
        each finished block's latents [1, C, F, h, w] float32, `saver` finished blocks and sweep borders."""
        self._stage, self._links, self._schedule = stage, links, schedule
        self._new_sampler, self._noise = functools.partial(samplers.new, schedule.max_order), noise
        self._device = samplers.timesteps.device
        self._is_stopped, self._on_step, self._on_block, self._spans = is_stopped, on_step, on_block, spans
        self._latents: dict[int, torch.Tensor] = {}  # of the blocks in flight
        self._samplers: dict[int, BlockSampler] = {}
        self._version: dict[int, int] = {}  # steps done by each block
        # Tapes: what later items will see of a neighbour, by (block, version).
        self._tails: dict[tuple[int, int], torch.Tensor] = {}
        self._heads: dict[tuple[int, int], torch.Tensor] = {}
        self._under_way: deque[Item] = deque()
        self._to_skip: dict[int, deque[Item]] = defaultdict(deque)  # skipped steps by block, until the block is there
        self._saver = saver
        self._to_save: dict[int, Tails] = {}  # borders under way, by block steps done: what stage 0 held after the last item
        self._start = 0
        self._num_done = 0  # block steps
        self._borders = {border.num_done: border for border in _borders(schedule)}
        self._border_after = {border.last.index: border for border in self._borders.values()}

    def restore(self, state: SweepState) -> None:
        """Go on from a saved border instead of from the start; the finished blocks before it are the caller's business."""
        self._start = state.next_index
        before = self._schedule.items[: state.next_index]
        self._num_done = sum(item.is_whole for item in before)
        done = {item.block for item in before}
        for block in sorted(done):
            noise = next(self._noise)  # replayed, so that the blocks still to come get theirs
            del noise
            self._version[block] = self._schedule.num_steps
            if block in state.latents:
                self._latents[block] = state.latents[block].to(self._device)
                self._samplers[block] = self._new_sampler()
                self._samplers[block].restore(state.counts[block], state.samplers[block])
                self._version[block] = state.counts[block]["step"]
        self._tails = {key: x.to(self._device) for key, x in state.tails.items()}
        self._heads = {key: x.to(self._device) for key, x in state.heads.items()}

    def run(self) -> bool:
        """Walk the schedule. However it ends, no posted receive is left unmatched."""
        most = 2 * self._links.ranks
        for item in self._schedule.items[self._start :]:
            if self._is_stopped():
                self._send_stop(item)
                self._drain()
                return False
            if item.is_skipped:
                self._to_skip[item.block].append(item)
                self._extrapolate(item.block)
                continue
            if item.block not in self._latents:
                self._enter(item.block)
            while self._version[item.block] < item.step or not self._has_context(item) or len(self._under_way) >= most:
                self._take_prediction()
            window = self._window(item)
            with self._spans.working(item):
                out = self._stage.run(item, window)
            signal = self._begin_save(item)
            if self._links.outgoing is not None:
                assert out is not None
                self._links.outgoing.send(pack(out, signal))
                self._expect(item)
            elif out is not None:
                self._apply(item, out)
        self._drain()
        return True

    def _begin_save(self, item: Item) -> float:
        """Choose `item`'s border to be saved, once its prediction has been applied; the signal for the other stages."""
        saver, border = self._saver, self._border_after.get(item.index)
        if saver is None or border is None or self._to_save:
            return GO
        if not saver.wants_sweep(self._stage.tail_bytes() if saver.keeps_caches else 0):
            return GO
        self._to_save[border.num_done] = self._stage.tails() if saver.keeps_caches else {}
        return SAVE if saver.keeps_caches else GO

    def _enter(self, block: int) -> None:
        self._latents[block] = next(self._noise).to(self._device, torch.float32)
        self._samplers[block] = self._new_sampler()
        self._version[block] = 0
        self._record(block)

    def _has_context(self, item: Item) -> bool:
        left = item.left_version is None or (item.block - 1, item.left_version) in self._tails
        right = item.right_version is None or (item.block + 1, item.right_version) in self._heads
        return left and right

    def _window(self, item: Item) -> torch.Tensor:
        """[left context | own | right latents] along time, float32."""
        parts = [self._latents[item.block]]
        if item.left_version is not None:
            key = (item.block - 1, item.left_version)
            parts.insert(0, self._tails[key])
        if item.right_version is not None:
            key = (item.block + 1, item.right_version)
            parts.append(self._heads[key])
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _expect(self, item: Item) -> None:
        """Post the receive of the item's prediction; the first of two guidance halves has none."""
        assert self._links.incoming is not None
        if not item.is_whole:
            return
        size = torch.Size(self._stage.prediction_shape(item)).numel()
        self._links.incoming.post(size + 1, torch.float32)
        self._under_way.append(item)

    def _take_prediction(self) -> None:
        assert self._links.incoming is not None
        item = self._under_way.popleft()
        message = self._links.incoming.take()
        self._apply(item, message[:-1].view(self._stage.prediction_shape(item)))
        self._extrapolate(item.block)

    def _extrapolate(self, block: int) -> None:
        """Do the skipped steps that the block has come to. They overtake other blocks' predictions, so that no stage waits for
        them; `_borders` knows."""
        while self._to_skip[block] and self._to_skip[block][0].step == self._version[block]:
            item = self._to_skip[block].popleft()
            with torch.inference_mode():
                prediction = self._samplers[block].predict()
            self._apply(item, prediction)

    def _drain(self) -> None:
        while self._under_way:
            self._take_prediction()
        if self._links.outgoing is not None:
            self._links.outgoing.flush()
        self._spans.flush()

    def _send_stop(self, item: Item) -> None:
        """Every rank leaves at `item`, or the next one that makes the trip: the message has the size it would have had, so that
        posted receives match."""
        if self._links.outgoing is not None:
            awaited = next(later for later in self._schedule.items[item.index :] if not later.is_skipped)
            size = torch.Size(self._stage.hidden_shape(awaited)).numel()
            nothing = torch.zeros(size, dtype=self._stage.dtype, device=self._device)
            self._links.outgoing.send(pack(nothing, STOP))

    def _apply(self, item: Item, prediction: torch.Tensor) -> None:
        """Step the block's own sampler; a finished block leaves."""
        block = item.block
        with torch.inference_mode():
            if not item.is_skipped:
                self._samplers[block].note(prediction, item.mode)
            self._latents[block] = self._samplers[block].step(prediction, self._latents[block])
        self._version[block] = item.step + 1
        self._record(block)
        self._on_step(item)
        self._release(item)
        if item.step + 1 == self._schedule.num_steps:
            del self._samplers[block]
            latents = self._latents.pop(block)
            if self._saver is not None:
                self._saver.save_block(block, latents)
            self._on_block(block, latents)
        self._num_done += 1
        if self._saver is not None and (caches := self._to_save.pop(self._num_done, None)) is not None:
            self._saver.save_sweep(self._snapshot(self._borders[self._num_done], caches))

    def _release(self, item: Item) -> None:
        """Drop the ends that no item after `item` will see. Now, not when it was sent: a border saved meanwhile needs them."""
        for tape, uses, neighbour, version in (
            (self._tails, self._schedule.last_left_use, item.block - 1, item.left_version),
            (self._heads, self._schedule.last_right_use, item.block + 1, item.right_version),
        ):
            if version is not None and uses[neighbour, version] <= item.index:
                del tape[neighbour, version]

    def _snapshot(self, border: Border, caches: Tails) -> SweepState:
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
            tails={key: x for key, x in self._tails.items() if self._version[key[0]] > 0},
            heads={key: x for key, x in self._heads.items() if self._version[key[0]] > 0},
            sweep=border.last.sweep,
            caches=caches,
        )

    def _record(self, block: int) -> None:
        """Keep the ends of the block that later items will ask for at this version."""
        plan, key = self._schedule.plan, (block, self._version[block])
        if key in self._schedule.last_left_use:
            self._tails[key] = self._latents[block][:, :, -min(plan.num_cat, plan.lengths[block]) :].clone()
        if key in self._schedule.last_right_use:
            self._heads[key] = self._latents[block][:, :, : plan.num_kept(block)].clone()


@dataclass(frozen=True)
class Border:
    """A sweep's end where the state can be saved: `num_done` block steps are done, item `next_index` comes next, `last` was the
    last one that made the trip."""

    num_done: int
    next_index: int
    last: Item


def _borders(schedule: Schedule) -> Iterator[Border]:
    """Every border of `schedule`, in order.

    Predictions are applied in schedule order, but skipped steps as soon as their block is there. So after the last step of a
    sweep every block is at the border if the next sweep skips nothing: its predictions come back behind all that are awaited.
    """
    skipping = {item.sweep for item in schedule.items if item.is_skipped}
    num_done, last = 0, schedule.items[0]
    for item, after in itertools.pairwise(schedule.items):
        num_done += item.is_whole
        last = last if item.is_skipped else item
        if item.sweep != after.sweep and after.sweep not in skipping:
            yield Border(num_done, after.index, last)


def supplied_noise(blocks: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """The caller's own initial latents, block by block."""
    return itertools.chain(blocks)
