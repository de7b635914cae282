"""Flags made from the fields of `EngineOptions` and `GenerationRequest`: name, type, choices and help stand beside the field.

Left-out flags are None, so that whoever takes them knows what was given. Imports no torch.
"""

from __future__ import annotations

import argparse
import functools
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dualparal.errors import RequestError
from dualparal.hosts.torchrun import find_team
from dualparal.options import EngineOptions, choices_of, of
from dualparal.paths import not_empty
from dualparal.presets import Preset, find_preset, load_presets
from dualparal.request import IN_PROMPT, GenerationRequest

Add = Callable[..., Any]  # `add_argument` of a parser or a group


def add_request_flags(parser: argparse.ArgumentParser, needs_prompt: bool = True) -> None:
    """The flags of a video."""
    group = parser.add_argument_group("the video (what is left out comes from the model's preset)")
    names = [name for name in GenerationRequest.model_fields if name not in IN_PROMPT]
    add_fields(group.add_argument, GenerationRequest, names, required=("prompt",) if needs_prompt else ())


def add_engine_flags(parser: argparse.ArgumentParser, *, can_undo: bool = False) -> None:
    """The flags of a model and of the engine that runs it; with `can_undo`, `--no_...` for each that is on or off."""
    engine = parser.add_argument_group("the engine").add_argument
    add_model_flags(engine)
    add_fields(engine, EngineOptions, of("job", "host"), can_undo=can_undo)


def add_model_flags(add: Add) -> None:
    """The flags that say which model, and with which preset: two values."""
    what = "folder in diffusers' layout, hub id, or a preset's name"
    _add(add, "model_id", ["model"], type=not_empty, metavar="MODEL", help=what)
    _add(add, "preset", type=not_empty, help="preset to take values (and, without --model_id, the model) from")
    _add(add, "presets_folder", ["presets"], type=not_empty, metavar="FOLDER", help="also read presets from here")


def add_fields(
    add: Add, model: type[BaseModel], names: Iterable[str] | None = None, *, required: Container[str] = (),
    can_undo: bool = False, defaults: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """A flag for each of `names` (default: all) of the fields of `model`; `defaults` are told where a command has its own."""
    for name in model.model_fields if names is None else names:
        info = model.model_fields[name]
        beside = dict(typing.cast(dict[str, Any], info.json_schema_extra or {}))
        flags = beside.get("flags", [])
        keywords: dict[str, Any] = {
            "help": _help(info, (defaults or {}).get(name, info.default), beside.get("unit")),
            "dest": _dest(name, info),
            "default": None,
        }
        if info.annotation is bool or beside.get("is_switch"):
            _add(add, name, flags, action="store_true", **keywords)
            if can_undo:
                _add(add, f"no_{name}", action="store_false", dest=name, default=None, help=f"not --{name}, which the job had")
            continue
        if name in required:
            keywords["required"] = True
        if _is_list(info):
            keywords["action"] = "append"
        if choices := choices_of(info.annotation):
            keywords["choices"] = choices
        else:
            keywords["type"] = functools.partial(_value, model, name, info, beside.get("unit"))
            keywords["metavar"] = beside.get("metavar") or (name.upper() if _kind(info) in (str, Path) else "N")
        shown = flags if "flags" in beside and (model is EngineOptions or "dest" in beside) else [name, *flags]
        _add(add, shown[0], shown[1:], **keywords)


def _add(add: Add, name: str, others: Iterable[str] = (), **keywords: Any) -> None:
    """Every name of a flag is known with underscores; `Parser` takes it with dashes too."""
    add(f"--{name}", *(f"--{other}" for other in others), **keywords)


def _is_list(info: FieldInfo) -> bool:
    """Whether a field's flag may be given several times: a list, or one or None."""
    kind: Any = info.annotation
    others = [one for one in typing.get_args(kind) if one is not type(None)] if typing.get_origin(kind) is not tuple else [kind]
    return len(others) == 1 and typing.get_origin(others[0]) is tuple


def _dest(name: str, info: FieldInfo) -> str:
    """Where a field's flag puts its value."""
    return str(typing.cast(dict[str, Any], info.json_schema_extra or {}).get("dest", name))


def _help(info: FieldInfo, default: Any, unit: int | None = None) -> str:
    if unit and default:
        default = f"{default / unit:g}"
    has_default = default is not None and default is not False and default != () and not info.is_required()
    text = f"{info.description}" + (f" (default: {default})" if has_default else "")
    return text.replace("%", "%%")


def _kind(info: FieldInfo) -> Any:
    """The plain type of a field's values: int, float, bool, Path or str."""
    found, annotations = set(), [info.annotation]
    while annotations:
        one = annotations.pop()
        found.add(one if isinstance(one, type) else None)
        annotations += [] if typing.get_origin(one) is tuple else typing.get_args(one)
    return next((kind for kind in (bool, float, Path, int) if kind in found), str)


def _value(model: type[BaseModel], name: str, info: FieldInfo, unit: int | None, text: str) -> Any:
    """A flag's text as the field's value. What an engine's option may be, the model itself says."""
    kind = _kind(info)
    value: Any = text
    if kind is bool:
        if text not in ("on", "off"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
        value = text == "on"
    elif kind in (int, float) and text != "none":
        try:
            value = float(text) * unit if unit else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int and not unit)}number") from None
    elif kind is Path:
        value = Path(not_empty(text))
    if model is EngineOptions and name in of("server"):  # told in the words of the flag
        try:
            EngineOptions(**{name: value})
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return value


def given(model: type[BaseModel], options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `model` that flags gave."""
    found = {name: getattr(options, _dest(name, info), None) for name, info in model.model_fields.items()}
    return {name: value for name, value in found.items() if value is not None}


def find_asked(options: argparse.Namespace, otherwise: str = "pocket") -> tuple[str, Preset]:
    """(weights, preset) of the flags: a preset names its model unless --model_id does."""
    presets = load_presets(options.presets_folder)
    model = options.model_id or options.preset or otherwise
    preset = find_preset(options.preset or model, presets)
    return model if model == preset.name else find_preset(model, presets).model or model, preset


def make_engine(options: argparse.Namespace, **more: Any) -> Any:
    """An engine from the flags of `add_engine_flags`, with `more` options where no flag was given; nothing is started."""
    from dualparal.engine.engine import Engine

    model, preset = find_asked(options)
    return Engine(model, preset=preset, team=find_team(), **{**more, **given(EngineOptions, options)})
