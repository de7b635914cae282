"""Whether a change keeps the bits of videos: digests of pocket videos by schedule and number of ranks, on one machine.

`python -m benchmarks.digests before.json` at one commit, `python -m benchmarks.digests after.json --against before.json` at
another: exit code 1 when latents differ. Digests of two machines are not comparable: their processors multiply differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest

CASES: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "paper", "context": "recomputed"},
    "preview": {
        "schedule": "preview", "context": "recomputed", "max_in_flight": 3, "stagger": 3, "micro_batches": True,
    },
    "paper, micro-batches": {"schedule": "paper", "context": "recomputed", "micro_batches": True},
    "step caching": {"schedule": "paper", "context": "recomputed", "cache_interval": 2, "num_inference_steps": 8},
    "guidance interval": {"schedule": "paper", "context": "recomputed", "guidance_start": 0.2, "guidance_stop": 0.8},
    "one block": {"schedule": "paper", "context": "recomputed", "latents_num": 6},
    "cached context": {"schedule": "paper", "context": "cached"},
}  # fmt: skip
ALIKE = {"latents_num": 29, "num_inference_steps": 6, "num_per_block": 8, "num_cat": 4, "seed": 3}


def digests(ranks: int, cases: Mapping[str, dict[str, Any]] = CASES) -> dict[str, str]:
    """The digest of each case's latents on `ranks` ranks."""
    found = {}
    with tempfile.TemporaryDirectory() as outputs, Engine("pocket", ranks=ranks, device="cpu", threads=1, outputs=outputs) as e:
        for name, fields in cases.items():
            request = GenerationRequest(prompt="a red circle bouncing on a navy background", **{**ALIKE, **fields})
            latents = e.submit(request, return_latents=True).result().latents
            assert latents is not None
            found[name] = hashlib.sha256(latents.numpy().tobytes()).hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="digests of another commit on this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    print(hardware(), flush=True)
    found = {str(ranks): digests(ranks) for ranks in options.ranks}
    options.out.write_text(json.dumps(found, indent=1))
    rows = [[name, *(found[ranks][name] for ranks in found)] for name in CASES]
    print(table(["case", *(f"{ranks} ranks" for ranks in found)], rows))
    before = json.loads(options.against.read_text()) if options.against else {}
    changed = [
        f"{name} on {r} ranks" for r, cases in before.items() for name in cases if found.get(r, {}).get(name) != cases[name]
    ]
    unlike = [row[0] for row in rows if len(set(row[1:])) > 1]
    for what, names in (("changed", changed), ("differ between numbers of ranks", unlike)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return int(bool(changed or unlike))


if __name__ == "__main__":
    sys.exit(main())
