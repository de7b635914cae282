"""The oldest client promised to work (docs/deployment.md), in an environment of its own; today's is in the other tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.visitors import Target

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OLDEST = "1.5.4"
ROOT = Path(__file__).parents[2]


def test_the_oldest_client_does_all_that_the_readme_shows(tmp_path: Path) -> None:
    environment = tmp_path / "client"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "-q", f"gradio_client=={OLDEST}"], check=True)
    with contextlib.closing(Target(tmp_path)) as server:
        command = [sys.executable, ROOT / "scripts" / "clients.py", server.url, environment]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{OLDEST} does everything" in done.stdout
