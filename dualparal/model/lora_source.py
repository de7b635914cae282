"""From `--lora [high:|low:]path_or_hub_id[:scale]` to safetensors files on this host, and the experts they are for.

What is in the files is `model.lora_file`'s business; which expert a file is for is said by the word before it, else by its
name. Needs no torch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualparal.errors import CheckpointError, RequestError
from dualparal.model.hub import download_file, list_files
from dualparal.paths import expand, is_file, is_folder, why_missing

log = logging.getLogger(__name__)
EXPERTS = ("high", "low")  # noise; expert 0 and 1
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SPOKEN = ({"high", "highnoise", "hn"}, {"low", "lownoise", "ln"})
_LETTERS = ({"h"}, {"l"})  # between separators only
# What "high" or "low" before these speaks of is no expert.
_OTHER = {
    "res", "resolution", "light", "lights", "lighting", "lit", "quality", "contrast", "key", "detail", "details",
    "detailed", "poly", "fi", "def", "definition", "speed", "motion", "angle", "angles", "shot", "heel", "heels",
    "fashion", "school", "fantasy", "end", "tech", "rank", "vram", "mem", "memory", "ram", "dynamic", "dynamics", "range",
    "fps", "rise", "cut", "waist", "kick", "jump", "tide", "tides", "saturation", "saturated", "exposure", "frequency",
    "freq", "pass", "fidelity", "ceiling", "ground", "land", "altitude", "lr", "loss", "dim", "cfg", "bit", "bitrate",
    "energy", "tension", "street", "castle", "pony", "ponytail", "socks", "boots", "neck", "gloss", "glossy", "gear",
    "rider", "budget", "cost", "profile", "top", "density", "saturate", "rez", "life", "temp", "temperature", "pressure",
    "five", "sensitivity", "fat",
}  # fmt: skip
_FOLDER = re.compile(r"(high|low)[-_ ]?noise([-_ ]?(model|lora|expert))?", re.IGNORECASE)


@dataclass(frozen=True)
class Lora:
    """One LoRA file. `experts`: which experts its keys are for, unless the file itself names both; `said`: high or low,
    where the user said it."""

    name: str
    file: str
    scale: float = 1.0
    experts: tuple[int, ...] = (0,)
    said: str = ""

    @property
    def label(self) -> str:
        """What makes this LoRA again: the expert where it was said, name and scale."""
        return f"{self.said}:{self.name}:{self.scale:g}" if self.said else f"{self.name}:{self.scale:g}"


def find_loras(specs: Sequence[str], num_experts: int, known: Mapping[str, Path] | None = None) -> tuple[Lora, ...]:
    """The LoRA files of `specs`, in order; a folder or hub repository with one file for each expert gives two.

    A spec is a file, a folder, `owner/name` on the hub, or `owner/name/path/in/it.safetensors`, each with `high:` or `low:`
    before it or not, and `:scale` behind it or not; a name of `known` is its file. A file whose expert was not said is for the
    one its name speaks of, else for all; the log tells which. Raises `RequestError`, `CheckpointError`.
    """
    if isinstance(specs, str):
        raise RequestError(f"loras={specs!r} is one text; give a list of them", "loras")
    found: list[Lora] = []
    for spec in specs:
        name = name_among(str(spec), known or {})
        said, rest = _split_expert(str(spec)) if name is None else _around(str(spec), name)
        if said and num_experts == 1:
            raise RequestError(f"lora={spec!r}: this model has one expert; leave {said}: out", "loras")
        files: list[tuple[str, Path, str]] | None = None
        if name is None:
            name, scale = _split_scale(rest)
        else:
            scale, files = _scale_in(str(spec), name, rest or "1"), [(name, (known or {})[name], name)]
        if scale == 0:
            log.warning("LoRA %s has the scale 0 and changes nothing", name)
        for one, file, inside in files or _files(name, said):
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{one} is not a safetensors file; only safetensors are read, convert it first")
            experts = _experts(one, inside, said, num_experts)
            found.append(Lora(one, str(file), scale, experts, said))
    return tuple(found)


def expert_in(name: str) -> int | None:
    """The expert that a file's name speaks of (0 high noise, 1 low noise); None when it speaks of none, or of both."""
    stem = name.removesuffix(".safetensors")
    words = [word.lower() for word in _WORD.findall(stem)]
    letters = re.split(r"[-_. ]+", stem.lower())
    found = set()
    for expert in (0, 1):
        follows = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word in _SPOKEN[expert]]
        if any(after not in _OTHER for after in follows):
            found.add(expert)
        follows = [after for word, after in zip(letters, [*letters[1:], ""], strict=True) if word in _LETTERS[expert]]
        if any(after not in ("264", "265") for after in follows):
            found.add(expert)
    return found.pop() if len(found) == 1 else None


def _split_expert(spec: str) -> tuple[str, str]:
    said, colon, rest = spec.partition(":")
    is_said = colon and said.lower() in EXPERTS and not os.path.exists(os.path.expanduser(spec))
    return (said.lower(), rest) if is_said else ("", spec)


def _split_scale(spec: str) -> tuple[str, float]:
    name, colon, text = spec.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(spec)):
        return spec, 1.0
    if re.search(r"[/\\]|\.safetensors$", text):  # a path of another system, such as C:\lora.safetensors
        return spec, 1.0
    return name, _scale_in(spec, name, text)


def _scale_in(spec: str, name: str, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise RequestError(f"lora={spec!r}: {text!r} is not a scale; write e.g. {name or 'file'}:0.8", "loras") from None
    if not -100 <= scale <= 100:  # nan is refused too
        raise RequestError(f"lora={spec!r}: a scale is a number from -100 to 100", "loras")
    return scale


def name_among(spec: str, names: Container[str]) -> str | None:
    """The one of `names` that `spec` has, with or without an expert before and a scale behind it; asks no file system."""
    said, colon, rest = spec.partition(":")
    for inner in (spec, rest if colon and said.lower() in EXPERTS else ""):
        for name in (inner, inner.rpartition(":")[0]):
            if name and name in names:
                return name
    return None


def _around(spec: str, name: str) -> tuple[str, str]:
    """What stands before (an expert, or "") and behind (a scale, or "") a `name` that `name_among` found."""
    if spec == name or spec.rpartition(":")[0] == name:
        return "", spec[len(name) + 1 :]
    said, _, rest = spec.partition(":")
    return said.lower(), rest[len(name) + 1 :]


def _files(name: str, said: str) -> list[tuple[str, Path, str]]:
    """(what finds it again, file on this host, path within what was named) of each file that `name` stands for."""
    path = expand(name)
    if is_file(path):
        return [(str(path), path, path.name)]
    if is_folder(path):
        try:
            inside = os.listdir(path)
        except OSError as error:
            raise CheckpointError(f"LoRA folder {name} cannot be read: {error.strerror}") from None
        return [(str(path / one), path / one, one) for one in _choose(name, inside, said)]
    if Path(name).is_absolute() or re.match(r"[.~]|[A-Za-z]:|[^/]*\\", name) or not name.count("/") >= 1:
        raise CheckpointError(f"there is no LoRA {name}{why_missing(path)}; give a safetensors file, a folder or a hub id")
    owner, repo, *within = name.split("/")
    hub_id = f"{owner}/{repo}"
    listed = list_files(hub_id) if not within or within[-1] == "adapter_model.safetensors" else []
    names = ["/".join(within)] if within else _choose(name, listed, said)
    for one in names:  # PEFT's settings lie beside the weights
        if (settings := one.rpartition("/")[0] + "/adapter_config.json").lstrip("/") in listed:
            download_file(hub_id, settings.lstrip("/"))
    return [(f"{hub_id}/{one}", download_file(hub_id, one), one) for one in names]


def _choose(where: str, names: list[str], said: str) -> list[str]:
    """The one safetensors file among `names`, the one for the expert that was said, or the pair for the two experts."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if len(files) == 1:
        return files
    pair = [[file for file in files if _of_path(file) == expert] for expert in (0, 1)]
    if said and len(pair[EXPERTS.index(said)]) == 1:
        return pair[EXPERTS.index(said)]
    if [len(group) for group in pair] == [1, 1] and len(files) == 2:
        return [pair[0][0], pair[1][0]]
    if files:
        raise CheckpointError(f"{where} holds {len(files)} LoRA files ({', '.join(files[:4])}); name one of them: {where}/FILE")
    raise CheckpointError(f"{where} holds no safetensors file; only safetensors are read")


def _of_path(inside: str) -> int | None:
    """The expert that a file's name speaks of, else its folder's."""
    *folders, file = inside.split("/")
    expert = expert_in(file)
    if expert is None and folders and (match := _FOLDER.fullmatch(folders[-1])):
        return EXPERTS.index(match[1].lower())
    return expert


def _experts(name: str, inside: str, said: str, num_experts: int) -> tuple[int, ...]:
    if num_experts == 1:
        return (0,)
    if said:
        log.info("LoRA %s is for the %s-noise expert, as was said", name, said)
        return (EXPERTS.index(said),)
    expert = _of_path("/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else inside)
    if expert is None:
        log.warning(
            "LoRA %s goes to both experts: its name speaks of neither high nor low noise; high:FILE or low:FILE says one", name
        )
        return tuple(range(num_experts))
    log.warning("LoRA %s goes to the %s-noise expert, of which its name speaks; high:FILE or low:FILE says another",
                name, EXPERTS[expert])  # fmt: skip
    return (expert,)
