"""Timesteps of the tokens' own (`expand_timesteps` of Wan2.2-TI2V): a picture that a film begins with is clean, at timestep 0,
beside latents at any other. Follows `WanImageToVideoPipeline` and the four-dimensional `temb` of `WanTransformerBlock`.
"""

from __future__ import annotations

import torch


def with_clean(timesteps: torch.Tensor) -> torch.Tensor:
    """`timesteps` [S] and 0 behind them, [S + 1]: the last row of what is embedded is that of a clean latent."""
    return torch.cat([timesteps, timesteps.new_zeros(1)])


def modulation(timestep_proj: torch.Tensor, step: int, num_tokens: int, num_clean_tokens: int) -> torch.Tensor:
    """The projections of a window's tokens: [1, 6, D] of `step` for all alike, or [1, `num_tokens`, 6, D] when the first
    `num_clean_tokens` are clean. `timestep_proj` [S + 1, 6, D] is embedded of `with_clean`."""
    now = timestep_proj[step : step + 1]
    if not num_clean_tokens:
        return now
    clean, noisy = timestep_proj[-1:].unsqueeze(1), now.unsqueeze(1)
    return torch.cat(
        [clean.expand(-1, num_clean_tokens, -1, -1), noisy.expand(-1, num_tokens - num_clean_tokens, -1, -1)], dim=1
    )
