"""Names of diffusers' attention backends and what each needs, known without torch: a wrong one is refused before any work.

Follows `AttentionBackendName` and `_check_attention_backend_requirements` of diffusers' attention_dispatch.py; a test compares
them. Versions and what a card can run are checked by diffusers itself, in the worker (`speedups.use_attention`).
"""

from __future__ import annotations

import importlib.util

from dualparal.errors import RequestError

CPU_BACKENDS = ("native", "_native_math", "flex")
_NOTHING = ("", "")
_FLASH, _FLASH_3 = ("flash_attn", "pip install flash-attn"), ("flash_attn_3", "build it from flash-attention's source")
_KERNELS, _SAGE = ("kernels", "pip install kernels"), ("sageattention", "pip install sageattention")
# Name -> (module that must be there, how to get it).
BACKENDS = {
    "native": _NOTHING, "flex": _NOTHING, "_native_cudnn": _NOTHING, "_native_efficient": _NOTHING, "_native_flash": _NOTHING,
    "_native_math": _NOTHING, "_native_npu": ("torch_npu", "pip install torch_npu"),
    "_native_xla": ("torch_xla", "pip install torch_xla"),
    "flash": _FLASH, "flash_varlen": _FLASH, "_flash_3": _FLASH_3, "_flash_varlen_3": _FLASH_3,
    "flash_hub": _KERNELS, "flash_varlen_hub": _KERNELS, "flash_4_hub": _KERNELS, "_flash_3_hub": _KERNELS,
    "_flash_3_varlen_hub": _KERNELS, "aiter_fa2_hub": _KERNELS, "sage_hub": _KERNELS, "sage_blackwell_hub": _KERNELS,
    "sage": _SAGE, "sage_varlen": _SAGE, "_sage_qk_int8_pv_fp8_cuda": _SAGE, "_sage_qk_int8_pv_fp8_cuda_sm90": _SAGE,
    "_sage_qk_int8_pv_fp16_cuda": _SAGE, "_sage_qk_int8_pv_fp16_triton": _SAGE,
    "xformers": ("xformers", "pip install xformers"),
}  # fmt: skip


def check_attention(name: str | None, *, on_gpu: bool = True) -> str | None:
    """`name` itself. Raises `RequestError` for a name that diffusers does not know, kernels that need a GPU where there is
    none, and a package that is not installed."""
    if name is None:
        return None
    public = ", ".join(sorted(known for known in BACKENDS if not known.startswith("_")))
    if not isinstance(name, str) or name.lower() not in BACKENDS:
        raise RequestError(f"attention={name!r} is not known to diffusers; use one of {public}", "attention")
    if not on_gpu and name.lower() not in CPU_BACKENDS:
        raise RequestError(f"attention={name} needs a GPU; on the CPU use native or flex", "attention")
    module, how = BACKENDS[name.lower()]
    if module and importlib.util.find_spec(module) is None:
        there = ", ".join(sorted(known for known in BACKENDS if not known.startswith("_") and _is_there(known)))
        raise RequestError(f"attention={name} needs the package {module} ({how}); what can be used here: {there}", "attention")
    return name


def _is_there(name: str) -> bool:
    module, _ = BACKENDS[name]
    return not module or importlib.util.find_spec(module) is not None
