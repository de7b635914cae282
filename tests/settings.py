"""Settings for tests of what only reads them."""

from __future__ import annotations

from typing import Any

from dualparal.presets import Limits, Preset, complete
from dualparal.request import GenerationRequest, Settings

ROOMY = Preset(limits=Limits(seconds=25_000, num_inference_steps=1000, num_per_block=1024))


def settings(*, ranks: int = 1, rings: int = 1, **values: Any) -> Settings:
    """What a request of `values` is completed to where no preset is in the way."""
    return complete(GenerationRequest(**{"prompt": "x", "seed": 0, **values}), ROOMY, ranks=ranks, rings=rings)
