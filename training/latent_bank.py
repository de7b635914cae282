"""Training material of the transformer: normalised latents of many scenes, from which windows of any length are cut.

Motions repeat every 32 frames (8 latents), circling every 48 (12), and the encoder forgets what lies more than four latents
back. So a scene is encoded once around and then indexed for as long as a window asks. A window starts at the video's first
latent, which stands for one frame, or in mid-video, as DualParal's windows do. The bank grows while training goes on, so
that new scenes keep coming.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from dualparal.pocket.world import BOUNCE_PERIOD, CIRCLE_PERIOD, Prompt, random_scene, training_prompts
from training.full_sequence import encode_clip
from training.train_vae import to_tensor

MEMORY_LATENTS = 5  # the first one and four more, until the encoder's past is all moving
START_AT_FIRST_SHARE = 0.5


@dataclass
class LatentBank:
    """Scenes as (prompt, latents [z, n, 8, 8] float16, period in latents); scene `i` is the same whenever it is made."""

    vae: AutoencoderKLWan
    seed: int
    prompts: list[Prompt] = field(default_factory=training_prompts)
    scenes: list[tuple[Prompt, torch.Tensor, int]] = field(default_factory=list)

    def grow(self, num_scenes: int) -> None:
        """Encode that many more scenes."""
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)
        for _ in range(num_scenes):
            rng = np.random.default_rng((self.seed, 2, len(self.scenes)))
            prompt = self.prompts[rng.integers(len(self.prompts))]
            period = (CIRCLE_PERIOD if prompt.motion == "circling" else BOUNCE_PERIOD) // 4
            video = random_scene(prompt, rng).render(4 * (MEMORY_LATENTS + period - 1) + 1)
            with torch.no_grad():
                latents = (encode_clip(self.vae, to_tensor([video]))[0] - mean) / std
            self.scenes.append((prompt, latents[0].half(), period))

    def window(self, rng: np.random.Generator, num_latents: int) -> tuple[Prompt, torch.Tensor]:
        """A random window [z, num_latents, 8, 8], float32, and its prompt."""
        prompt, latents, period = self.scenes[rng.integers(len(self.scenes))]
        start = 0 if rng.uniform() < START_AT_FIRST_SHARE else int(rng.integers(1, MEMORY_LATENTS + period))
        index = np.arange(start, start + num_latents)
        repeats = index >= latents.shape[1]
        index[repeats] = MEMORY_LATENTS + (index[repeats] - MEMORY_LATENTS) % period
        return prompt, latents[:, index].float()
