"""Films of shots on the ring: as the twin says, the same bits on any ranks and from any saved border, texts come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualparal.method.schedule import ALL_BLOCKS, Item, Rules
from dualparal.method.step_cache import StepCache
from dualparal.method.timeline import Mixture
from dualparal.model.lora_source import Lora
from dualparal.model.stage import Stage
from dualparal.ring.texts import Embedded
from tests.local_ring import denoise_in_threads
from tests.model.test_lora import as_diffusers, write
from tests.ring.test_ring import same_bits
from tests.ring.test_saved_sweeps import KeepsAll
from tests.texts import as_said, joined, some_texts
from tests.twin import Twin, scene_lengths

RULES = {
    "paper": Rules(),
    "paper, cached": Rules(context="cached", refresh=2),
    "preview, cached": Rules(left_context="own_step", max_in_flight=3, stagger=2, context="cached", refresh=3),
    "one at a time": Rules(left_context="own_step", max_in_flight=1),
    "micro-batches": Rules(context="cached", micro_batches=True, refresh=3),
    "guidance in the middle": Rules(context="cached", guided_steps=(1, 4), refresh=2),
    "step cache": Rules(context="cached", step_cache=StepCache(interval=2, max_order=1, before=2), refresh=2),
}
SCENES = [[5, 4, 1], [2, 7], [1]]  # blocks of 3 with 2 of context: 5 | 2 2 | 1 || 2 | 3 2 2 || 1
OF_BLOCK = (0, 1, 2, 0, 3, 3, 1, 0, 2)
CASE: dict[str, Any] = dict(latents_num=20, num_per_block=3, num_cat=2, steps=5, scenes=SCENES, text_of_block=OF_BLOCK)


def film_texts(num_texts: int, **options: Any) -> list[list[torch.Tensor]]:
    """Texts with one negative prompt for all."""
    texts = some_texts(num_texts, **options)
    return [[text[0], *texts[0][1:]] for text in texts]


def test_the_case_is_what_it_says() -> None:
    assert scene_lengths(SCENES, 3, 2) == ([5, 2, 2, 1, 2, 3, 2, 2, 1], [4, 8])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("experts", [1, 2])
def test_as_the_twin_says(name: str, experts: int, tiny: Path, tiny_two: Path) -> None:
    folder, rules = (tiny, RULES[name]) if experts == 1 else (tiny_two, RULES[name])
    case = {**CASE, "texts": film_texts(4, lengths=(6, 6)), "boundary_ratio": 0.8 if experts == 2 else None}
    expected = joined(Twin(folder).run(**case, **as_said(rules)))
    found = joined(denoise_in_threads(folder, ranks=2, rules=rules, num_known=1, **case))
    assert found.shape[2] == 20
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("experts", [1, 2])
def test_any_ranks_and_any_border(name: str, experts: int, tiny: Path, tiny_two: Path) -> None:
    folder = tiny if experts == 1 else tiny_two
    case = {**CASE, "texts": film_texts(4), "rules": RULES[name], "boundary_ratio": 0.8 if experts == 2 else None}
    whole = denoise_in_threads(folder, **case)  # all texts announced
    kept = KeepsAll()
    assert same_bits(denoise_in_threads(folder, ranks=3, num_known=1, delay_seed=5, saver=kept, **case), whole)
    assert same_bits(denoise_in_threads(folder, ranks=2, num_known=2, is_nccl=True, **case), whole)
    assert len(kept.borders) > 2
    for number, border in enumerate(kept.borders):
        rest = denoise_in_threads(folder, ranks=1 + number % 3, num_known=1, resume=border, **case)
        assert rest and all(torch.equal(rest[block], whole[block]) for block in rest)
        assert sorted(rest) == list(range(border.num_finished, len(whole)))


@pytest.mark.parametrize("stop_after", range(0, 40, 3))
def test_stopped_anywhere(tiny: Path, stop_after: int) -> None:
    """Also where the item that would have come brings a text: the message that says stop has its size."""
    case = {**CASE, "texts": film_texts(4), "rules": RULES["micro-batches"]}
    denoise_in_threads(tiny, ranks=3, num_known=1, delay_seed=2, stop_after=stop_after, **case)


@pytest.mark.parametrize("options", [{"is_offloaded": True}, {"is_cache_offloaded": True}, {"quantization": "fp8"}])
def test_engine_options(tiny: Path, options: dict[str, Any]) -> None:
    case = {**CASE, "texts": film_texts(4), "rules": RULES["preview, cached"]}
    quantization = options.get("quantization")
    whole = denoise_in_threads(tiny, quantization=quantization, **case)
    assert same_bits(denoise_in_threads(tiny, ranks=2, num_known=1, **options, **case), whole)


def test_a_lora(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, as_diffusers())
    case = {**CASE, "texts": film_texts(4), "rules": RULES["paper, cached"]}
    plain, one = denoise_in_threads(tiny, **case), denoise_in_threads(tiny, loras=(Lora(str(path), str(path)),), **case)
    assert not same_bits(one, plain)
    found = denoise_in_threads(tiny, ranks=3, num_known=1, loras=(Lora(str(path), str(path)),), **case)
    assert same_bits(found, one)


def test_text_k_and_v_live_while_a_block_in_flight_listens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen, most = Stage.run, {}, [0]

    def watched(stage: Stage, item: Item, incoming: torch.Tensor) -> Any:
        found = run(stage, item, incoming)
        in_flight = seen.setdefault(id(stage), set())
        in_flight.add(item.block)
        if item.step + 1 == CASE["steps"]:
            in_flight.discard(item.block)
        held = {number for cross in stage._crosses[0] for number, _ in cross._key_values}
        assert held <= {OF_BLOCK[block] for block in in_flight}
        most[0] = max(most[0], len(held))
        return found

    monkeypatch.setattr(Stage, "run", watched)
    rules = Rules(left_context="own_step", max_in_flight=2, stagger=3)
    denoise_in_threads(tiny, ranks=2, num_known=1, **{**CASE, "texts": film_texts(4), "rules": rules})
    assert most == [2]


def test_a_scene_is_a_film_of_its_own(tiny: Path) -> None:
    """But for its noise: the generator has gone on."""
    texts = film_texts(2)
    film = denoise_in_threads(
        tiny, latents_num=20, num_per_block=3, num_cat=2, steps=5, scenes=[[9], [11]], text_of_block=(0,) * 3 + (1,) * 3,
        texts=texts, rules=RULES["paper, cached"],
    )  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 5, 4, 4, generator=noise)
    for _ in range(3):
        torch.randperm(3, generator=noise)
    pool, blocks = torch.randn(1, 4, 5, 4, 4, generator=noise), []
    for length in (5, 3, 3):
        pool = torch.cat([pool[:, :, 3:], pool[:, :, :3][:, :, torch.randperm(3, generator=noise)]], dim=2)
        blocks.append(pool[:, :, 5 - length :].clone())
    alone = denoise_in_threads(
        tiny, latents_num=11, num_per_block=3, num_cat=2, steps=5, texts=texts[1:], rules=RULES["paper"], noise=blocks
    )
    other = denoise_in_threads(
        tiny, latents_num=20, num_per_block=3, num_cat=2, steps=5, scenes=[[9], [11]], text_of_block=(0,) * 3 + (1,) * 3,
        texts=texts, rules=RULES["paper"],
    )  # fmt: skip
    assert all(torch.equal(alone[block], other[block + 3]) for block in range(3))
    assert not torch.equal(film[4], other[4]), "cached and recomputed context differ"


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything(tiny: Path, data: st.DataObject) -> None:
    num_per_block = data.draw(st.integers(1, 3))
    num_cat = data.draw(st.integers(0, num_per_block))
    scenes = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=3))
    num_blocks = len(scene_lengths(scenes, num_per_block, num_cat)[0])
    rules = Rules(
        left_context=data.draw(st.sampled_from(["latest", "own_step"])),
        context=data.draw(st.sampled_from(["recomputed", "cached"])),
        max_in_flight=data.draw(st.integers(1, 3) | st.just(ALL_BLOCKS)), stagger=data.draw(st.integers(1, 3)),
        micro_batches=data.draw(st.booleans()), refresh=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    case: dict[str, Any] = dict(
        latents_num=sum(map(sum, scenes)), num_per_block=num_per_block, num_cat=num_cat, steps=data.draw(st.integers(1, 4)),
        scenes=scenes, texts=film_texts(3), seed=data.draw(st.integers(0, 9)),
        text_of_block=data.draw(st.lists(st.integers(0, 2), min_size=num_blocks, max_size=num_blocks)),
    )  # fmt: skip
    expected = joined(Twin(tiny).run(**case, **as_said(rules)))
    found = joined(denoise_in_threads(tiny, ranks=data.draw(st.integers(1, 3)), num_known=1, rules=rules, **case))
    assert (found - expected).abs().max() <= 1e-5


def test_embedded_texts_are_filled_up_and_mixed() -> None:
    one, two = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    texts = Embedded([one, two], [Mixture(0, 1, 0.25), Mixture(2, 0, 0.5)], length=6)
    filled = [torch.cat([text, torch.zeros(1, 6 - text.shape[1], 4)], dim=1) for text in (one, two)]
    assert torch.equal(texts[0], filled[0])
    mixed = 0.75 * filled[0] + 0.25 * filled[1]
    assert torch.equal(texts[2], mixed)
    assert torch.equal(texts[3], 0.5 * mixed + 0.5 * filled[0])
    assert torch.equal(Embedded([one])[0], one)
