"""What made videos say of the time of others, and when a queue gets to a job."""

from __future__ import annotations

import pytest

from dualparal.planning.learnt import MadeJob, Pace, learn_pace, wait_s


def job(work: float, rate: float = 2.0, overhead_s: float = 0.0) -> MadeJob:
    return MadeJob(work=work, denoise_s=work * rate + overhead_s, besides_s=1.0)


def test_the_pace_is_that_of_the_jobs() -> None:
    assert learn_pace([]) is None
    assert learn_pace([job(10), job(3)]) == Pace(s_per_work=2.0, besides_s=1.0)
    assert Pace(s_per_work=2.0, besides_s=1.0).time_s(5) == 11.0


def test_many_clips_of_one_step_do_not_outweigh_a_film() -> None:
    """They are overhead for the most part: nine of them once made 35 minutes out of nine seconds."""
    pace = learn_pace([*(job(0.01, overhead_s=0.5) for _ in range(9)), job(100)])
    assert pace is not None and pace.time_s(100) == pytest.approx(201.0)


def test_one_job_that_was_slowed_down_does_not_count_alone() -> None:
    assert learn_pace([job(10), job(10), job(10, rate=50.0)]) == Pace(s_per_work=2.0, besides_s=1.0)


@pytest.mark.parametrize(
    ("ahead_s", "replicas", "wait"),
    [
        ([], 1, 0.0),
        ([], 3, 0.0),
        ([10, 20], 1, 30.0),
        ([10], 2, 0.0),  # the other replica is free
        ([10, 20], 2, 10.0),
        ([10, 20, 30], 2, 20.0),  # the third runs from 10 to 40, the second replica is free at 20
        ([10, 20, 30, 5], 2, 25.0),
        ([12, 12, 12, 12], 4, 12.0),
    ],
)
def test_the_wait_is_until_a_replica_is_free(ahead_s: list[float], replicas: int, wait: float) -> None:
    assert wait_s(ahead_s, replicas) == wait


def test_first_share_is_the_first_blocks() -> None:
    from dualparal.planning.job_plan import plan_job
    from dualparal.planning.placement import ModelSizes, Placement
    from dualparal.planning.sizes import WAN_1_3B
    from dualparal.presets import complete, load_presets
    from dualparal.request import GenerationRequest

    preset = load_presets()["wan2.1-1.3b-480p"]
    sizes = ModelSizes(config=WAN_1_3B)

    def share(seconds: float, schedule: str) -> float:
        request = GenerationRequest(prompt="x", seconds=seconds, schedule=schedule, num_inference_steps=20)
        settings = complete(request, preset, ranks=1, num_experts=1, model="m")
        return plan_job(settings, sizes, Placement(layers=(30,))).first_share

    assert share(2.0, "paper") == 1.0, "one block is the whole video"
    assert 0 < share(60, "preview") < share(60, "paper") < 1
    assert share(60, "preview") < 0.3, "early frames are what it is for"
