"""`serve` and `app.py`: flags that reach the engine, and logs for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualparal.cli.flags import make_engine
from dualparal.cli.main import make_parser
from dualparal.ui import serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("flags", "is_json", "is_verbose"), [
    ([], False, False), (["--log_json"], True, False), (["--log-json", "--verbose"], True, True), (["--verbose"], False, True),
])  # fmt: skip
def test_log_flags_reach_the_workers(tiny: Path, tmp_path: Path, flags: list[str], is_json: bool, is_verbose: bool) -> None:
    where = ["--preset", str(tiny), "--device", "cpu", "--outputs", str(tmp_path)]
    engine = serve.open_engine(serve.parser().parse_args([*where, *flags]))
    assert (engine._setup.options.engine.log_json, engine._setup.options.engine.verbose) == (is_json, is_verbose)
    words = ["generate", "--prompt", "x", "--model_id", str(tiny), *where[2:], *flags]
    options = make_parser().parse_args(words)
    engine = make_engine(options)
    assert (engine._setup.options.engine.log_json, engine._setup.options.engine.verbose) == (is_json, is_verbose)


@pytest.mark.parametrize(
    ("flags", "limit"),
    [([], 4), (["--max-per-owner", "7"], 7), (["--max_per_owner", "0"], None), (["--max_per_owner=none"], None)],
)
def test_a_visitor_has_a_limit_unless_it_is_lifted(tiny: Path, tmp_path: Path, flags: list[str], limit: int | None) -> None:
    where = ["--preset", str(tiny), "--device", "cpu", "--outputs", str(tmp_path)]
    engine = serve.open_engine(serve.parser().parse_args([*where, *flags]))
    assert engine.dispatcher.queue.max_per_owner == limit


@pytest.mark.parametrize("wrong", ["-1", "few", "1.5", ""])
def test_a_limit_is_a_number(wrong: str) -> None:
    with pytest.raises(SystemExit):
        serve.parser().parse_args([f"--max_per_owner={wrong}"])


@pytest.mark.parametrize("program", [["-m", "dualparal", "serve"], ["app.py"]])
def test_the_front_end_logs_json(tmp_path: Path, program: list[str]) -> None:
    """A real line of a server that ends soon: it says which model it has chosen, and that there is no such LoRA."""
    command = [sys.executable, *program, "--log-json", "--lora", "none", "--outputs", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "there is no LoRA none" in done.stderr
    line, *others = [json.loads(line) for line in done.stderr.splitlines()]
    assert others[-1]["level"] == "error" and "there is no LoRA none" in others[-1]["message"]
    assert (line["level"], line["worker"], line["logger"]) == ("info", "front end", "dualparal.ui.serve")
    assert line["message"] and line["job"] is None
