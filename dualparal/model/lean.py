"""Imports diffusers without what a worker never uses: half a worker's time before it can load a model, a quarter of its memory.

diffusers brings PEFT and transformers along for its loaders, and torch's compiler for its decorators. PEFT and transformers are
hidden from it the way Python hides modules (None in `sys.modules`), so that it does what it does where they are not installed.
The decorators tell the compiler what not to compile; where nothing is compiled, a stand-in takes them. Once diffusers has been
imported, all three can be imported as ever.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

COMPILER = "torch._dynamo"
UNUSED = ("peft", "transformers")


def import_diffusers(*, is_compiled: bool, unused: Sequence[str] = UNUSED) -> None:
    """Import diffusers' Wan modules without the `unused` packages; a diffusers that cannot do without them gets them.

    For the start of a process, before it has threads. One that has imported diffusers keeps what it has.
    """
    if "diffusers" in sys.modules:
        return
    try:
        with _without(unused, is_compiled=is_compiled):
            _import()
    except Exception:  # whatever it is, the import without tricks says it again
        for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
            del sys.modules[name]
        _import()


def _import() -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel  # noqa: F401


@contextlib.contextmanager
def _without(unused: Sequence[str], *, is_compiled: bool) -> Iterator[None]:
    import torch  # noqa: F401 - whole, before its compiler is replaced

    hidden: dict[str, Any] = dict.fromkeys(unused)
    if not is_compiled:
        hidden[COMPILER] = _compiler_without_marks()
    hidden = {name: stand_in for name, stand_in in hidden.items() if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def _compiler_without_marks() -> types.ModuleType:
    stand_in: Any = types.ModuleType(COMPILER)
    stand_in.allow_in_graph = lambda function: function
    stand_in.disable = lambda function=None, *_, **__: function if function is not None else stand_in.allow_in_graph
    return stand_in
