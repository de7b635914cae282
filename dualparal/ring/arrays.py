"""Arrays that came with a message, as tensors."""

from __future__ import annotations

import numpy as np
import torch


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """A copy of `array` in memory that torch has laid out.

    An unpickled array lies wherever there was room, and on some CPUs a matrix product's last bit depends on how its input is
    aligned (https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-2/reproducibility-conditions.html).
    """
    return torch.from_numpy(array).clone()
