"""Runs the Dockerfile's steps in a plain root folder, where no Docker engine is at hand. Wants Linux, root, mount and ip.

    debootstrap --variant=minbase --include=python3-venv,ca-certificates bookworm /tmp/root
    python scripts/dockerfile_in_chroot.py /tmp/root --build-arg VARIANT=cpu --env TORCH_INDEX= \\
        --then 'python examples/save_video.py "a red circle" /tmp/video.mp4'

The folder stands for the base image. RUN and COPY (less what .dockerignore names) are done in it; then CMD runs as process 1
with a network of its own, HEALTHCHECK is asked until it is content, `--then` runs beside them, and what was written is listed.
`--env` wins over ENV: for an index that cannot be reached, and for pip's own settings. `--bind` shows the host's folders.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[1]
NEWNS, NEWPID, NEWNET, DIES_WITH_PARENT = 0x00020000, 0x20000000, 0x40000000, 1  # sched.h, sys/prctl.h
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
libc = ctypes.CDLL(None)
HEALTHY_WITHIN_S, STOPPED_WITHIN_S = 1800, 10  # the Dockerfile's start period; `docker stop` kills after these


def steps(text: str, arguments: dict[str, str]) -> list[tuple[str, str]]:
    """(instruction, rest) of the last stage, after those of the stages it is built on."""
    stages: dict[str, list[tuple[str, str]]] = {}
    name, values = "", {}
    for line in re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ARG" and not name:
            key, _, default = rest.partition("=")
            values[key] = arguments.get(key, default)
        elif word == "FROM":
            base, *alias = Template(rest).substitute(values).split()
            name = alias[-1] if alias else "last"
            stages[name] = list(stages.get(base, []))
        elif word:
            stages[name].append((word, rest.strip()))
    return stages[name]


def context(folder: Path, ignore: str) -> Iterator[str]:
    """Folders and files of the build context, relative: all but what .dockerignore's lines name, and what lies in it."""
    parts = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    patterns = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    regexes = ["".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*|\?)", text)) for text in patterns]
    ignored = re.compile("|".join(regexes) or "(?!)")
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not ignored.fullmatch(str(here / name))]
        yield from (str(here / name) for name in [*folders, *files] if not ignored.fullmatch(str(here / name)))


class Container:
    """A root folder with what a Dockerfile's lines have set so far."""

    def __init__(self, root: Path, forced: dict[str, str]) -> None:
        self.root, self.forced, self.env = root, forced, {"PATH": BASE_PATH, "HOME": "/root", **forced}
        self.folder, self.uid = "/", 0
        self.words = {"SHELL": ["/bin/sh", "-c"], "CMD": [], "HEALTHCHECK": []}

    def start(self, words: Sequence[str], before: Callable[[], object] = bool, **streams: int) -> subprocess.Popen[bytes]:
        def enter() -> None:
            before()
            os.chroot(self.root)
            os.chdir(self.folder)
            os.setgroups([])
            os.setgid(self.uid)  # useradd gives a user a group of the same number
            os.setuid(self.uid)
            libc.prctl(DIES_WITH_PARENT, signal.SIGKILL)

        # One thread, so that Python code may run between fork and exec.
        return subprocess.Popen(words, env=self.env, stdin=subprocess.DEVNULL, preexec_fn=enter, **streams)  # noqa: PLW1509

    def do(self, word: str, rest: str) -> None:
        """One instruction; one that is not known is an error, so that none is passed over in silence."""
        if word == "RUN":
            if code := self.start([*self.words["SHELL"], rest]).wait():
                raise SystemExit(f"exit code {code}: {rest}")
        elif word == "ENV":
            pairs = [Template(pair).safe_substitute(self.env).partition("=") for pair in shlex.split(rest)]
            self.env |= {key: value for key, _, value in pairs} | self.forced
        elif word == "COPY":
            owner, *sources, target = rest.removeprefix("--chown=").split()
            for name in context(ROOT, (ROOT / ".dockerignore").read_text(encoding="utf-8")):
                if sources == ["."] or name in sources:
                    path = Path(os.path.normpath(f"{self.root}{self.folder}/{target}/{name}"))
                    if (ROOT / name).is_dir():
                        path.mkdir(exist_ok=True)
                    else:
                        shutil.copy2(ROOT / name, path)
                    os.chown(path, *map(int, owner.split(":")))
        elif word == "USER":
            users = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
            self.uid, self.env["HOME"] = next((int(user[2]), user[5]) for user in users if rest in (user[0], user[2]))
        elif word == "WORKDIR":
            self.folder = rest
        elif word in self.words:
            self.words[word] = json.loads(rest[rest.index("[") :])
        elif word not in ("VOLUME", "EXPOSE"):
            raise SystemExit(f"{word} is not known to this script")

    def written_since(self, clock_s: float) -> Iterator[str]:
        """Files of the root that are newer, without those of what is mounted into it."""
        for parent, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not os.path.ismount(os.path.join(parent, name)))
            yield from (path for path in (f"{parent}/{name}" for name in files) if os.lstat(path).st_ctime > clock_s)


def serve(container: Container, then: str) -> int:
    """CMD, HEALTHCHECK, `then`, what they wrote, and an end as by `docker stop`; returns `then`'s exit code."""
    assert libc.unshare(NEWNET) == 0  # any port is free, and nothing can be downloaded
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert libc.unshare(NEWPID) == 0  # the next process that starts is number 1, and all later ones are beside it
    clock_s, start_s = time.time(), time.monotonic()
    proc = shlex.quote(str(container.root / "proc"))
    server = container.start(container.words["CMD"], before=lambda: os.system(f"mount -t proc proc {proc}"))
    try:
        while container.start(container.words["HEALTHCHECK"], stderr=subprocess.DEVNULL).wait():
            time.sleep(2)
            if server.poll() is not None or time.monotonic() > start_s + HEALTHY_WITHIN_S:
                raise SystemExit(f"not healthy after {time.monotonic() - start_s:.0f} s; CMD's exit code: {server.poll()}")
        print(f"== healthy after {time.monotonic() - start_s:.0f} s", flush=True)
        code = container.start([*container.words["SHELL"], then]).wait()
        print("== written:", *container.written_since(clock_s), sep="\n   ", flush=True)
        server.terminate()
        print("== stopped with exit code", server.wait(STOPPED_WITHIN_S))
    finally:
        server.kill()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description="Run the Dockerfile's steps in a root folder.")
    flags.add_argument("root", type=Path, help="folder with a base system, such as debootstrap's")
    for name, metavar in (("--build-arg", "NAME=VALUE"), ("--env", "NAME=VALUE"), ("--bind", "FOLDER")):
        flags.add_argument(name, action="append", default=[], metavar=metavar)
    flags.add_argument("--then", default="true", metavar="COMMAND", help="run in the container once it is healthy")
    options = flags.parse_args(argv)
    container = Container(options.root.resolve(), dict(pair.split("=", 1) for pair in options.env))
    assert libc.unshare(NEWNS) == 0, "only root may do this"
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)  # what is mounted below ends with this process
    for folder in ("/dev", "/proc", *options.bind):
        (container.root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", folder, container.root / folder.lstrip("/")], check=True)
    (container.root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # as Docker writes it
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for word, rest in steps(text, dict(pair.split("=", 1) for pair in options.build_arg)):
        print(f"== {word} {rest}", flush=True)
        container.do(word, rest)
    return serve(container, options.then)


if __name__ == "__main__":
    sys.exit(main())
