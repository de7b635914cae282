"""What would stop a run with a checkpoint, said before any process starts: each part against its row of `PARTS`, then the
parts against each other. Reads configs and headers only.
"""

from __future__ import annotations

import math
from typing import Any

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo
from dualparal.model.layout import Checkpoint
from dualparal.model.parts import PARTS, PIPELINE, SCALED, Part
from dualparal.paths import is_folder

FRAMES_PER_LATENT = 4  # METHOD.md: frames = 4 (latents - 1) + 1


def validate(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for the first thing that would stop a run: file, class, setting, tensor or byte."""
    folder = checkpoint.folder
    if not is_folder(folder):
        raise CheckpointError(f"{folder} is not a folder; give a Wan checkpoint in diffusers' layout")
    try:
        _check(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder} has a config that makes no sense ({type(error).__name__}: {str(error)[:99]}); download again"
        ) from None


def _check(checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder
    kind = checkpoint.index.get("_class_name", PIPELINE)
    if kind != PIPELINE:
        raise CheckpointError(f"{folder} is a {kind}, not a {PIPELINE} for text to video; use a T2V checkpoint")
    parts = [PARTS[name] for name in checkpoint.parts]
    for part in parts:
        _check_files(checkpoint, part)
    for part in parts:
        if part.config:
            _check_config(checkpoint, part)
    for name in checkpoint.transformers:
        _check_transformer(checkpoint, name)
    _check_vae(checkpoint)
    _check_scheduler(checkpoint)
    for part in parts:
        if part.weights:
            _check_tensors(checkpoint, part)


def _check_files(checkpoint: Checkpoint, part: Part) -> None:
    """The files beside config and weights, and the class of what the part holds."""
    where = checkpoint.folder / part.name
    for name in part.files:
        if not (where / name).is_file():
            there = sorted(file.name for file in where.glob("*") if file.suffix in (".model", ".json"))
            beside = f" (there is {', '.join(there[:3])})" if there else ""
            raise CheckpointError(f"{where} has no {name}{beside}; download it again, or save it with a fast tokenizer")
    if part.class_name is None:
        return
    config = checkpoint.config(part.name)
    if part.library == "transformers":
        name = str((config.get("architectures") or checkpoint.index.get(part.name, [None, "?"])[1:])[0])
    else:
        name = str(config.get("_class_name"))
    if name != part.class_name:
        raise CheckpointError(f"{where} is a {name}; a Wan text-to-video checkpoint has a {part.class_name} there")


def _check_config(checkpoint: Checkpoint, part: Part) -> None:
    """The numbers, lists and settings of the part's config by themselves."""
    config, file = checkpoint.config(part.name), checkpoint.folder / part.name / str(part.config)
    for name, most in part.numbers.items():
        if not _is_count(value := config.get(name, 1), most):
            raise CheckpointError(f"{file} says {name}={value!r}, not a number of 1 to {most}; download it again")
    for name, length in part.vectors.items():
        value, wanted = config.get(name), config.get(length)
        if not isinstance(value, list) or (wanted is not None and len(value) != wanted) or not all(map(_is_finite, value)):
            raise CheckpointError(f"{file} has no {name} of {wanted or length} numbers, without which no latent can be decoded")
    for name, values in part.values.items():
        if (value := config.get(name, values[0])) not in values:
            known = " or ".join(map(repr, values))
            raise CheckpointError(f"{file} says {name}={value!r}, which this program does not follow; it knows {known}")
    for name, (above, up_to) in part.ranges.items():
        if name in config and not (_is_finite(value := config[name]) and above < value <= up_to):
            raise CheckpointError(f"{file} says {name}={value!r}, not a number above {above:g} up to {up_to:g}; download again")


def _check_scheduler(checkpoint: Checkpoint) -> None:
    """Settings of the scheduler that depend on each other, or end in numbers that are none, diffusers' own included."""
    config, file = checkpoint.config("scheduler"), checkpoint.folder / "scheduler" / "scheduler_config.json"
    is_flow, ends_at_zero = bool(config.get("use_flow_sigmas")), config.get("final_sigmas_type", "zero") == "zero"
    is_exponential, is_karras = bool(config.get("use_exponential_sigmas")), bool(config.get("use_karras_sigmas"))
    stands_still = ends_at_zero or is_flow or is_exponential or is_karras  # in the last step, or goes infinitely far
    terminal, steps = config.get("shift_terminal"), config.get("disable_corrector", [])
    offset = config.get("steps_offset", 0)
    wrong = {
        "solver_type='bh1' ends in infinite numbers with final_sigmas_type='zero'": (
            config.get("solver_type") == "bh1" and ends_at_zero
        ),
        "lower_order_final=False ends in infinite numbers with these sigmas": (
            not config.get("lower_order_final", True) and stands_still and config.get("solver_order", 2) > 1
        ),
        "use_exponential_sigmas=True goes with use_flow_sigmas=False only": is_exponential and is_flow,
        "use_exponential_sigmas=True and use_karras_sigmas=True exclude each other": is_exponential and is_karras,
        f"shift_terminal={terminal!r} is no number between 0 and 1": (
            terminal is not None and not (_is_finite(terminal) and 0 <= terminal < 1)
        ),
        f"disable_corrector={steps!r} is no list of steps": (
            not isinstance(steps, list) or not all(type(step) is int for step in steps)
        ),
        f"steps_offset={offset!r} is no number of steps": type(offset) is not int or not 0 <= offset <= 1000,
    }
    if found := next((what for what, is_so in wrong.items() if is_so), None):
        raise CheckpointError(f"{file}: {found[:99]}; take the scheduler folder of the model's own repository")


def _check_transformer(checkpoint: Checkpoint, name: str) -> None:
    """What one expert's config says against the VAE's, the text encoder's and the other expert's."""
    config, where = checkpoint.config(name), checkpoint.folder / name
    for key in ("image_dim", "added_kv_proj_dim"):
        if config.get(key) is not None:  # 0 too: diffusers builds the branch and fails in its first step
            raise CheckpointError(f"{where} is an image-to-video model ({key}={config[key]}); use a T2V checkpoint")
    if next(iter(config.get("patch_size", (1, 2, 2)))) != 1:
        raise CheckpointError(f"{where} has patch_size {config['patch_size']}; patches of several frames are not supported")
    if (num_layers := config.get("num_layers", 40)) != checkpoint.num_layers:
        raise CheckpointError(f"{where} has {num_layers} layers, the first expert {checkpoint.num_layers}")
    text_dim, d_model = config.get("text_dim", 4096), checkpoint.config("text_encoder").get("d_model")
    if text_dim != d_model:
        raise CheckpointError(f"{where} expects text_dim={text_dim}, the text encoder gives {d_model}; they are of two models")
    channels, z_dim = config.get("in_channels", 16), checkpoint.config("vae").get("z_dim", 16)
    out = config.get("out_channels") or channels
    if channels > out:
        raise CheckpointError(
            f"{where} is an image-to-video model (in_channels={channels}, of which {channels - out} for a picture); "
            "use a T2V checkpoint"
        )
    if not channels == out == z_dim:
        raise CheckpointError(
            f"{where} takes in_channels={channels} and gives {out}, the VAE has {z_dim}; they are of two models"
        )


def _check_vae(checkpoint: Checkpoint) -> None:
    """That the VAE's pictures are RGB, of the size it claims, and four frames to a latent."""
    config, where = checkpoint.config("vae"), checkpoint.folder / "vae"
    patch = int(config.get("patch_size") or 1)
    if (channels := config.get("out_channels", 3)) != 3 * patch**2:
        raise CheckpointError(f"{where} gives {channels} channels where RGB pictures are {3 * patch**2}; use Wan's VAE")
    frames = 2 ** sum(map(bool, config.get("temperal_downsample", (False, True, True))))
    if frames != FRAMES_PER_LATENT:
        raise CheckpointError(f"{where} packs {frames} frames into a latent, Wan's VAE {FRAMES_PER_LATENT}; use Wan's VAE")
    pixels, said = patch * 2 ** (len(config.get("dim_mult", (1, 2, 4, 4))) - 1), checkpoint.latent_sizes[1]
    if pixels != said:
        raise CheckpointError(f"{where} makes {pixels} pixels of a latent's and claims scale_factor_spatial={said}")


def _check_tensors(checkpoint: Checkpoint, part: Part) -> None:
    """That each tensor is there in its shape and a type that is read, and none that nobody would use."""
    tensors, where = checkpoint.tensors(part.name), checkpoint.folder / part.name
    shapes = part.shapes(checkpoint.config(part.name))
    for key, tensor in tensors.items():
        if tensor.dtype not in (SCALED if tensor.scale else part.dtypes):
            raise CheckpointError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}{'' if tensor.scale else ' without a scale'}, which is not "
                f"read there; convert it to one of {', '.join(sorted(part.dtypes))}"
            )
    if missing := sorted(set(shapes) - set(tensors)):
        raise CheckpointError(f"{where} lacks {missing[0]} (and {len(missing) - 1} more tensors); download it again")
    if surplus := sorted(set(tensors) - set(shapes)):
        raise CheckpointError(
            f"{where} holds {surplus[0]} (and {len(surplus) - 1} more tensors) that its config does not know, "
            f"{_size_of(checkpoint.config(part.name))}; download it again, or convert it to diffusers' layout without them"
        )
    for key, shape in shapes.items():
        check_shape(key, tensors[key], shape)


def check_shape(key: str, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise `CheckpointError` unless the file's `tensor` has the `shape` that its config gives it."""
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.file}: {key} has shape {list(tensor.shape)}, the config says {list(shape)}")


def _size_of(config: dict[str, Any]) -> str:
    return f"num_layers={config['num_layers']} among it" if "num_layers" in config else "as it stands"


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
