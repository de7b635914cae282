"""A film's texts on their way to the stages: those after the first travel with the block step that needs them.

Rank 0 keeps the embeddings as the codec made them and mixes where a blend wants it; the other ranks get each text, projected,
behind the activations of the first item that listens to it. Which item that is follows from the schedule, so that receives are
posted for it and nothing is announced. Stages drop a text when no block in flight listens to it (`TextsAtHand`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from dualparal.method.grid import Ring
from dualparal.method.schedule import Item, Schedule
from dualparal.method.timeline import Mixture, TextsAtHand
from dualparal.model.stage import Conditions, JobShape


class TextTrips:
    """Which item carries which text, for one rank that walks the items of its ring from some item on."""

    def __init__(self, shape: JobShape, schedule: Schedule, conditions: Sequence[Conditions], ring: Ring = None) -> None:
        """The texts in `conditions` are there from the start; all that travel are as long as the first of them."""
        self._num_known = len(conditions[0].texts)
        self._walk = TextsAtHand(shape.text_of_block, schedule.last_on_ring(ring))
        self.shape = (len(conditions), *conditions[0].texts[0][0].shape[1:])  # [experts, L, D]

    def of(self, item: Item) -> int | None:
        """The text that travels with `item`; to be asked once for every item that makes the trip, in order."""
        text = self._walk.comes(item)
        self._walk.goes(item)
        return text if text is not None and text >= self._num_known else None

    def num_elements(self, text: int | None) -> int:
        """Elements that it adds to a message."""
        return 0 if text is None else math.prod(self.shape)


class Embedded:
    """Embeddings by the number of their text, each [1, L, text dim] float32 on the CPU; mixtures are made when asked for."""

    def __init__(self, encoded: Sequence[torch.Tensor], mixtures: Sequence[Mixture] = (), *, length: int | None = None) -> None:
        """`encoded` may come without the zeros behind the last token; they are filled up to `length`."""
        self._encoded, self._mixtures, self._length = encoded, mixtures, length
        self._made = functools.lru_cache(maxsize=4)(self._make)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._made(number)

    def _make(self, number: int) -> torch.Tensor:
        if number >= len(self._encoded):
            mixture = self._mixtures[number - len(self._encoded)]
            return (1 - mixture.share) * self[mixture.old] + mixture.share * self[mixture.new]
        text = self._encoded[number]
        missing = 0 if self._length is None else self._length - text.shape[1]
        return torch.nn.functional.pad(text, (0, 0, 0, missing)) if missing > 0 else text
