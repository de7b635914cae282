"""The small commands: `presets`, `info`, `tiny`."""

from __future__ import annotations

import argparse

from dualparal.cli.parser import complain
from dualparal.errors import DualParalError
from dualparal.paths import expand, not_empty
from dualparal.presets import load_presets


def add_presets(parser: argparse.ArgumentParser) -> None:
    """The flags of `presets`."""
    parser.add_argument("--presets_folder", type=not_empty, metavar="FOLDER", help="also read this folder")
    parser.add_argument("--check", action="store_true", help="ask the hub whether each model is there at the pinned commit")
    parser.set_defaults(run=run_presets)


def add_info(parser: argparse.ArgumentParser) -> None:
    """The flags of `info`."""
    parser.add_argument("video", type=not_empty, help="an mp4 that was made here")
    parser.set_defaults(run=run_info)


def add_tiny(parser: argparse.ArgumentParser) -> None:
    """The flags of `tiny`."""
    parser.add_argument("folder", type=not_empty, help="where it is written")
    parser.add_argument("--kind", choices=("t2v", "ti2v"), default="t2v", help="ti2v: as Wan2.2-TI2V-5B is (default: t2v)")
    parser.add_argument("--num_experts", type=int, choices=(1, 2), default=1, help="of its transformer (default: 1)")
    parser.add_argument("--num_layers", type=int, default=4, metavar="N", help="of the transformer (default: 4)")
    parser.add_argument("--num_heads", type=int, default=2, metavar="N", help="attention heads (default: 2)")
    parser.add_argument("--head_dim", type=int, default=12, metavar="N", help="channels of a head (default: 12)")
    parser.add_argument("--ffn_dim", type=int, default=48, metavar="N", help="channels of a feed-forward layer (default: 48)")
    parser.add_argument("--max_shard_size", default="10GB", help="split the DiT over files of this size, e.g. 20KB")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")
    parser.set_defaults(run=run_tiny)


def run_presets(options: argparse.Namespace) -> int:
    for name, preset in load_presets(options.presets_folder).items():
        print(f"{name:24} {preset.title}\n{'':24} {preset.model}; {preset.width}x{preset.height}, {preset.seconds:g} s, "
              f"{preset.num_inference_steps} steps\n{'':24} {preset.hardware}")  # fmt: skip
    return _check_presets(options.presets_folder) if options.check else 0


def _check_presets(folder: str | None) -> int:
    from dualparal.model.hub import check_revision

    pins = {(preset.model, preset.revision) for preset in load_presets(folder).values() if preset.model.count("/") == 1}
    code = 0
    for model, revision in sorted(pins, key=str):
        try:
            print(check_revision(model, revision), flush=True)
        except DualParalError as error:
            code = complain(error, 1)
    return code


def run_info(options: argparse.Namespace) -> int:
    from dualparal.media.metadata import format_info  # which imports PyAV

    print(format_info(options.video))
    return 0


def run_tiny(options: argparse.Namespace) -> int:
    from dualparal.model.tiny import write_tiny_checkpoint  # which imports torch

    values = {name: value for name, value in vars(options).items() if name not in ("run", "folder")}
    print(write_tiny_checkpoint(expand(options.folder), **values))
    return 0
