"""What rank 0 and the codec do of one job, without a model: the real schedule, the real messages, a real video of a ball.

`fake_group` says when; see there. Knows no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from dualparal.events import BlockReady, Progress, Started, Steered, WrappedUp
from dualparal.files import END_LATENTS, STEERED, write_record
from dualparal.media.writer import Segment, VideoWriter
from dualparal.messages import TOO_LATE, Finish, RunJob, Span, Spans, Steer, SteerAnswer, VideoClosed
from dualparal.method.endless import extended, wrapped_up
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Item, make_schedule
from dualparal.method.timeline import steered
from dualparal.model.source import find_checkpoint
from dualparal.request import Settings

TELL_EVERY_S = 0.2


class JobUnderWay:
    """What rank 0 and the codec do and tell of one job; a stage of `ranks` works on every block step all along."""

    def __init__(self, run: RunJob, ranks: int, say: Callable[[object], None]) -> None:
        request = run.request
        self.run, self.has_failed, self._ranks, self._say = run, False, ranks, say
        self.plan = plan_of(request)
        self.items = make_schedule(rules_of(request), self.plan, (0,) * request.num_inference_steps).items
        self._steps = [0] * self.plan.num_blocks
        self._num_items = self.plan.num_blocks * request.num_inference_steps
        self._writer = QuickWriter(
            Path(run.folder), width=request.width, height=request.height, fps=request.fps, export_images=run.export_images,
            num_frames_before=request.num_frames_before,
        )  # fmt: skip
        self._began_s, self._reported_s, self._spans = time.monotonic(), 0.0, list[Span]()
        self._timings = dict.fromkeys(("text_s", "denoise_s", "decode_s", "encode_s"), 0.0)
        say(
            Started(
                job_id=run.job_id, num_blocks=self.plan.num_blocks, num_items=self._num_items, num_frames=request.num_frames
            )
        )
        self._spent("text", self._began_s)

    @property
    def num_made(self) -> int:
        """Finished blocks."""
        return len(self._writer.segments)

    @property
    def first_steps(self) -> int:
        """Steps that the first block has done."""
        return self._steps[0]

    def step(self, item: Item, item_s: float) -> bool:
        """Run `item` for so long; whether its block is denoised."""
        began_s = time.monotonic()
        if item_s and not item.is_skipped:
            time.sleep(item_s)
        self._timings["denoise_s"] += time.monotonic() - began_s
        for rank in range(self._ranks):
            self._spans.append(Span(f"stage {rank}", began_s, time.monotonic(), item.block, item.step))
        if not item.is_whole:
            return False
        self._steps[item.block] = item.step + 1
        is_last = self._steps[item.block] == self.run.request.num_inference_steps
        if is_last or time.monotonic() - self._reported_s > TELL_EVERY_S:
            self._tell()
        return is_last

    def steer(self, wish: Steer, place: int) -> None:
        """Go on as it says from the next block on that no item before `place` is of."""
        block = 1 + max((item.block for item in self.items[:place]), default=-1)
        if block == self.plan.num_blocks:
            self._say(SteerAnswer(wish.job_id, wish.number, refusal=TOO_LATE))
            return
        self._steps = self._steps[:block]
        self._follow(request := steered(self.run.request, self.plan, block, wish.shot), block)
        assert request.shots is not None
        told = Steered(
            job_id=wish.job_id, block=block, prompt=wish.shot.prompt, transition=request.shots[-1].transition,
            from_s=self.plan.frames(block).start / request.fps, num_blocks=self.plan.num_blocks, num_items=self._num_items,
            num_frames=self.plan.num_frames,
        )  # fmt: skip
        self._say(SteerAnswer(wish.job_id, wish.number, told, request))

    def look_ahead(self, item: Item) -> None:
        """Plan an endless film further before the last planned block enters."""
        if self.run.request.is_endless and item.block + 1 == self.plan.num_blocks and item.step == 0:
            self._follow(extended(self.run.request, self.plan), self.plan.num_blocks)
            self._say(SteerAnswer(self.run.job_id, 0, timeline=self.run.request))

    def wrap_up(self, wish: Finish, place: int) -> None:
        """End the film with the blocks that items before `place` are of."""
        block = 1 + max((item.block for item in self.items[:place]), default=-1)
        self._follow(wrapped_up(self.run.request, self.plan, block), self.plan.num_blocks)
        told = WrappedUp(
            job_id=wish.job_id, num_blocks=self.plan.num_blocks, num_items=self._num_items, num_frames=self.plan.num_frames
        )
        self._say(SteerAnswer(wish.job_id, wish.number, told, self.run.request))

    def _follow(self, request: Settings, num_known: int) -> None:
        self.run, self.plan = replace(self.run, request=request), plan_of(request)
        self.items = make_schedule(rules_of(request), self.plan, (0,) * request.num_inference_steps).items
        self._steps = [*self._steps, *[0] * max(0, self.plan.num_blocks - num_known)][: self.plan.num_blocks]
        self._num_items = self.plan.num_blocks * request.num_inference_steps
        write_record(Path(self.run.folder) / STEERED, {"request": request.model_dump(exclude_none=True)})

    def add_block(self, block: int) -> None:
        """Write the block's segment, or find it from the run before."""
        began_s, request, frames = time.monotonic(), self.run.request, self.plan.frames(block)
        pictures = bouncing_ball(frames, request.height, request.width)
        self._spent("decode", began_s, block)
        began_s = time.monotonic()
        known = self._writer.adopt_block(pictures) if self.run.is_resumed else None
        segment = known or self._writer.add_block(pictures)
        self._spent("encode", began_s, block)
        self._say(
            BlockReady(
                job_id=self.run.job_id, block=block, path=str(segment.path), first_frame=segment.first_frame,
                num_frames=segment.num_frames, duration_s=segment.duration_s, checksum=segment.checksum,
            )
        )  # fmt: skip

    def close(self, is_stopped: bool) -> VideoClosed:
        """Join the blocks."""
        began_s = time.monotonic()
        path = self._writer.finish(self.run.request.to_json())
        self._spent("encode", began_s, self.plan.num_blocks - 1)
        if path:
            self._keep_end()
        self._tell_spans()
        return VideoClosed(
            self.run.job_id, is_stopped, str(path) if path else None, self._writer.num_frames, dict(self._timings), None
        )

    def _keep_end(self) -> None:
        request, file = self.run.request, Path(self.run.folder) / END_LATENTS
        file.parent.mkdir(exist_ok=True)
        channels, pixels = find_checkpoint("pocket").latent_sizes
        latents = np.zeros((1, channels, 2, request.height // pixels, request.width // pixels), np.float32)
        save_file({"latents": latents}, file, {"num_frames": str(self._writer.num_frames)})

    def _spent(self, what: str, began_s: float, block: int = 0) -> None:
        now_s = time.monotonic()
        self._timings[f"{what}_s"] += now_s - began_s
        self._spans.append(Span(what, began_s, now_s, block, 0))

    def _tell(self) -> None:
        self._tell_spans()
        self._reported_s, done = time.monotonic(), sum(self._steps)
        self._say(
            Progress(
                job_id=self.run.job_id, items_done=done, num_items=self._num_items,
                num_steps=self.run.request.num_inference_steps, block_steps=tuple(self._steps),
                eta_s=(self._reported_s - self._began_s) / done * (self._num_items - done),
            )
        )  # fmt: skip

    def _tell_spans(self) -> None:
        self._say(Spans(self.run.job_id, tuple(self._spans)))
        self._spans.clear()


class QuickWriter(VideoWriter):
    """The codec's writer, which encodes the same frames only once: they give the same bytes."""

    _known: ClassVar[dict[tuple[Any, ...], bytes]] = {}

    def _encode(self, frames: np.ndarray, segment: Segment) -> bytes:
        key = (frames.shape, self.fps, segment.first_frame)
        if key not in self._known:
            self._known[key] = super()._encode(frames, segment)
        return self._known[key]


def bouncing_ball(frames: range, height: int, width: int) -> np.ndarray:
    """These frames of the only video that is made here, uint8 [frames, height, width, 3]."""
    frame, y, x = np.ogrid[frames.start : frames.stop, :height, :width]
    across, down = width * (0.5 + 0.36 * np.sin(frame / 9)), height * (0.78 - 0.5 * abs(np.sin(frame / 6)))
    is_ball = np.hypot(x - across, y - down) < 0.13 * height
    return np.where(is_ball[..., None], np.uint8([235, 180, 90]), np.uint8([25, 40, 75]))
