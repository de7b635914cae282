"""The README and docs against the program: commands parse, flags and presets exist, links lead somewhere, messages are said."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualparal.cli import main as cli
from dualparal.presets import load_presets
from dualparal.ui import serve

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
SCRIPTS = sorted((ROOT / "examples").glob("*.*"))
FENCE = re.compile(r"```bash\n(.*?)```", re.S)
STARTS = re.compile(r"(?:\S*python3? (?:-m dualparal|app\.py|scripts/\w+\.py)|^dualparal|-m dualparal)(?=\s|$)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
OTHERS_FLAGS = {  # of torchrun, docker, pip, pytest, ruff, srun and debootstrap
    "--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port", "--max-restarts", "--rdzv-backend",
    "--rdzv-endpoint", "--rdzv-id", "--gpus", "--shm-size", "--build-arg", "--check", "--no-deps", "--requeue", "--network",
    "--variant", "--include",
}  # fmt: skip


def commands(text: str) -> Iterator[str]:
    """Shell commands of a page's bash blocks: continued lines joined, comments dropped, split at && and pipes."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|\|\|?|;", line.split(" #")[0]) if part.strip())


def our_arguments(command: str) -> list[str] | None:
    """The words after our program's name in `command`; None when it runs something else."""
    found = STARTS.search(command)
    if found is None or command.startswith(("pip", "docker build")):
        return None
    rest = command[found.end() :].replace("...", " ")
    words = shlex.split(rest.rstrip("'") if rest.count("'") % 2 else rest)  # the end of bash -c '...'
    name = found.group(0).split()[-1]
    return ["serve", *words] if name == "app.py" else [name, *words] if name.startswith("scripts/") else words


def parse(words: list[str]) -> None:
    """Parse as the program would; SystemExit or an error when it cannot."""
    if words and words[0] == "serve":
        serve.parser().parse_args(words[1:])
    elif words and words[0].startswith("scripts/"):
        done = subprocess.run(
            [sys.executable, ROOT / words[0], "--help"], capture_output=True, text=True, check=True, timeout=120
        )
        missing = [word for word in words[1:] if word.startswith("--") and word not in done.stdout]
        assert not missing, missing
    elif words and words[0] != "bench":
        cli.make_parser().parse_args(words)


def known_flags() -> set[str]:
    """Every flag of the command line, of serve, of scripts and of benchmarks, with underscores and with dashes."""
    parsers = [cli.make_parser(), serve.parser()]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    flags = {
        flag for parser in parsers for action in parser._actions for flag in action.option_strings if flag.startswith("--")
    }
    for script in (*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "dualparal").rglob("*.py")):
        flags |= set(re.findall(r'"(--[a-z_-]+)"', script.read_text(encoding="utf-8")))
    return flags | {"--" + flag[2:].replace("_", "-") for flag in flags} | {"--dist"}  # pytest-xdist's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        words = our_arguments(command)
        if not words:
            continue
        try:
            parse(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")


def test_the_docs_hold_commands() -> None:
    """The tests above see what a reader sees."""
    found = [
        words for page in PAGES for command in commands(page.read_text(encoding="utf-8")) if (words := our_arguments(command))
    ]
    assert len(found) > 15
    assert {words[0] for words in found} >= {"generate", "serve", "plan", "resume", "presets", "info"}
    assert any("--node-rank" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_every_flag_and_preset_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.suffix in (".md", ".sbatch", ".yaml"):
        text = re.sub(r"(?m)^#SBATCH.*$|kubectl.*$", "", text)
        unknown = set(FLAG.findall(text)) - known_flags() - OTHERS_FLAGS
        assert not unknown, f"{page.name} speaks of {sorted(unknown)}"
    named = set(re.findall(r"(?<![\w/-])wan2\.\d-[a-z0-9.]+-\d+p\b", text))
    assert named <= set(load_presets()), f"{page.name} speaks of {sorted(named - set(load_presets()))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    for pair in LINK.findall(page.read_text(encoding="utf-8")):
        target = (pair[0] or pair[1]).partition("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_docs_name_is_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:dualparal|tests|benchmarks|docs|examples|scripts|presets|\.ci)/[\w./-]*)`", text):
            assert (ROOT / name.rstrip("/")).exists(), f"{page.name}: {name}"
        for module in re.findall(r"(?:-m |`)(benchmarks\.[a-z_]+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


def test_errors_of_the_troubleshooting_page_are_said_somewhere() -> None:
    """Each message in a row's first cell holds words that the source says too."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dualparal").rglob("*.py"))
    said = re.sub(r"\{[^{}]*\}", "{}", re.sub(r'"\n *f?"', "", source))
    cells = re.findall(r"(?m)^\| (.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 100
    for message in messages:
        pieces = [piece.strip(" .,:;") for piece in re.split(r"\.\.\.|=?'?\b\d[\w.]*|host-[ab]|dtype=|\(", message)]
        longest = max(pieces, key=len)
        words = longest.split()
        spans = [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]
        assert any(span in said for span in spans), f"nothing in the source says {message!r}"


def test_the_examples_run_torchrun_and_nothing_else() -> None:
    for name in ("slurm.sbatch", "kubernetes.yaml"):
        text = (ROOT / "examples" / name).read_text(encoding="utf-8").replace("\\\n", " ")
        launched = re.search(r"torchrun .*?-m dualparal (serve[^'\n]*(?:\n +[^-\n]*--[^\n]*)?)", text, re.S)
        assert launched is not None, name
        serve.parser().parse_args(shlex.split(launched.group(1))[1:])
