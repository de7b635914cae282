"""Room on the disk that a video will need, counted before it is made. Pure arithmetic."""

from __future__ import annotations

from functools import lru_cache

from dualparal.files import CLIP
from dualparal.method.borders import most_saved_frames
from dualparal.method.plan import KEPT_LATENTS, SETTLING_LATENTS, BlockPlan
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Rules
from dualparal.planning.schedules import experts_by_step, schedule_of, shortened
from dualparal.request import Settings, frames_of_latents

BYTES_PER_PIXEL = 0.3  # of H.264 at the writer's quality; seen: 0.02-0.1 for pictures, 0.3 for noise
BYTES_PER_FRAME = 512  # around it in a segment and in the mp4; seen: 300
LOOK_BYTES_PER_PIXEL = 3  # of a latent, for its rough pictures and the film of them
BYTES_PER_STEP = 512  # of a block, in the timeline and the trace; seen: 300
BLOCK_BYTES = 4 * 4096  # what ends of pages take: a block's segment, latents and looks
RESERVE_BYTES = 2**16  # request, journal, and what joining takes besides


def bytes_needed(request: Settings) -> int:
    """What the folder of a completed request may grow to: each frame twice (its segment and the mp4; so those of a film that it
    is joined to), finished latents, the ends of both films, or the clip that it goes on from, two saved sweeps (the older one
    goes before a new one is written), looks, timeline. At most four times what is seen there once a sweep is saved."""
    plan, pixels = plan_of(request), request.height * request.width
    num_frames = request.num_frames + request.num_frames_before
    video = 2 * BYTES_PER_PIXEL * num_frames * pixels + BYTES_PER_FRAME * num_frames
    looks = LOOK_BYTES_PER_PIXEL * request.latents_num * pixels // 64
    blocks = plan.num_blocks * (BLOCK_BYTES + BYTES_PER_STEP * request.num_inference_steps)
    num_kept = min(request.latents_num + request.ghost, max(KEPT_LATENTS, request.num_cat)) + request.ghost
    clip = 0
    if (request.continue_from or "").startswith(CLIP):  # which is kept with what is made of it
        num_kept += request.ghost
        clip = 3 * pixels * frames_of_latents(request.ghost + SETTLING_LATENTS) // 2
    latents = (request.latents_num + num_kept) * _latent_bytes(request)
    return int(video) + clip + looks + blocks + latents + 2 * sweep_bytes(request) + RESERVE_BYTES


def sweep_bytes(request: Settings) -> int:
    """The most that one saved sweep of a completed request takes."""
    few = shortened(request)
    return _most_saved_frames(rules_of(few), plan_of(few), experts_by_step(few)) * _latent_bytes(request)


@lru_cache(maxsize=32)
def _most_saved_frames(rules: Rules, plan: BlockPlan, experts: tuple[int, ...]) -> int:
    return most_saved_frames(schedule_of(rules, plan, experts))


def _latent_bytes(request: Settings) -> int:
    """Of one latent frame of a Wan VAE, float32."""
    return 16 * (request.height * request.width // 64) * 4
