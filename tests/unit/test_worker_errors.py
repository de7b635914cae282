"""What a worker says when something ends it: the class and one sentence, fit for a page."""

from __future__ import annotations

import pytest
import torch

from dualparal.errors import DualParalError, error_from_wire
from dualparal.runtime.worker import describe_error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (MemoryError(), "OutOfMemory", "rank 1 ran out of memory; use more ranks"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory", "rank 1 ran out of memory"),
        (RuntimeError("first line\nsecond line"), "WorkerFailed", "rank 1 failed: RuntimeError: first line"),
        (KeyError(), "WorkerFailed", "rank 1 failed: KeyError: KeyError"),
        (ValueError("x" * 5000), "WorkerFailed", "rank 1 failed: ValueError: xxx"),
        (DualParalError("as it is"), "DualParalError", "as it is"),
    ],
)
def test_one_sentence(error: BaseException, kind: str, says: str) -> None:
    found, message = describe_error("rank 1", error)
    assert found == kind
    assert message.startswith(says)
    assert "\n" not in message and len(message) < 500
    assert type(error_from_wire(found, message)).__name__ == kind


def test_an_unknown_class_from_a_worker_is_still_an_error_of_ours() -> None:
    for name in ("KeyError", "os", "annotations", "error_from_wire", ""):
        assert type(error_from_wire(name, "what happened")).__name__ == "WorkerFailed"
