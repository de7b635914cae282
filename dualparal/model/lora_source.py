"""From `--lora path_or_hub_id[:scale]` to safetensors files on this host, and the experts they are for. Needs no torch.

What is in the files is `model.lora`'s business; here only what can be refused before any process starts is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualparal.errors import CheckpointError, RequestError
from dualparal.model.hub import download_file, list_files
from dualparal.model.layout import read_header

EXPERT_WORDS = (("high_noise", "high-noise"), ("low_noise", "low-noise"))  # in file names; of expert 0 and 1
PREFIXES = ("transformer.", "transformer_2.", "diffusion_model.", "lora_unet_")


@dataclass(frozen=True)
class Lora:
    """One LoRA file. `experts`: which experts its keys are for, unless the file itself names both."""

    name: str
    file: str
    scale: float = 1.0
    experts: tuple[int, ...] = (0,)

    @property
    def label(self) -> str:
        """What makes this LoRA again: name and scale."""
        return f"{self.name}:{self.scale:g}"


def find_loras(specs: Sequence[str], num_experts: int) -> tuple[Lora, ...]:
    """The LoRA files of `specs`, in order; a folder or hub repository with one file for each expert gives two.

    A spec is a file, a folder, `owner/name` on the hub, or `owner/name/path/in/it.safetensors`, each with `:scale` or not. A
    file is for the expert its name speaks of (high_noise, low_noise), else for all. Raises `RequestError`, `CheckpointError`.
    """
    if isinstance(specs, str):
        raise RequestError(f"loras={specs!r} is one text; give a list of them", "loras")
    found: list[Lora] = []
    for spec in specs:
        name, scale = _split_scale(str(spec))
        for one, file in _files(name):
            _check(one, file)
            found.append(Lora(one, str(file), scale, _experts(file.name, num_experts)))
    return tuple(found)


def _split_scale(spec: str) -> tuple[str, float]:
    name, colon, text = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        scale = float(text)
    except ValueError:
        raise RequestError(f"lora={spec!r}: {text!r} is not a scale; write e.g. {name or 'file'}:0.8", "loras") from None
    if not -100 <= scale <= 100:  # nan is refused too
        raise RequestError(f"lora={spec!r}: a scale is a number from -100 to 100", "loras")
    return name, scale


def _files(name: str) -> list[tuple[str, Path]]:
    """(what finds it again, file on this host) of each file that `name` stands for."""
    path = Path(name).expanduser().absolute()
    if path.is_file():
        return [(str(path), path)]
    if path.is_dir():
        return [(str(path / one), path / one) for one in _choose(name, [file.name for file in path.iterdir()])]
    if Path(name).is_absolute() or name.startswith((".", "~")) or not name.count("/") >= 1:
        raise CheckpointError(f"there is no LoRA {name}; give a safetensors file, a folder or a hub id")
    owner, repo, *inside = name.split("/")
    hub_id = f"{owner}/{repo}"
    names = ["/".join(inside)] if inside else _choose(name, list_files(hub_id))
    return [(f"{hub_id}/{one}", download_file(hub_id, one)) for one in names]


def _choose(where: str, names: list[str]) -> list[str]:
    """The one safetensors file among `names`, or the pair for the two experts."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if len(files) == 1:
        return files
    pair = [[file for file in files if any(word in file.lower() for word in words)] for words in EXPERT_WORDS]
    if [len(group) for group in pair] == [1, 1] and len(files) == 2:
        return [pair[0][0], pair[1][0]]
    if files:
        raise CheckpointError(f"{where} holds {len(files)} LoRA files ({', '.join(files[:4])}); name one of them: {where}/FILE")
    raise CheckpointError(f"{where} holds no safetensors file; only safetensors are read")


def _check(name: str, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{name} is not a safetensors file; only safetensors are read, convert it first")
    keys = read_header(file)
    strange = sorted(key for key in keys if not key.startswith(PREFIXES))
    if strange or not keys:
        raise CheckpointError(
            f"{name} does not look like a LoRA of a Wan transformer: "
            f"{strange[0] if strange else 'it is empty'}; keys begin with {', '.join(PREFIXES)}"
        )
    if dora := sorted(key for key in keys if "dora_scale" in key or "lora_magnitude_vector" in key):
        raise CheckpointError(f"{name} is a DoRA ({dora[0]}), which cannot be merged here; use a plain LoRA")


def _experts(file_name: str, num_experts: int) -> tuple[int, ...]:
    named = tuple(number for number, words in enumerate(EXPERT_WORDS) if any(word in file_name.lower() for word in words))
    if num_experts == 1 or len(named) != 1:
        return tuple(range(num_experts))
    return named
