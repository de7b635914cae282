"""Step caching: which steps of a block are extrapolated from its own earlier predictions instead of run through the layers.

The form is diffusers' TaylorSeer on the model's output (`TaylorSeerCacheConfig(use_lite_mode=True)`): a skipped step makes no
trip at all. Which steps are skipped follows from sweep and step alone, never from what was computed. The arithmetic is in
`method/taylor.py`; this file needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualparal.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Every `interval`-th sweep is computed, the others are skipped, but for the steps named here.

    `before`: so many steps of every mode (expert, guided or not) are computed first; diffusers' `disable_cache_before_step`.
    `after`: from this step on all are computed; its `disable_cache_after_step`. The last step always is. `max_order`: of the
    extrapolation, 0 repeats the last prediction.
    """

    interval: int
    max_order: int = 1
    before: int = 3
    after: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1 or self.before < 1 or (self.after or 0) < 0 or self.max_order < 0:
            raise RequestError(
                f"{self} is not usable; interval and before are at least 1, the others at least 0", "cache_interval"
            )

    def is_skipped(self, sweep: int, step: int, num_before: int, num_steps: int) -> bool:
        """Whether `step` of `num_steps` is skipped when its turn comes in `sweep`, `num_before` steps into its mode.

        By sweep, so that all blocks in flight are computed together and find each other's K and V. Of a video of one block
        sweep and step are the same, and so is diffusers' pattern.
        """
        is_forced = num_before < self.before or step >= self._end(num_steps)
        return not is_forced and (sweep - self.before - 1) % self.interval != 0

    def mean_computed(self, num_steps: int) -> float:
        """Steps that an average block of one mode computes out of `num_steps`."""
        free = max(0, self._end(num_steps) - self.before)
        return num_steps - free * (1 - 1 / self.interval)

    def _end(self, num_steps: int) -> int:
        return num_steps - 1 if self.after is None else min(self.after, num_steps - 1)
