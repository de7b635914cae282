"""UniPC whose numbers are worked out once for each step, and not by every block anew.

What one step multiplies by depends on the noise levels alone. diffusers' solver works it out wherever the latents are: on a
card some eighty tiny kernels and half a dozen waits of the host for a step of each block. Here it is done on the host, by the
same arithmetic in float32 in the same order, and kept for all blocks; the bits are diffusers' own. Follows
`UniPCMultistepScheduler` ("UniPC: A Unified Predictor-Corrector Framework", arXiv 2302.04867), predicting clean latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler


@dataclass(frozen=True)
class Advance:
    """From one noise level to the next: kept · sample − newest · m0 − rest · Σ weights · D, with m0 the newest clean estimate
    and D = (m − m0) / span those before it, then, in the corrector, the one that has come since, whose span is 1."""

    kept: float
    newest: float
    rest: float
    spans: tuple[float, ...]
    weights: tuple[float, ...]

    def sum(self, slopes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Σ weights · D over as many as there are."""
        if len(slopes) == 1:
            return self.weights[0] * slopes[0]
        weights = torch.tensor(self.weights[: len(slopes)]).to(slopes[0].device, non_blocking=True)
        return torch.einsum("k,bkc...->bc...", weights, torch.stack(list(slopes), dim=1))  # adds in diffusers' order


class SharedUniPC(UniPCMultistepScheduler):
    """diffusers' solver; shallow copies share each step's numbers."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; what was worked out before is dropped."""
        super().set_timesteps(*args, **kwargs)
        self._advances: dict[tuple[int, int, bool], Advance] = {}

    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *_: Any, sample: torch.Tensor, order: int, **__: Any
    ) -> torch.Tensor:
        """The predictor: latents at the next step's noise level."""
        advance = self._advance(self.step_index, order, corrects=False)
        newest = self.model_outputs[-1]
        moved = advance.kept * sample - advance.newest * newest
        if advance.spans:
            moved = moved - advance.rest * advance.sum(self._slopes(advance, newest))
        return moved

    def multistep_uni_c_bh_update(
        self, this_model_output: torch.Tensor, *_: Any, last_sample: torch.Tensor, order: int, **__: Any
    ) -> torch.Tensor:
        """The corrector: the last step again, with the clean estimate that it led to."""
        advance = self._advance(self.step_index - 1, order, corrects=True)
        newest = self.model_outputs[-1]
        moved = advance.kept * last_sample - advance.newest * newest
        change = advance.weights[-1] * (this_model_output - newest)
        if advance.spans:
            change = advance.sum(self._slopes(advance, newest)) + change
        return moved - advance.rest * change

    def _slopes(self, advance: Advance, newest: torch.Tensor) -> Sequence[torch.Tensor]:
        older = self.model_outputs[-2 : -2 - len(advance.spans) : -1]
        return [(estimate - newest) / span for estimate, span in zip(older, advance.spans, strict=True)]

    def _advance(self, start: int, order: int, *, corrects: bool) -> Advance:
        key = start, order, corrects
        if key not in self._advances:
            self._advances[key] = self._work_out(start, order, corrects)
        return self._advances[key]

    def _work_out(self, start: int, order: int, corrects: bool) -> Advance:
        alpha, sigma, end_ratio = self._level(start + 1)
        _, start_sigma, start_ratio = self._level(start)
        h = end_ratio - start_ratio
        spans = [(self._level(start - back)[2] - start_ratio) / h for back in range(1, order)]
        powers = torch.stack([*spans, torch.ones(())])
        grown = torch.expm1(-h)
        scale = -h if self.config.solver_type == "bh1" else grown
        weights = torch.full((1,), 0.5)  # for two unknowns and fewer diffusers solves nothing
        if order > 2 - corrects:
            known = order if corrects else order - 1
            matrix = torch.stack([torch.pow(powers, power) for power in range(known)])
            weights = torch.linalg.solve(matrix[:, :known], torch.stack(_right_side(-h, grown, scale, known)))
        kept, newest, rest = float(sigma / start_sigma), float(alpha * grown), float(alpha * scale)
        return Advance(kept, newest, rest, tuple(map(float, spans)), tuple(map(float, weights)))

    def _level(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha, sigma and the logarithm of their ratio at a step; each [] float32 on the host."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[index])
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)


def _right_side(h: torch.Tensor, grown: torch.Tensor, scale: torch.Tensor, known: int) -> list[torch.Tensor]:
    """k! · φ_(k+1)(h) / scale for k = 1 ... known, by recurrence."""
    found, phi = [], grown / h - 1
    for k in range(1, known + 1):
        found.append(phi * math.factorial(k) / scale)
        phi = phi / h - 1 / math.factorial(k + 1)
    return found
