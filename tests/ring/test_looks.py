"""Early looks on rank 0: from x₀, at a few steps of each block, within their share of the time, waited for by nobody, and the
video's bits are what they are without."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dualparal.events import Look
from dualparal.media.rough import pack, unpack
from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules
from dualparal.method.step_cache import StepCache
from dualparal.model.latent_rgb import LatentRgb, store_map
from dualparal.model.layout import Checkpoint
from dualparal.ring import looks as made
from dualparal.ring.looks import AHEAD_S, Looks, MapFinder, looked_at
from tests.conftest import wait_until
from tests.local_ring import denoise_in_threads
from tests.texts import some_texts

CASE: dict[str, Any] = dict(latents_num=14, num_per_block=3, num_cat=2, steps=6)
GREY = LatentRgb(2, torch.full((4, 12), 0.1), torch.zeros(12))


class Waiting(Looks):
    """Is given time for every look, so that none is dropped for another."""

    def see(self, block: int, steps_done: int, sampler: Any) -> None:
        super().see(block, steps_done, sampler)
        assert wait_until(lambda: not self._newest)


@pytest.fixture
def begin() -> Iterator[Callable[..., Looks]]:
    begun: list[Looks] = []

    def make(kind: type[Looks] = Looks, **values: Any) -> Looks:
        begun.append(kind("abcdef", **{"num_steps": 6, "find": lambda: GREY, "max_share": 1e9, **values}))
        return begun[-1]

    yield make
    for looks in begun:
        looks.close()


def clean(value: float, num_frames: int = 3) -> Any:
    """A sampler whose clean latents are all `value`."""
    return SimpleNamespace(clean=torch.full((1, 4, num_frames, 4, 4), value))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 20, 50, 1000])
def test_a_few_steps_are_looked_at(num_steps: int) -> None:
    steps = looked_at(num_steps)
    assert len(steps) <= 8 and all(1 <= step < num_steps for step in steps)
    assert steps >= set(range(1, min(4, num_steps)))
    assert num_steps < 20 or max(steps) > 0.8 * num_steps


def test_clean_latents_are_those_of_the_prediction() -> None:
    """x₀ = x_σ − σ·v, at every step."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    factory = SamplerFactory(config, num_steps=5, flow_shift=3.0, device="cpu")
    sampler, generator = factory.new(), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 2, 3, 3, generator=generator)
    for step in range(5):
        velocity = torch.randn(latents.shape, generator=generator)
        after = sampler.step(velocity, latents)
        assert torch.allclose(sampler.clean, latents - factory._template.sigmas[step] * velocity, atol=1e-6)
        latents = after


@pytest.mark.parametrize(
    "rules", [Rules(), Rules(context="cached"), Rules(step_cache=StepCache(interval=2))], ids=["paper", "cached", "step cache"]
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_no_bit_of_the_video_changes(tiny: Path, begin: Callable[..., Looks], rules: Rules, ranks: int) -> None:
    without = denoise_in_threads(tiny, texts=some_texts(), rules=rules, ranks=ranks, **CASE)
    sent: list[Look] = []
    looks = begin(Waiting, send=sent.append)
    found = denoise_in_threads(tiny, texts=some_texts(), rules=rules, ranks=ranks, looks=looks, **CASE)
    assert found.keys() == without.keys() and all(torch.equal(found[block], without[block]) for block in found)
    looks.close()
    lengths = BlockPlan.of(14, 3, 2).lengths
    wanted = {(block, step) for block in range(len(lengths)) for step in looked_at(6)}
    assert {(look.block, look.step) for look in sent} == wanted
    assert all(look.num_steps == 6 and look.num_pictures == lengths[look.block] for look in sent)
    assert all(unpack(look.picture).shape == (lengths[look.block], 8, 8, 3) for look in sent)


def test_a_look_shows_the_clean_latents(begin: Callable[..., Looks]) -> None:
    sent: list[Look] = []
    looks = begin(send=sent.append)
    looks.see(2, 1, clean(0.5))
    assert wait_until(lambda: sent)
    assert sent[0].picture == pack(GREY.paint(clean(0.5).clean).numpy())
    assert np.ptp(unpack(sent[0].picture)) <= 2 and abs(int(unpack(sent[0].picture).mean()) - 153) <= 2


def test_nobody_waits_and_old_looks_are_dropped(begin: Callable[..., Looks]) -> None:
    """While a look cannot be sent, each block's newest state is all that is kept for it."""
    can_send, sent = threading.Event(), list[tuple[int, int]]()

    def send(look: Look) -> None:
        assert can_send.wait(60)
        sent.append((look.block, look.step))

    looks = begin(send=send)
    looks.see(0, 1, clean(0))
    assert wait_until(lambda: not looks._newest)
    for step in (1, 2, 3):
        for block in (0, 1):
            looks.see(block, step, clean(0))
    can_send.set()
    assert wait_until(lambda: len(sent) == 3)
    assert sorted(sent) == [(0, 1), (0, 3), (1, 3)]


def test_a_look_that_cannot_be_made_ends_the_looks_only(begin: Callable[..., Looks], caplog: pytest.LogCaptureFixture) -> None:
    def no_map() -> LatentRgb:
        raise RuntimeError("CUDA out of memory")

    looks = begin(find=no_map, send=lambda look: None)
    looks.see(0, 1, clean(0))
    assert wait_until(lambda: not looks._thread.is_alive())
    looks.see(1, 1, clean(0))
    assert not looks._newest and "no more early looks of this job: CUDA out of memory" in caplog.text


def test_looks_take_no_more_than_their_share(begin: Callable[..., Looks], monkeypatch: pytest.MonkeyPatch) -> None:
    now, worked = [0.0], [0.0]

    def thread_time() -> float:
        worked[0] += 0.4 * AHEAD_S
        return worked[0]

    monkeypatch.setattr(made, "time", SimpleNamespace(monotonic=lambda: now[0], thread_time=thread_time))
    sent: list[Look] = []
    looks = begin(Waiting, send=sent.append, max_share=0.01)
    for block in range(3):  # each takes 0.4 of what may be spent ahead
        looks.see(block, 1, clean(0))
    assert wait_until(lambda: len(sent) == 3)
    Looks.see(looks, 3, 1, clean(0))
    Looks.see(looks, 3, 2, clean(0))
    assert not wait_until(lambda: len(sent) > 3, 0.3)
    now[0] = 0.3 * AHEAD_S / 0.01  # time for one more
    Looks.see(looks, 4, 1, clean(0))
    assert wait_until(lambda: len(sent) == 4)
    assert (sent[3].block, sent[3].step) == (3, 2) and not wait_until(lambda: len(sent) > 4, 0.3)


def test_without_a_map_there_are_no_looks_until_there_is_one(
    begin: Callable[..., Looks], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "FIND_AGAIN_S", 0.0)
    sent: list[Look] = []
    looks = begin(Waiting, send=sent.append, find=MapFinder(Checkpoint(tiny), tmp_path))
    looks.see(0, 1, clean(0))
    assert not sent
    store_map(GREY, Checkpoint(tiny), tmp_path)
    looks.see(0, 2, clean(0))
    assert wait_until(lambda: [look.step for look in sent] == [2])
