"""Pushes this source tree to a Hugging Face Space.

    python scripts/push_space.py --repo user/dualparal --dry-run
    python scripts/push_space.py --repo user/dualparal --sdk docker --hardware l40sx4 --volume user/dualparal-data

What git tracks is pushed, without tests and benchmarks; the README's front matter becomes the Space's. The token is
huggingface_hub's own (`hf auth login` or HF_TOKEN). With --dry-run nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import SpaceHardware

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".ci/", "tests/", "benchmarks/")
MAX_BYTES = 10**9  # of a Space's repository
MAX_DESCRIPTION = 60
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
DATA = "/data"  # where a volume is mounted
DATA_VARIABLES = {  # as in the Dockerfile
    "HF_HOME": f"{DATA}/huggingface", "DUALPARAL_OUTPUTS": f"{DATA}/outputs", "DUALPARAL_CACHE": f"{DATA}/cache",
}  # fmt: skip
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.S)
KNOWN_KEYS = {
    "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "app_port", "license",
    "suggested_hardware", "startup_duration_timeout", "short_description", "tags", "models", "pinned", "preload_from_hub",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What is to be made on the hub."""

    repo: str
    front_matter: dict[str, Any]
    files: tuple[str, ...]  # relative to the root
    hardware: str | None
    is_private: bool
    variables: dict[str, str]
    secrets: dict[str, str]
    volume: str | None  # a storage bucket


def main(argv: Sequence[str] | None = None) -> int:
    """Push or describe; 0, or 2 with one sentence for what does not fit a Space."""
    options = parser().parse_args(argv)
    try:
        space = describe(options)
        check(space)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(space))
    if options.dry_run:
        print("dry run: nothing was pushed")
        return 0
    print(push(space))
    return 0


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="push_space.py", description="Push this source tree to a Hugging Face Space.")
    add = flags.add_argument
    add("--repo", required=True, metavar="OWNER/NAME")
    add("--sdk", choices=("gradio", "docker"), help="kind of Space (default: the README's)")
    add("--hardware", choices=[hardware.value for hardware in SpaceHardware], help="ask for this hardware")
    add("--private", action="store_true")
    add("--variable", action="append", default=[], metavar="NAME=VALUE", help="public environment variable; repeatable")
    add(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="secret, its value taken from this environment; repeatable",
    )
    add("--volume", metavar="OWNER/BUCKET", help=f"storage bucket to mount at {DATA} for weights and videos")
    add("--dry_run", "--dry-run", action="store_true", help="say what would be pushed")
    return flags


def describe(options: argparse.Namespace) -> Space:
    """The Space that the flags ask for; raises ValueError for a malformed one."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        raise ValueError(f"repo={options.repo!r} is not OWNER/NAME")
    front_matter = read_front_matter((ROOT / "README.md").read_text(encoding="utf-8"))
    if options.sdk == "docker":
        for key in ("sdk_version", "python_version", "app_file"):
            front_matter.pop(key, None)
        front_matter |= {"sdk": "docker", "app_port": 7860}
    malformed = [text for text in options.variable if "=" not in text]
    if malformed:
        raise ValueError(f"variable={malformed[0]!r} is not NAME=VALUE")
    missing = [name for name in options.secret if name not in os.environ]
    if missing:
        raise ValueError(f"secret {missing[0]} is not set in this environment")
    given = dict(text.split("=", 1) for text in options.variable)
    return Space(
        repo=options.repo, front_matter=front_matter, files=tracked_files(ROOT), hardware=options.hardware,
        is_private=options.private, variables={**(DATA_VARIABLES if options.volume else {}), **given},
        secrets={name: os.environ[name] for name in options.secret}, volume=options.volume,
    )  # fmt: skip


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    found = FRONT_MATTER.match(text)
    if found is None:
        raise ValueError("README.md does not begin with a Space's front matter (--- ... ---)")
    values = yaml.safe_load(found.group(1))
    if not isinstance(values, dict):
        raise ValueError("README.md's front matter holds no keys")
    return values


def tracked_files(root: Path) -> tuple[str, ...]:
    """What git tracks and a Space needs."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    names = [name for name in listed.split("\0") if name and not name.startswith(LEFT_OUT) and (root / name).is_file()]
    return tuple(names)


def check(space: Space) -> None:
    """Raise ValueError for what the hub would refuse or not run, before anything is sent."""
    values = space.front_matter
    if unknown := sorted(set(values) - KNOWN_KEYS):
        raise ValueError(f"front matter: unknown key {unknown[0]!r}")
    for key in ("title", "emoji", "sdk", "license"):
        if not values.get(key):
            raise ValueError(f"front matter: {key} is missing")
    for key in ("colorFrom", "colorTo"):
        if values.get(key) not in COLOURS:
            raise ValueError(f"front matter: {key}={values.get(key)!r}; use {', '.join(COLOURS)}")
    hardware = {item.value for item in SpaceHardware}
    if values.get("suggested_hardware") not in hardware | {None}:
        raise ValueError(
            f"front matter: suggested_hardware={values['suggested_hardware']!r}; use {', '.join(sorted(hardware))}"
        )
    if not re.fullmatch(r"\d+(s|m|h|d)?", str(values.get("startup_duration_timeout", "30m"))):
        raise ValueError(f"front matter: startup_duration_timeout={values['startup_duration_timeout']!r}; write e.g. 1h")
    if len(str(values.get("short_description", ""))) > MAX_DESCRIPTION:
        raise ValueError(f"front matter: short_description has more than {MAX_DESCRIPTION} characters")
    needed = ("Dockerfile",) if values["sdk"] == "docker" else (str(values.get("app_file", "app.py")), "requirements.txt")
    for name in needed:
        if name not in space.files:
            raise ValueError(f"{name} is not tracked by git; a {values['sdk']} Space needs it")
    if (total := total_bytes(space)) > MAX_BYTES:
        raise ValueError(f"the files take {total / 1e6:.0f} MB; a Space's repository may hold {MAX_BYTES / 1e6:.0f} MB")


def total_bytes(space: Space) -> int:
    return sum((ROOT / name).stat().st_size for name in space.files)


def summary(space: Space) -> str:
    """For people: what goes where. Secrets are named, never shown."""
    largest = sorted(space.files, key=lambda name: (ROOT / name).stat().st_size, reverse=True)[:5]
    lines = [
        f"Space {space.repo} ({space.front_matter['sdk']}, {'private' if space.is_private else 'public'})",
        f"  hardware: {space.hardware or 'as it is'} (suggested: {space.front_matter.get('suggested_hardware', 'none')})",
        f"  volume: {space.volume or 'none: weights and videos are lost with every restart'}",
        *(f"  variable {name}={value}" for name, value in space.variables.items()),
        *(f"  secret {name}" for name in space.secrets),
        f"  {len(space.files)} files, {total_bytes(space) / 1e6:.1f} MB; the largest:",
        *(f"    {(ROOT / name).stat().st_size / 1e6:8.3f} MB  {name}" for name in largest),
    ]
    return "\n".join(lines)


def stage(space: Space, folder: Path) -> None:
    """Lay the files out in `folder` as the Space will hold them."""
    for name in space.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_dump(space.front_matter, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(FRONT_MATTER.sub(lambda _: f"---\n{front}---\n", readme), encoding="utf-8")


def push(space: Space) -> str:
    """Make or update the Space; returns its address."""
    from huggingface_hub import HfApi, Volume

    api = HfApi()
    # Settings first: the Space is built as soon as files come.
    url = api.create_repo(
        space.repo, repo_type="space", space_sdk=space.front_matter["sdk"], private=space.is_private, exist_ok=True
    )
    for name, value in space.variables.items():
        api.add_space_variable(space.repo, name, value)
    for name, value in space.secrets.items():
        api.add_space_secret(space.repo, name, value)
    if space.volume:
        api.set_space_volumes(space.repo, volumes=[Volume(type="bucket", source=space.volume, mount_path=DATA)])
    with tempfile.TemporaryDirectory() as folder:
        stage(space, Path(folder))
        api.upload_folder(
            repo_id=space.repo,
            repo_type="space",
            folder_path=folder,
            delete_patterns="*",
            commit_message="Push DualParal Studio",
        )
    if space.hardware:
        api.request_space_hardware(space.repo, SpaceHardware(space.hardware))
    return str(url)


if __name__ == "__main__":
    sys.exit(main())
