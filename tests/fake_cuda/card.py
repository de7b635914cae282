"""A card that is not there: the project's own code on tensors that say they are on cuda:0 and have no memory.

`FakeTensorMode` knows shapes, dtypes and devices of whatever is computed, and refuses two devices in one operation, as CUDA
does. In a build of PyTorch without CUDA a few methods ask for the real device before they get there (indexing, `to`,
`contiguous`); `_Methods` does these by operations that do not. What CUDA itself would be asked (streams, its cache) is noted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
PACKAGE = Path(__file__).parents[2] / "dualparal"
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.matmul, _aten.linear, _aten.convolution, _aten.conv2d, _aten.conv3d,
}  # fmt: skip
MADE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.scalar_tensor}  # by no kernel
COPIES = {_aten._to_copy, _aten.copy_}
READS = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.is_nonzero}


class Notes(TorchDispatchMode):
    """What was run on the card: `kernels` by operation, and for operations that should be rare the project's line they come of:
    `products` of float32 matrices, `syncs`, at which the host waits for the card."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = func.overloadpacket is _aten._local_scalar_dense
        out = 1.0 if is_read else func(*args, **(kwargs or {}))  # any number will do
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(leaf.device == CARD for leaf in (*given, *tree_leaves(out)) if isinstance(leaf, torch.Tensor)):
            self._note(func, given, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, given: list[torch.Tensor], args: Any, kwargs: Any, out: Any) -> None:
        if not func.is_view and func.namespace == "aten" and func.overloadpacket not in MADE:
            self.kernels[func.overloadpacket.__name__] += 1
        if func.overloadpacket in _PRODUCTS and any(leaf.dtype == torch.float32 for leaf in given):
            self.products[line()] += 1
        is_copy = func.overloadpacket in COPIES and len({leaf.device.type for leaf in (*given, out)}) == 2
        if (is_copy and not kwargs.get("non_blocking") and args[2:] != (True,)) or func.overloadpacket in READS:
            self.syncs[line()] += 1


def line() -> str:
    """The innermost line of the project that is being run: file.py:12."""
    frames = _frames()
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


def functions() -> list[str]:
    """The two innermost of the project that are being run, but for those that only pass on."""
    return [frame.name for frame in _frames() if frame.name not in ("_guard", "_wait", "<lambda>")][-2:]


def _frames() -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(PACKAGE))]


@contextmanager
def fake_card(patch: pytest.MonkeyPatch) -> Iterator[Notes]:
    """Inside, `cuda:0` is a card that computes nothing and has room for everything."""
    notes = Notes()

    def waited(*_: Any) -> None:
        notes.syncs["stream"] += 1

    patch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=waited))
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(nn.Module, "to", _module_to)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Methods())
        stack.enter_context(notes)
        yield notes


def put(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Parameters and tables of `model` become ones on the card; `dtype_of(name)` of a parameter."""
    for name, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                dtype = dtype_of(f"{name}.{key}" if name else key)
                made = torch.empty(value.shape, dtype=dtype, device=CARD)
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
        for key, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device=CARD)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = _INSTEAD.get(func)
        return (instead or func)(*args, **(kwargs or {}))


def _at(x: torch.Tensor, index: Any) -> torch.Tensor:
    index = index if isinstance(index, tuple) else (index,)
    assert not any(isinstance(one, torch.Tensor | list) for one in index), "this stand-in knows no gathering"
    named = sum(one is not None and one is not Ellipsis for one in index)
    dim, out = 0, x
    for one in index if Ellipsis in index else (*index, Ellipsis):
        if one is Ellipsis:
            dim += x.dim() - named
        elif one is None:
            out, dim = out.unsqueeze(dim), dim + 1
        elif isinstance(one, slice):
            start, stop, step = one.indices(out.shape[dim])
            out, dim = _aten.slice.Tensor(out, dim, start, max(start, stop), step), dim + 1
        else:
            out = _aten.select.int(out, dim, int(one))
    return out


def _put_at(x: torch.Tensor, index: Any, value: Any) -> None:
    place = _at(x, index)
    if isinstance(value, torch.Tensor):
        _aten.copy_.default(place, value)
    else:
        _aten.fill_.Scalar(place, value)


def _to(x: torch.Tensor, *what: Any, **named: Any) -> torch.Tensor:
    device, dtype = named.get("device"), named.get("dtype")
    for one in what:
        if isinstance(one, torch.Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            device = one
    place = x.device if device is None else torch.device(device)
    place = CARD if place.type == "cuda" else place
    if (place, dtype or x.dtype) == (x.device, x.dtype) and not named.get("copy"):
        return x
    options = {"device": place, "dtype": dtype or x.dtype, "non_blocking": bool(named.get("non_blocking"))}
    copied: torch.Tensor = _aten._to_copy.default(x, **options)
    return copied


def _module_to(module: nn.Module, *what: Any, **named: Any) -> nn.Module:
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for key, value in values.items():
                if value is not None and value.is_floating_point():
                    moved = _to(value.detach(), *what, **named)
                    values[key] = nn.Parameter(moved, requires_grad=False) if values is part._parameters else moved
    return module


def _contiguous(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return x if x.is_contiguous() else _aten.clone.default(x, memory_format=torch.contiguous_format)


def _larger(x: torch.Tensor, scale_factor: Any = None, **_: Any) -> torch.Tensor:
    rows, columns = scale_factor
    return x.new_empty((*x.shape[:-2], int(x.shape[-2] * rows), int(x.shape[-1] * columns)))


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__getitem__: _at,
    torch.Tensor.__setitem__: _put_at,
    torch.Tensor.to: _to,
    torch.Tensor.type_as: lambda x, other: _to(x, other.dtype),
    torch.Tensor.float: lambda x: _to(x, torch.float32),
    torch.Tensor.cpu: lambda x: _to(x, "cpu"),
    torch.Tensor.contiguous: _contiguous,
    nn.functional.interpolate: lambda x, size, scale_factor, *_, **__: _larger(x, scale_factor),
    torch.Tensor.copy_: lambda x, source, non_blocking=False: _aten.copy_.default(x, source, non_blocking),
    torch.Tensor.item: _aten._local_scalar_dense.default,
    torch.Tensor.__float__: lambda x: float(_aten._local_scalar_dense.default(x)),
    torch.Tensor.__int__: lambda x: int(_aten._local_scalar_dense.default(x)),
    torch.Tensor.__bool__: lambda x: bool(_aten._local_scalar_dense.default(x)),
    torch.Tensor.__deepcopy__: lambda x, memo: x.detach().clone(),
}
