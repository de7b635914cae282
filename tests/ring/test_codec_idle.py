"""The codec with nothing to do (fitting the map of early looks takes the decoder, if nothing of a video is in it) and with too
much."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dualparal.messages import CloseVideo, DecodeBlock, OpenVideo, RunJob, Shutdown
from dualparal.ring import codec_process
from dualparal.ring.codec_process import MOST_LOOKED_AT, Codec
from tests.settings import settings


class Decoder:
    """Gives a frame less for the first latent after `begin`, as the real one does."""

    on_frame = staticmethod(lambda: None)
    is_first = True

    def begin(self) -> None:
        self.is_first = True

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        num_frames = 4 * latents.shape[2] - 3 * self.is_first
        self.is_first = False
        return torch.zeros(1, 3, num_frames, 32, 32)


@pytest.mark.parametrize(("before", "num_frames", "is_fitted"), [(None, 5, True), (np.zeros((1, 4, 3, 4, 4)), 8, False)])
def test_a_film_that_goes_on_keeps_what_it_goes_on_from(
    before: Any, num_frames: int, is_fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_process, "IDLE_S", 0.01)
    inbox: queue.Queue[Any] = queue.Queue()
    fitted = threading.Event()
    sent: list[Any] = []

    def fit(decoder: Decoder) -> None:
        decoder.begin()
        fitted.set()

    run = RunJob("abcdef", settings(latents_num=2, height=32, width=32, fps=16), str(tmp_path))
    parts: list[Any] = [None, Decoder(), SimpleNamespace(send=sent.append), inbox, queue.Queue(), SimpleNamespace(fit=fit)]
    inbox.put(OpenVideo(run, 32, 32, None if before is None else before.astype(np.float32)))
    codec = threading.Thread(target=Codec(*parts).serve)
    codec.start()
    assert fitted.wait(60 if is_fitted else 0.5) is is_fitted
    for message in (
        DecodeBlock("abcdef", 0, np.zeros((1, 4, 2, 4, 4), np.float32)),
        CloseVideo("abcdef", False, {}),
        Shutdown(),
    ):
        inbox.put(message)
    codec.join(60)
    closed = next(one for one in sent if type(one).__name__ == "VideoClosed")
    assert closed.num_frames == num_frames


def test_blocks_that_wait_to_be_decoded_stay_where_they_hold_rank_0_back(tmp_path: Path) -> None:
    inbox: queue.Queue[Any] = queue.Queue(20)
    may_go_on, begun = threading.Event(), threading.Event()

    class Slow(Decoder):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert may_go_on.wait(60)
            return super().decode(latents)

    run = RunJob("abcdef", settings(latents_num=40, height=32, width=32, fps=16), str(tmp_path))
    parts: list[Any] = [None, Slow(), SimpleNamespace(send=lambda _: None), inbox, queue.Queue()]
    codec = threading.Thread(target=Codec(*parts).serve)
    inbox.put(OpenVideo(run, 32, 32))
    block = np.zeros((1, 4, 1, 4, 4), np.float32)
    for num_taken in range(19):
        inbox.put(DecodeBlock("abcdef", num_taken, block))
    codec.start()
    num_taken = 19
    with pytest.raises(queue.Full):
        while True:
            inbox.put(DecodeBlock("abcdef", num_taken, block), timeout=1)
            num_taken += 1
    assert begun.is_set() and 20 < num_taken <= 1 + MOST_LOOKED_AT + 20, "under way, looked at, in the queue"
    may_go_on.set()
    for message in (CloseVideo("abcdef", False, {}), Shutdown()):
        inbox.put(message, timeout=60)
    codec.join(60)
    assert not codec.is_alive() and len(list(tmp_path.glob("block_*.ts"))) == num_taken
