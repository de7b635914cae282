"""What CUDA would show, told by a made-up `nvidia-smi` or a made-up driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dualparal import devices, gpus
from dualparal.errors import RequestError

MIB = 2**20
A, B, C = "GPU-aaaa1111-0000", "GPU-aaaa2222-0000", "GPU-cccc3333-0000"
THREE = f"0, {A}, [N/A], 82182, 623, 9.0\n1, {B}, Disabled, 24564, [N/A], 8.9\n2, {C}, Disabled, 41500, 540, 8.0\n"
MIG = f"0, {A}, Enabled, 81559, 0, 9.0\n"
MIG_LIST = (
    f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-1111aaaa-1)\n"
    "  MIG 3g.40gb+me  Device  1: (UUID: MIG-2222bbbb-2)\n"
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for `nvidia-smi` that is alone on the PATH; there is no driver."""
    folder = tmp_path / "programs"
    folder.mkdir()
    shell = shutil.which("sh")
    assert shell
    (folder / "sh").symlink_to(shell)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "WSL_PROGRAM", str(folder / "wsl" / "nvidia-smi"))
    monkeypatch.setattr(gpus, "DRIVER", "libcuda-that-is-not-there.so")
    return folder


def write(folder: Path, cards: str, listed: str = "", code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nif [ \"$1\" = -L ]; then printf '%s' '{listed}'; else printf '%s' '{cards}'; fi\nexit {code}\n"
    )
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("named", "mib"),
    [
        (None, [81559, 24564, 40960]),
        ("", []),
        ("NoDevFiles", []),
        ("none", []),
        ("void", []),
        ("-1", []),
        ("0,-1,1", [81559]),  # what follows the first that is none does not count
        ("7", []),
        ("2,7,0", [40960]),
        ("2,0", [40960, 81559]),  # their order
        (" 1 , 0 ", [24564, 81559]),
        ("1,1", []),  # named twice: none
        ("+1", [24564]),
        ("1abc", [24564]),  # numbers as C reads them
        (B, [24564]),
        (f"{C},{A}", [40960, 81559]),
        ("GPU-cccc", [40960]),  # the beginning is enough,
        ("GPU-aaaa", []),  # if it stands for one
        ("GPU-9999", []),
        ("MIG-1111aaaa-1", []),
        ("cuda:0", []),
    ],
)
def test_cuda_visible_devices(smi: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, mib: list[int]) -> None:
    write(smi, THREE)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [gpu.num_bytes // MIB for gpu in gpus.visible_gpus()] == mib
    assert devices.count_gpus() == len(mib)
    assert devices.bytes_per_device("cuda") == (int(min(mib) * MIB * 0.97) if mib else None)


@pytest.mark.parametrize(
    ("named", "gigabytes"),
    [
        (None, [10]),  # a process sees one slice
        ("0", [10]),
        (A, [10]),
        ("MIG-2222bbbb-2", [40]),
        ("MIG-2222", [40]),
        ("MIG-1111aaaa-1,MIG-2222bbbb-2", [10]),
        (f"MIG-{A}/1/0", [10]),
        ("MIG-9999", []),
        ("1", []),
    ],
)
def test_a_slice_has_its_own_memory(
    smi: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, gigabytes: list[int]
) -> None:
    write(smi, MIG, MIG_LIST)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [gpu.num_bytes // 10**9 for gpu in gpus.visible_gpus()] == gigabytes
    assert all(gpu.capability == (9, 0) for gpu in gpus.visible_gpus())


def test_whole_cards_beside_a_divided_one_and_a_divided_one_without_slices(smi: Path) -> None:
    write(smi, f"{MIG}1, {B}, Disabled, 24564, 0, 8.9\n", MIG_LIST)
    assert [gpu.num_bytes for gpu in gpus.visible_gpus()] == [24564 * MIB]
    assert gpus.choose([gpus.Gpu(A, 80, is_divided=True)], None) == []


@pytest.mark.parametrize("named", ["0", "0,1", "GPU-1234", "NoDevFiles", "-1", ""])
def test_without_a_gpu_the_variable_means_nothing(smi: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """Batch systems set it on every machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices.count_gpus() == 0 and not devices.is_on_gpu("auto")
    assert devices.place("auto", 2) == (("cpu", "cpu"), "cpu")
    assert devices.bytes_per_device("cuda") is None
    with pytest.raises(RequestError, match="needs 1 GPUs, 0 are visible"):
        devices.place("cuda", 1)


def test_a_program_that_fails_or_talks_nonsense_counts_as_none(smi: Path) -> None:
    write(smi, "", code=9)
    assert gpus.visible_gpus() == ()
    write(smi, "No devices were found\n")
    assert gpus.visible_gpus() == ()
    write(smi, "0, GPU-x, [N/A], [N/A], [N/A], [N/A]\n")  # it shares the host's memory
    (found,) = gpus.visible_gpus()
    assert found.num_bytes > 2**28 and found.capability is None


def test_wsl_keeps_its_program_aside(smi: Path) -> None:
    write(smi / "wsl", THREE)
    assert devices.count_gpus() == 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make a driver with")
def test_without_the_program_the_driver_is_asked(smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads CUDA_VISIBLE_DEVICES itself; here it shows as many cards as the variable has letters."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(
        "#include <stdlib.h>\n#include <string.h>\n"
        'int cuInit(unsigned flags) { return getenv("NO_CUDA") != 0; }\n'
        'int cuDeviceGetCount(int *n) { const char *v = getenv("CUDA_VISIBLE_DEVICES"); *n = v ? strlen(v) : 2; return 0; }\n'
        "int cuDeviceTotalMem_v2(size_t *size, int n) { *size = 1000 + n; return 0; }\n"
        "int cuDeviceGetAttribute(int *value, int what, int n) { *value = what == 75 ? 7 : 5; return 0; }\n"
    )
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("PATH", str(smi))
    monkeypatch.setattr(gpus, "DRIVER", str(library))
    assert [(gpu.num_bytes, gpu.capability) for gpu in gpus.visible_gpus()] == [(1000, (7, 5)), (1001, (7, 5))]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "abc")
    assert [gpu.num_bytes for gpu in gpus.visible_gpus()] == [1000, 1001, 1002]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles1")
    monkeypatch.setenv("NO_CUDA", "1")
    assert gpus.visible_gpus() == ()


def test_bfloat16_wants_cards_that_have_it(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(smi, f"{THREE}3, GPU-dddd, [N/A], 16384, 400, 7.5\n")
    for dtype in ("float16", "float32"):
        devices.check_dtype(dtype)
    with pytest.raises(RequestError, match=r"needs .* 8\.0 .* there is a GPU of compute capability 7\.5; use"):
        devices.check_dtype("bfloat16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    devices.check_dtype("bfloat16")
    write(smi, "0, GPU-x, [N/A], 16384, [N/A], [N/A]\n")  # nobody knows: CUDA will say
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.check_dtype("bfloat16")
