"""`python -m dualparal serve` and `app.py`: start the engine in the background, open the page at once, close both at the end.

Gradio's own variables (GRADIO_SERVER_PORT, GRADIO_SERVER_NAME, GRADIO_ROOT_PATH ...) hold where no flag is given.
"""

from __future__ import annotations

import argparse
import html
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.utils import get_upload_folder
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from dualparal import __version__
from dualparal.cli.flags import add_fields, add_model_flags, find_asked, given
from dualparal.cli.parser import Parser
from dualparal.devices import place
from dualparal.engine.metrics import metrics_text
from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.hosts.torchrun import find_team
from dualparal.jobs.folder import outputs_folder
from dualparal.logs import set_up_logs
from dualparal.model.source import POCKET_WEIGHTS
from dualparal.options import EngineOptions, of
from dualparal.paths import is_file, is_folder, not_empty
from dualparal.planning.calibration import cache_folder
from dualparal.planning.choose import choose_for_this_host
from dualparal.presets import PACKAGE, Limits, Preset, load_presets
from dualparal.ui.guard import refused, unfit
from dualparal.ui.http import mcp
from dualparal.ui.http.bodies import MAX_UPLOAD_BYTES, Uploads
from dualparal.ui.http.server import layers, own_server
from dualparal.ui.http.sessions import MAX_SESSIONS, bound_memory
from dualparal.ui.http.sites import Sites
from dualparal.ui.http.surroundings import PORT, host_of, is_port, private_folder, root_of, set_aside
from dualparal.ui.page import HERE, Page, theme
from dualparal.ui.studio import Studio
from dualparal.ui.v1.keys import VARIABLE, Access, read_keys
from dualparal.ui.v1.routes import mount
from dualparal.ui.visitors import MAX_JOBS

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

log = logging.getLogger(__name__)

# One that runs and a few that wait: enough for a visitor, and thirty-two of them fill no queue alone.
OF_A_SERVER = {"max_per_owner": 4, "auto_resume": True}
IN_HEAD = ("storage", "keys", "away")  # scripts that run before the page is there
STYLES = ("style", "timeline", "side_by_side")
MAX_CALLS = 2048  # under way at once: who follows a job holds one of them, which is a place in a list and no thread
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
    flags = Parser(prog="dualparal serve", description="Serve the page and the API.")
    add_model_flags(flags.add_argument_group("the model").add_argument)
    page = flags.add_argument_group("the page").add_argument
    page("--host", type=not_empty, help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    page("--port", type=_port, metavar="N", help="port (default: GRADIO_SERVER_PORT or the first free one from 7860)")
    page("--auth", metavar="USER:PASSWORD", help="ask for this login; several with commas")
    page(
        "--api_key", action="append", type=not_empty, metavar="KEY", default=[],
        help=f"let nobody call /v1 without this bearer token, whose owner it makes of its own; repeatable, @FILE: a key a line "
        f"(also from {VARIABLE})",
    )  # fmt: skip
    page("--mcp", action="store_true", help="serve the API as tools for assistants too (MCP); needs the package mcp")
    page("--root_path", help="path behind a proxy, such as /studio")
    page(
        "--allowed_hosts",
        metavar="NAME,...",
        default="",
        help="names it answers to besides addresses ('*': any)",
    )
    page("--allowed_origins", metavar="URL,...", default="", help="other sites that may call it")
    page(
        "--max_per_address", type=_count_or_none, default=MAX_JOBS, metavar="N",
        help=f"most jobs from one network address at a time (default: {MAX_JOBS}; 0 or none: no such limit)",
    )  # fmt: skip
    for title, whose in (("the engine", "job"), ("the limits", "server"), ("the folders and logs", "host")):
        add_fields(flags.add_argument_group(title).add_argument, EngineOptions, of(whose), defaults=OF_A_SERVER)
    return flags


def _port(text: str) -> int:
    if not is_port(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 1 to 65535")
    return int(text)


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
        name = team.name if team else "front end"
        set_up_logs(verbose=True, as_json=bool(arguments.log_json), worker=name, owns_streams=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        if (named := os.environ.get(PORT)) and not is_port(named):
            raise RequestError(f"{PORT}={named!r} is no port; use 1 to 65535", "port")
        sites, login, presets = sites_of(arguments), logins(arguments.auth), load_presets(arguments.presets_folder)
        keys = read_keys(arguments.api_key, os.environ.get(VARIABLE))
        if arguments.mcp:
            mcp.check_can_serve(has_logins=login is not None)
        engine = open_engine(arguments)
    except (DualParalError, OSError) as error:
        set_up_logs(
            verbose=True, as_json=bool(arguments.log_json), owns_streams=True
        )  # not yet done where torchrun's words are wrong
        log.error("%s", error)
        return 2
    if engine.team and not engine.team.is_front_end:
        return engine.host()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with private_folder():
            engine.start(wait=False)
            engine.recover()  # what the last run of this server left undone
            device = place(arguments.device or "auto", 1)[0][0].split(":")[0]
            studio = Studio(
                engine, presets, device=device, max_per_address=arguments.max_per_address,
                operator_key=os.environ.get("DUALPARAL_OPERATOR_KEY", ""),
            )  # fmt: skip
            page = launch(
                studio, host=arguments.host, port=arguments.port, auth=login, root_path=arguments.root_path, sites=sites,
                keys=keys, has_tools=arguments.mcp,
            )  # fmt: skip
            stopped.wait()
            page.close(verbose=False)
    except (DualParalError, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        engine.close()
    return 0


def sites_of(arguments: argparse.Namespace) -> Sites:
    """Who may speak to the server that the flags describe."""
    return Sites.of(
        filter(None, arguments.allowed_hosts.split(",")), filter(None, arguments.allowed_origins.split(",")),
        listens_at=arguments.host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), space_host=os.environ.get("SPACE_HOST"),
    )  # fmt: skip


def open_engine(arguments: argparse.Namespace) -> Engine:
    """The engine that the flags describe, checked but not started."""
    from dualparal.engine.engine import Engine

    preset: Preset | None
    asked, team = EngineOptions(**{**OF_A_SERVER, **given(EngineOptions, arguments)}), find_team()
    if arguments.model_id or arguments.preset:
        model, preset = find_asked(arguments)
    else:
        model, preset, ranks = unasked(arguments, asked.ranks, may_choose=team is None)
        asked = asked.settled(ranks=ranks)
    return Engine(model, preset=preset, team=team, **dict(asked))


def unasked(arguments: argparse.Namespace, ranks: int, *, may_choose: bool) -> tuple[str, Preset | None, int]:
    """Model, preset and ranks when no model was named: what the GPUs can take, or else the embedded one."""
    if may_choose and arguments.device != "cpu" and arguments.ranks is None and arguments.replicas in (None, 1):
        setup = choose_for_this_host(load_presets(arguments.presets_folder))
        log.info("%s", setup.reason)
        if setup.preset is not None:
            return setup.preset.name, setup.preset, setup.ranks
    return *default_model(), ranks


def default_model() -> tuple[str, Preset | None]:
    """What opens when nothing is asked for: the trained pocket model, or a tiny random one where it is not installed."""
    if POCKET_WEIGHTS.is_dir() and "pocket" in (presets := load_presets()):
        return "pocket", presets["pocket"]
    folder = cache_folder() / f"tiny-{__version__}"
    if not is_file(folder / "model_index.json"):
        if not os.access(next(parent for parent in folder.parents if is_folder(parent)), os.W_OK):
            folder = Path(tempfile.mkdtemp(prefix="dualparal-")) / "tiny"
        log.info("no trained pocket model is installed; writing a tiny random one to %s", folder)
        command = [sys.executable, "-m", "dualparal", "tiny", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
        if made.returncode:
            raise DualParalError(f"the tiny model could not be written to {folder}: {made.stderr.strip()[-300:]}")
    return str(folder), TINY_PRESET


def launch(
    studio: Studio, *, host: str | None = None, port: int | None = None, auth: list[tuple[str, str]] | None = None,
    root_path: str | None = None, quiet: bool = False, sites: Sites | None = None, keys: tuple[str, ...] = (),
    has_tools: bool = False,
) -> gr.Blocks:  # fmt: skip
    """Open the page for `studio` in background threads and return it; `.local_url` is its address, `.close()` ends it."""
    outputs = outputs_folder(studio.outputs)
    try:
        str(outputs).encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"the outputs folder's name, {str(outputs)!a}, is not UTF-8, and no browser could ask for its videos; name another "
            "one with --outputs"
        ) from None
    outputs.mkdir(parents=True, exist_ok=True)
    root = root_of(root_path if root_path is not None else os.environ.get("GRADIO_ROOT_PATH", ""))
    host = host_of(host or os.environ.get("GRADIO_SERVER_NAME"))
    # Videos are served where they lie: Gradio would copy each one it shows, and hash it, into its own cache.
    gr.set_static_paths([outputs])
    page = Page(studio, root).build()
    page.queue(api_open=False, max_size=WAITING_CALLS, default_concurrency_limit=16)
    bound_memory(page)
    uploads, access = Uploads(Path(get_upload_folder())), Access(studio, keys)
    uploads.clean()
    with own_server(), set_aside():
        page.launch(
            server_name=host, server_port=port, root_path=root, auth=auth, prevent_thread_lock=True, quiet=quiet,
            allowed_paths=sorted({str(outputs), str(outputs.resolve())}), max_file_size=MAX_UPLOAD_BYTES, show_error=False,
            strict_cors=True, enable_monitoring=False, state_session_capacity=MAX_SESSIONS, max_threads=MAX_CALLS,
            run_history=False, ssr_mode=False, share=False, pwa=False, footer_links=["api", "settings"], theme=theme(),
            css="".join((HERE / f"{name}.css").read_text(encoding="utf-8") for name in STYLES),
            head=in_head(root),
            app_kwargs={
                "routes": [*health_routes(studio), mount(access, root)],
                "middleware": layers(sites or Sites.of(), uploads, access.owner),
                "exception_handlers": {RequestValidationError: unfit, HTTPException: refused},
            },
            mcp_server=has_tools, favicon_path=str(HERE / "favicon.svg"),
        )  # fmt: skip
    if has_tools:
        mcp.set_up(page)
    return page


def in_head(root: str) -> str:
    """What the page's head holds besides Gradio's: where the server is, for scripts that run before the page is there."""
    place = html.escape(f"{root.rstrip('/')}/" if root else "", quote=True)
    scripts = "".join(f"<script>{(HERE / f'{name}.js').read_text(encoding='utf-8')}</script>" for name in IN_HEAD)
    return f'<meta name="dualparal-root" content="{place}">{scripts}'


def health_routes(studio: Studio) -> list[Route]:
    """/healthz: this process answers, and its supervisors and queue move (503: start it anew).
    /readyz: the model is loaded (503 until then). /metrics: for Prometheus."""

    run = {"X-Run": secrets.token_hex(8)}  # a page that was open before this process is opened anew

    async def healthz(_: Request) -> JSONResponse:
        if (reason := studio.engine.stuck) is not None:
            return JSONResponse({"status": "stuck", "reason": reason}, status_code=503, headers=run)
        return JSONResponse({"status": "alive"}, headers=run)

    async def readyz(_: Request) -> JSONResponse:
        state = studio.engine.state
        about: dict[str, Any] = {"state": state, "model": studio.engine.preset.name}
        if state == "failed":
            about["error"] = studio.engine.error
        if (reason := studio.engine.stuck) is not None:
            about["stuck"] = reason
        return JSONResponse(about, status_code=200 if state == "ready" and reason is None else 503)

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
