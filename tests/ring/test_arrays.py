"""Arrays of messages become tensors whose bits and whose place in memory owe nothing to how they came."""

from __future__ import annotations

import numpy as np
import torch

from dualparal.ring.arrays import tensor_of


def test_a_tensor_lies_where_torch_wants_it() -> None:
    raw = np.zeros(4 * 512 + 128, dtype=np.uint8)
    begin = -raw.ctypes.data % 64
    for offset in (4, 16, 32):
        array = raw[begin + offset : begin + offset + 4 * 512].view(np.float32).reshape(1, 16, 32)
        array[:] = np.arange(512, dtype=np.float32).reshape(1, 16, 32)
        found = tensor_of(array)
        assert found.data_ptr() % 64 == 0 and array.ctypes.data % 64 == offset
        assert torch.equal(found, torch.arange(512.0).reshape(1, 16, 32))
        array[:] = 0
        assert found.sum() > 0
