"""Left caches that wait in host memory: the same bits, the bytes of the plan, the next layer on its way while one runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal import Engine, RequestError
from dualparal.cli.main import main
from dualparal.model import host_cache
from dualparal.model.feature_cache import KeyValue
from dualparal.model.host_cache import LAYERS_ON_DEVICE, CacheMover, HostCache, HostPair
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import JobShape, Stage
from dualparal.planning.memory import CACHED_LAYERS_ON_DEVICE, memory_plan, workload_of
from dualparal.planning.sizes import pinned_bytes
from tests.local_ring import denoise_in_threads
from tests.ring.test_saved_sweeps import CACHED
from tests.settings import settings
from tests.texts import some_texts

CPU = torch.device("cpu")


def pair(value: float) -> KeyValue:
    return torch.full((2, 3, 4), value), torch.full((2, 3, 4), -value)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", CACHED)
def test_the_same_bits(name: str, ranks: int, tiny: Path) -> None:
    job: dict[str, Any] = dict(latents_num=15, num_per_block=3, num_cat=2, steps=5, texts=some_texts(), rules=CACHED[name])
    stays = denoise_in_threads(tiny, **job)
    waits = denoise_in_threads(tiny, ranks=ranks, delay_seed=1, is_cache_offloaded=True, **job)
    assert stays.keys() == waits.keys()
    assert all(torch.equal(stays[block], waits[block]) for block in stays)


def test_what_waits_is_a_copy_and_so_is_what_comes_back() -> None:
    cache, given = HostCache(CacheMover(CPU)), pair(1.0)
    cache[0] = given
    given[0].zero_()
    cache[0][0].zero_()
    assert torch.equal(cache[0][0], pair(1.0)[0])
    k, v = cache.pop(0)
    assert torch.equal(k, pair(1.0)[0]) and torch.equal(v, pair(1.0)[1]) and not cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 1000, 1023])
def test_in_pieces_of_a_power_of_two(dtype: torch.dtype, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch pins no other sizes; nothing is lost where they meet."""
    monkeypatch.setattr(host_cache, "MIN_PIECE_BYTES", 64)
    mover, given = CacheMover(CPU), (torch.randn(2, num_tokens, 6).to(dtype), torch.randn(2, num_tokens, 6).to(dtype))
    host = mover.to_host(given)
    (k, v), _ = mover.to_device(host)
    assert torch.equal(k, given[0]) and torch.equal(v, given[1])
    for x, kept in zip(given, host.pair, strict=True):
        assert torch.equal(torch.cat(kept.pieces).view(kept.shape), x)
        sizes = [piece.nbytes for piece in kept.pieces]
        assert all(size & (size - 1) == 0 for size in sizes[:-1]) and sizes == sorted(sizes, reverse=True)
        assert sum(pinned_bytes(size) for size in sizes) <= x.nbytes + 64


class Watched(CacheMover):
    """Notes what is sent for and what is waited for."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.seen: list[str] = []

    def to_device(self, host: HostPair) -> tuple[KeyValue, Any]:
        number = int(host.pair[0].pieces[0][0])
        self.seen.append(f"send for {number}")
        return super().to_device(host)[0], number

    def wait_for(self, event: Any) -> None:
        self.seen.append(f"wait for {event}")


def test_the_next_layer_comes_while_one_runs() -> None:
    mover = Watched()
    cache = HostCache(mover)
    for layer in (4, 5, 6):
        cache[layer] = pair(float(layer))
    cache.fetch(4)
    assert mover.seen == ["send for 4"], "before the first layer runs"
    for layer in (4, 5, 6):
        assert cache.pop(layer)[0].flatten()[0] == layer
    assert mover.seen == [
        "send for 4", "wait for 4", "send for 5", "wait for 5", "send for 6", "wait for 6",
    ]  # fmt: skip
    with pytest.raises(KeyError):
        cache[4]


def test_what_is_used_again_stays() -> None:
    mover = Watched()
    cache = HostCache(mover)
    for layer in (0, 1):
        cache[layer] = pair(float(layer))
    for _ in range(2):
        cache.fetch(0)
        assert [int(cache[layer][0].flatten()[0]) for layer in (0, 1)] == [0, 1]
    assert mover.seen.count("send for 0") == mover.seen.count("send for 1") == 2, "each time once"


class FakeStream:
    """Notes what a CUDA stream would be told."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen, self.num_events = name, seen, 0

    def wait_stream(self, other: FakeStream) -> None:
        self.seen.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.seen.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> FakeEvent:
        self.num_events += 1
        return FakeEvent(f"{self.name} {self.num_events}", self.seen)


class FakeEvent:
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def synchronize(self) -> None:
        self.seen.append(f"the host waits for {self.name}")


def test_the_order_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies come after what made them and before what uses them, and few are under way; these streams only take notes."""
    seen: list[str] = []
    mover, compute = CacheMover(CPU), FakeStream("compute", seen)
    mover._outward, mover._homeward = FakeStream("out", seen), FakeStream("home", seen)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    cache = HostCache(mover)
    for layer in range(3):
        cache[layer] = pair(float(layer))
    assert seen == ["out waits for compute"] * 3 + ["the host waits for out 1"]
    seen.clear()
    cache.fetch(0)
    assert seen == ["home waits for compute", "home waits for out 1"]
    seen.clear()
    assert cache.pop(0)[0].flatten()[0] == 0
    assert seen == ["compute waits for home 1", "home waits for compute", "home waits for out 2"]
    seen.clear()
    assert sorted(cache) == [1, 2]
    mover.flush()
    assert seen == [f"the host waits for out {number}" for number in (2, 3)]


@pytest.mark.parametrize("name", CACHED)
def test_bytes_are_those_of_the_plan(name: str, tiny: Path) -> None:
    """Held in host memory between two items, and of right caches on the device, counted while a stage runs a whole job."""
    rules, checkpoint = CACHED[name], Checkpoint(tiny)
    request = settings(
        latents_num=15, num_per_block=3, num_cat=2, num_inference_steps=5, height=32, width=32, guidance_scale=5.0,
    )  # fmt: skip
    config = checkpoint.config("transformer")
    workload = workload_of(request, config, [4], rules=rules, text_tokens=6)
    stage = Stage(checkpoint, range(4), dtype="float32", device="cpu", is_cache_offloaded=True)
    texts = some_texts()
    schedule = workload.schedule
    conditions = stage.embed_conditions(torch.linspace(999, 1, 5).long(), texts)
    stage.begin(JobShape(4, 4, 2, (5.0, 5.0), (0,) * schedule.plan.num_blocks), schedule, conditions)
    most_host = most_here = 0
    for item in schedule.items:
        if item.is_skipped:
            continue
        stage.run(item, torch.randn(1, stage.channels, sum(schedule.window_frames(item)), 4, 4))
        waiting = []
        for tail in stage._tails.values():
            assert isinstance(tail, HostCache)
            waiting += [piece for host in tail._host.values() for x in host.pair for piece in x.pieces]
        here = [x for by_layer in stage._heads.values() for pair in by_layer.values() for x in pair]
        most_host, most_here = max(most_host, sum(x.nbytes for x in waiting)), max(most_here, sum(x.nbytes for x in here))
    plain, found = (
        memory_plan(workload, height=32, width=32, dtype="float32", on_gpu=False, is_cache_offloaded=is_offloaded)
        for is_offloaded in (False, True)
    )
    halves = 1 if rules.micro_batches else 2
    one_layer = 2 * request.num_cat * halves * stage.tokens_per_frame * stage.dim * 4  # K and V, float32
    assert found.host_caches == most_host > 0 == plain.host_caches
    assert found.ranks[0].feature_cache == most_here + CACHED_LAYERS_ON_DEVICE * one_layer


def test_the_plan_counts_the_layers_on_their_way() -> None:
    assert CACHED_LAYERS_ON_DEVICE == LAYERS_ON_DEVICE


def test_refused_without_a_gpu(tiny: Path) -> None:
    with pytest.raises(RequestError, match="without a GPU"):
        Engine(tiny, device="cpu", offload_cache=True)
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", "--device", "cpu", "--offload_cache"]) == 2
