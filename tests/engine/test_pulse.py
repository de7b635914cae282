"""Hangs that no process's end tells of: silence, and one step that never ends."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dualparal.engine.pulse import SILENCE_S, Pulse
from dualparal.messages import Beat, CloseVideo, DecodeBlock, EncodeText, OpenVideo, RunJob, Shutdown
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules, make_schedule
from dualparal.network import LOST_AFTER_S
from dualparal.ring import worker
from dualparal.ring.codec_process import Codec
from dualparal.ring.stage_loop import SpanLog
from tests.settings import settings


def heard(*names: str) -> Pulse:
    pulse = Pulse(0.0, timeout_s=600.0)
    for name in names:
        pulse.hear(name)
    return pulse


def look_until(pulse: Pulse, start_s: float, end_s: float, *beating: str) -> None:
    for second in range(int(start_s) + 1, int(end_s) + 1):
        pulse.look(float(second))
        for name in beating:
            pulse.take(Beat(name))


def test_a_silent_worker_is_named_within_seconds() -> None:
    pulse = heard("rank 0", "codec")
    look_until(pulse, 0, SILENCE_S, "rank 0")
    assert pulse.fault(loading=()) is None
    look_until(pulse, SILENCE_S, SILENCE_S + 1, "rank 0")
    assert pulse.fault(loading=()) == "codec has not answered for 20 s"
    assert pulse.fault(loading={"codec"}) is None
    pulse.take(Beat("codec"))
    assert pulse.fault(loading=()) is None


def test_a_worker_on_another_host_is_left_the_time_in_which_its_connection_is_found_to_be_lost() -> None:
    pulse = Pulse(0.0, timeout_s=600.0, far=["rank 1"])
    for name in ("rank 0", "rank 1"):
        pulse.hear(name)
    look_until(pulse, 0, SILENCE_S + LOST_AFTER_S, "rank 0")
    assert pulse.fault(loading=()) is None
    look_until(pulse, SILENCE_S + LOST_AFTER_S, SILENCE_S + LOST_AFTER_S + 2, "rank 0")
    assert pulse.fault(loading=()) == f"rank 1 has not answered for {SILENCE_S + LOST_AFTER_S:.0f} s"


def test_all_workers_silent_at_once_are_not_taken_for_a_sleep_of_this_process() -> None:
    pulse = heard("rank 0", "codec")
    look_until(pulse, 0, SILENCE_S + 1)
    assert pulse.fault(loading=()) == "rank 0 has not answered for 20 s"


def test_of_several_late_ones_the_latest_is_named() -> None:
    pulse = heard("rank 0", "codec")
    look_until(pulse, 0, 5, "rank 0")
    look_until(pulse, 5, 5 + SILENCE_S)
    pulse.look(5 + SILENCE_S + 1)
    assert pulse.fault(loading=()) == "codec has not answered for 20 s"


def test_a_sleep_of_this_process_is_nobodys_silence() -> None:
    pulse = heard("rank 0")
    look_until(pulse, 0, 5, "rank 0")
    pulse.look(5000.0)
    assert pulse.fault(loading=()) is None
    look_until(pulse, 5000, 5000 + SILENCE_S)
    assert pulse.fault(loading=()) == "rank 0 has not answered for 20 s"


def test_one_step_for_too_long() -> None:
    pulse = heard("rank 0", "codec")
    pulse.take(Beat("rank 0", step="step 3 of block 1", busy_s=600.0))
    assert pulse.fault(loading=()) is None
    pulse.take(Beat("rank 0", step="step 3 of block 1", busy_s=601.0))
    sentence = "rank 0 has been at one step for 600 s (step 3 of block 1), the engine's timeout_s"
    assert pulse.fault(loading=()) == sentence
    pulse.take(Beat("rank 0", step="step 4 of block 1", busy_s=0.0))
    assert pulse.fault(loading=()) is None
    assert pulse.beats["rank 0"].step == "step 4 of block 1"


# The worker's side


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[queue.Queue[Beat]]:
    """What this process tells, beating fast; the thread ends with the test."""
    monkeypatch.setattr(worker, "BEAT_INTERVAL_S", 0.002)
    worker.working_at(None)  # whatever another test of this process has begun
    reported: queue.Queue[Beat] = queue.Queue()
    is_over = threading.Event()

    class OverError(Exception):
        pass

    def send(beat: Beat) -> None:
        if is_over.is_set():
            raise OverError
        reported.put(beat)

    def run() -> None:
        with contextlib.suppress(OverError):
            worker._beat(SimpleNamespace(name="codec", send=send))  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    yield reported
    is_over.set()
    thread.join()
    worker.working_at(None)


def next_beat(reported: queue.Queue[Beat], step: str, busy_beats: int) -> Beat:
    """The first that tells of `step` for so many intervals."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        beat = reported.get(timeout=20)
        if beat.step == step and beat.busy_s >= busy_beats * worker.BEAT_INTERVAL_S - 1e-9:
            return beat
    raise AssertionError("no such beat")


def test_a_heartbeat_tells_for_how_long_one_step_has_lasted(beats: queue.Queue[Beat]) -> None:
    assert next_beat(beats, "", 0).busy_s == 0.0
    worker.working_at("decoding block 1")
    before = next_beat(beats, "decoding block 1", 5).busy_s
    assert next_beat(beats, "decoding block 1", 5).busy_s > before
    worker.working_at("decoding block 1")  # the next latent frame
    again = beats.get(timeout=20)
    while again.busy_s > before:
        again = beats.get(timeout=20)
    assert again.step == "decoding block 1"
    worker.working_at(None)
    assert next_beat(beats, "", 0).busy_s == 0.0
    assert (next_beat(beats, "", 0).resident_bytes or 0) > 2**20


def test_a_stage_marks_its_block_steps() -> None:
    schedule = make_schedule(Rules(), BlockPlan.of(5, 3, 1), (0, 0))
    with SpanLog("stage 0", lambda spans: None).working(schedule.items[0]):
        assert worker._step == ("step 0 of block 0",)
    assert worker._step is None


def test_the_codec_marks_prompts_latent_frames_and_files(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Decoder:
        on_frame = staticmethod(lambda: None)

        def begin(self) -> None:
            pass

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            for _ in range(latents.shape[2]):
                self.on_frame()
                seen.append(worker._step)
            return torch.zeros(1, 3, 1 + 4 * (latents.shape[2] - 1), 32, 32)

    def encode(text: str) -> torch.Tensor:
        seen.append(worker._step)
        return torch.zeros(1, 512, 8)

    def send(message: Any) -> None:
        if type(message).__name__ in ("BlockReady", "VideoClosed"):
            seen.append(worker._step)

    request = settings(latents_num=2, height=32, width=32, fps=16)
    run = RunJob("abcdef", request, str(tmp_path))
    inbox: queue.Queue[Any] = queue.Queue()
    for message in (
        EncodeText("abcdef", ("x",)), OpenVideo(run, 32, 32), DecodeBlock("abcdef", 0, np.zeros((1, 4, 2, 4, 4), np.float32)),
        CloseVideo("abcdef", False, {}), Shutdown(),
    ):  # fmt: skip
        inbox.put(message)
    text = SimpleNamespace(encode=encode, rest=lambda: None, first_lost=lambda *_: None)
    Codec(text, Decoder(), SimpleNamespace(send=send), inbox, queue.Queue()).serve()  # type: ignore[arg-type]
    assert [step and step[0] for step in seen] == [
        "encoding a prompt", "decoding block 0", "decoding block 0", "writing block 0", "joining the video",
    ]  # fmt: skip
    assert seen[1] is not seen[2], "each latent frame is a step of its own"
    assert worker._step is None
