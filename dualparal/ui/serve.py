"""`python -m dualparal serve` and `app.py`: start the engine in the background, open the page at once, close both at the end.

Gradio's own variables (GRADIO_SERVER_PORT, GRADIO_SERVER_NAME, GRADIO_ROOT_PATH ...) hold where no flag is given.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from dualparal import __version__
from dualparal.cli_plan import add_low_memory_flags
from dualparal.errors import DualParalError
from dualparal.model.source import POCKET_WEIGHTS
from dualparal.presets import PACKAGE, Limits, Preset, find_preset, load_presets
from dualparal.runtime.devices import place
from dualparal.runtime.engine_options import TEXT_ENCODER_PLACES
from dualparal.runtime.journal import outputs_folder
from dualparal.runtime.logs import set_up_logs
from dualparal.runtime.metrics import metrics_text
from dualparal.runtime.torchrun import find_team
from dualparal.ui.choose import choose_for_this_host
from dualparal.ui.guard import Guard
from dualparal.ui.page import HERE, Page, theme
from dualparal.ui.studio import Studio

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine

log = logging.getLogger(__name__)

MAX_UPLOAD = "500mb"
MAX_PER_OWNER = 4  # one that runs and a few that wait: enough for a visitor, and thirty-two of them fill no queue alone
WAITING_CALLS = 256  # Gradio's own queue only carries calls; jobs wait in the engine's
TINY_PRESET = Preset(
    name="tiny", title="Tiny random model · 64×64",
    hardware="Any computer. Its weights are random: it shows how things work, not pictures.", dtype="float32",
    seconds=4.0, height=64, width=64, num_inference_steps=12, guidance_scale=3.0, num_per_block=4, num_cat=2,
    examples=("a red circle bouncing on a navy background",),
    limits=Limits(seconds=60, num_inference_steps=100, num_per_block=16, pixels=256 * 256),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(prog="dualparal serve", description="Serve the page and the API.")
    add = flags.add_argument
    add("--preset", "--model", "--model_id", dest="model", help="preset, hub id or folder (default: pocket)")
    add("--presets_folder", "--presets-folder", "--presets", type=Path, help="a folder of your own presets")
    add("--outputs", type=Path, help="folder of videos (default: DUALPARAL_OUTPUTS or ./outputs)")
    page = flags.add_argument_group("the page").add_argument
    page("--host", help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    page("--port", type=int, help="port (default: GRADIO_SERVER_PORT or the first free one from 7860)")
    page("--auth", metavar="USER:PASSWORD", help="ask for this login; several with commas")
    page("--root_path", "--root-path", help="path behind a proxy, such as /studio")
    engine = flags.add_argument_group("the engine").add_argument
    engine("--ranks", type=int, metavar="N", help="processes (GPUs) that share the model's layers (default: 1)")
    engine("--layer_split", "--layer-split", metavar="auto|N,N,...", help="layers per rank: fastest, or these (default: even)")
    engine("--replicas", type=int, default=1, metavar="N", help="independent groups of ranks behind one queue")
    engine("--device", default="auto", help="auto, cpu or cuda")
    engine("--dtype", help="dtype of the DiT (default: the preset's on GPUs, float32 on the CPU)")
    engine("--vae_dtype", help="dtype of the VAE (default: the preset's)")
    engine("--threads", type=int, metavar="N", help="CPU threads per process")
    engine("--attention", metavar="NAME", help="attention backend of diffusers: native, flash, sage, ...")
    engine("--compile", action="store_true", help="run layers through torch.compile")
    add_low_memory_flags(engine)
    engine("--text_encoder", choices=TEXT_ENCODER_PLACES, default="auto", help="where it is after encoding")
    engine("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="file, folder or hub id; repeatable")
    limits = flags.add_argument_group("the limits").add_argument
    limits("--max_queue", "--max-queue", type=int, default=32, metavar="N", help="most jobs that may wait")
    limits(
        "--max_per_owner", "--max-per-owner", type=_count_or_none, default=MAX_PER_OWNER, metavar="N",
        help=f"most jobs of one visitor at a time (default: {MAX_PER_OWNER}; 0 or none: no such limit)",
    )  # fmt: skip
    limits("--max_disk_gb", "--max-disk-gb", type=float, metavar="GB", help="delete the oldest videos above this")
    logs = flags.add_argument_group("the logs, on standard error").add_argument
    logs("--verbose", action="store_true", help="log what every worker does")
    logs("--log_json", "--log-json", action="store_true", help="log one JSON object a line, with worker and job id")
    return flags


def _count_or_none(text: str) -> int | None:
    """A number, None for "none" and for 0."""
    number = 0 if text == "none" else int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number or None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped. Returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        team = find_team()
        # A server tells what it does; its workers only when asked to.
        set_up_logs(verbose=True, as_json=arguments.log_json, worker=team.name if team else "front end")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        engine = open_engine(arguments)
    except DualParalError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if engine.team and not engine.team.is_front_end:
        return engine.host()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        engine.start(wait=False)
        engine.recover()  # what the last run of this server left undone
        device = place(arguments.device, 1)[0][0].split(":")[0]
        studio = Studio(engine, load_presets(arguments.presets_folder), device=device)
        page = launch(
            studio, host=arguments.host, port=arguments.port, auth=logins(arguments.auth), root_path=arguments.root_path
        )
        stopped.wait()
        page.close(verbose=False)
    except (DualParalError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        engine.close()
    return 0


def open_engine(arguments: argparse.Namespace) -> Engine:
    """The engine that the flags describe, checked but not started."""
    from dualparal.runtime.engine import Engine

    ranks, team = 1 if arguments.ranks is None else arguments.ranks, find_team()
    if arguments.model is None:
        model, preset, ranks = unasked(arguments, ranks, may_choose=team is None)
    else:
        model, preset = arguments.model, find_preset(arguments.model, load_presets(arguments.presets_folder))
    max_disk_bytes = None if arguments.max_disk_gb is None else int(arguments.max_disk_gb * 1e9)
    return Engine(
        model, preset=preset, ranks=ranks, replicas=arguments.replicas, device=arguments.device,
        dtype=arguments.dtype, vae_dtype=arguments.vae_dtype, threads=arguments.threads, attention=arguments.attention,
        compile=arguments.compile, quantization=arguments.quantization, offload=arguments.offload,
        offload_cache=arguments.offload_cache, text_encoder=arguments.text_encoder, loras=arguments.lora,
        layer_split=arguments.layer_split,
        outputs=arguments.outputs, max_queue=arguments.max_queue, max_per_owner=arguments.max_per_owner,
        max_disk_bytes=max_disk_bytes, auto_resume=True, verbose=arguments.verbose, log_json=arguments.log_json, team=team,
    )  # fmt: skip


def unasked(arguments: argparse.Namespace, ranks: int, *, may_choose: bool) -> tuple[str, Preset | None, int]:
    """Model, preset and ranks when no model was named: what the GPUs can take, or else the embedded one."""
    if may_choose and arguments.device != "cpu" and arguments.ranks is None and arguments.replicas == 1:
        setup = choose_for_this_host(load_presets(arguments.presets_folder))
        log.info("%s", setup.reason)
        if setup.preset is not None:
            return setup.preset.name, setup.preset, setup.ranks
    return *default_model(), ranks


def default_model() -> tuple[str, Preset | None]:
    """What opens when nothing is asked for: the trained pocket model, or a tiny random one where it is not installed."""
    if POCKET_WEIGHTS.is_dir() and "pocket" in (presets := load_presets()):
        return "pocket", presets["pocket"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dualparal" / f"tiny-{__version__}"
    if not (folder / "model_index.json").is_file():
        if not os.access(next(parent for parent in folder.parents if parent.is_dir()), os.W_OK):
            folder = Path(tempfile.mkdtemp(prefix="dualparal-")) / "tiny"
        log.info("no trained pocket model is installed; writing a tiny random one to %s", folder)
        command = [sys.executable, "-m", "dualparal", "tiny", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
        if made.returncode:
            raise DualParalError(f"the tiny model could not be written to {folder}: {made.stderr.strip()[-300:]}")
    return str(folder), TINY_PRESET


def launch(
    studio: Studio, *, host: str | None = None, port: int | None = None, auth: list[tuple[str, str]] | None = None,
    root_path: str | None = None, quiet: bool = False,
) -> gr.Blocks:  # fmt: skip
    """Open the page for `studio` in background threads and return it; `.local_url` is its address, `.close()` ends it."""
    outputs = outputs_folder(studio.outputs)
    outputs.mkdir(parents=True, exist_ok=True)
    root = root_path if root_path is not None else os.environ.get("GRADIO_ROOT_PATH", "")
    # Videos are served where they lie: Gradio would copy each one it shows, and hash it, into its own cache.
    gr.set_static_paths([outputs])
    page = Page(studio, root).build()
    page.queue(api_open=False, max_size=WAITING_CALLS, default_concurrency_limit=16)
    page.launch(
        server_name=host, server_port=port, root_path=root_path, auth=auth, prevent_thread_lock=True, quiet=quiet,
        allowed_paths=sorted({str(outputs), str(outputs.resolve())}), max_file_size=MAX_UPLOAD, show_error=False,
        strict_cors=True, enable_monitoring=False,
        run_history=False, ssr_mode=False, share=False, pwa=False, footer_links=["api", "settings"], theme=theme(),
        css=(HERE / "style.css").read_text(encoding="utf-8"),
        app_kwargs={"routes": health_routes(studio), "middleware": [Middleware(Guard)]},
        favicon_path=str(HERE / "favicon.svg"),
    )  # fmt: skip
    return page


def health_routes(studio: Studio) -> list[Route]:
    """/healthz: this process answers. /readyz: the model is loaded (503 until then). /metrics: for Prometheus."""

    async def healthz(_: Request) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def readyz(_: Request) -> JSONResponse:
        state = studio.engine.state
        about: dict[str, Any] = {"state": state, "model": studio.engine.preset.name}
        if state == "failed":
            about["error"] = studio.engine.error
        return JSONResponse(about, status_code=200 if state == "ready" else 503)

    def metrics(_: Request) -> PlainTextResponse:
        return PlainTextResponse(metrics_text(studio.engine), media_type="text/plain; version=0.0.4")

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def logins(text: str | None) -> list[tuple[str, str]] | None:
    """`user:password,user:password` as pairs; raises `DualParalError` for anything else."""
    if not text:
        return None
    pairs = [tuple(part.split(":", 1)) for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise DualParalError("--auth wants USER:PASSWORD, several separated by commas")
    return [(pair[0], pair[1]) for pair in pairs]
