"""The page: layout and wiring. What things say is in panels.py, what they may do in studio.py.

Every tab follows one job at a time. The browser keeps an owner token (local storage, shared by its tabs) and each tab the id of
the job it shows (session storage), so a reload finds the job again and two tabs do not disturb each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from dualparal.errors import DualParalError, RequestError
from dualparal.files import CLIP
from dualparal.media.metadata import read_settings
from dualparal.presets import USUAL
from dualparal.ui import api, draft, form, owners, panels, timeline
from dualparal.ui.exports import Exports
from dualparal.ui.live_video import LiveVideo
from dualparal.ui.shelf import BUTTONS_JS, CARRIED_JS, Shelf
from dualparal.ui.side_by_side import SideBySide
from dualparal.ui.steering import QUIET, SteeringField, one_sentence
from dualparal.ui.studio import Studio
from dualparal.ui.wall import COUNTS, Wall
from dualparal.ui.watch import watch

HERE = Path(__file__).parent
TICK_S = 2.0
# Estimates come back in the order they were asked for, or an older one would overwrite a newer.
IN_ORDER: dict[str, Any] = {"concurrency_id": "estimate", "concurrency_limit": 1}
DEFAULT_EXAMPLES = (
    "a red circle bouncing on a navy background",
    "A lighthouse on a cliff at dusk, waves breaking far below, slow aerial shot",
)
NOT_PLAYED = -1.0
# What of the live video is played, in place of the third input.
PLAYED_JS = f"""(...given) => {{
  const video = document.querySelector('#video video');
  given[2] = video && video.currentSrc ? video.currentTime : {NOT_PLAYED};
  return given;
}}"""
OPEN_JS = f"""(browser) => {{{CARRIED_JS}
  return [browser, sessionStorage.getItem('dualparal-job') || '', sessionStorage.getItem('{draft.KEY}') || ''];
}}"""
BOARD_JS = (HERE / "rough.js").read_text(encoding="utf-8") + (HERE / "strip.js").read_text(encoding="utf-8")


class Page:
    """Builds the page for one studio; `root` is the prefix of all addresses, '' for the site's own root."""

    def __init__(self, studio: Studio, root: str = "") -> None:
        self.studio = studio
        self.root = f"{root.rstrip('/')}/" if root else ""
        self.steering = SteeringField(studio, self._owner)
        self.wall = Wall(studio, self._owner, self.root)
        self.side_by_side = SideBySide(studio, self._owner, self.root)
        self.exports = Exports(studio, self._owner, self.root)
        self.shelf = Shelf(studio, self._owner, self.root)
        self._following: dict[str, object] = {}  # session → what it follows now

    def build(self) -> gr.Blocks:
        """The finished page with its API."""
        with gr.Blocks(title="DualParal Studio", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
            self._lay_out()
            self._wire(page)
            api.add_endpoints(self.studio)
        return page

    # -- layout

    def _lay_out(self) -> None:
        self.browser = gr.BrowserState("", storage_key="dualparal-owner", secret="dualparal-studio")
        self.hint = gr.Textbox(visible="hidden", elem_id="job-hint")
        self.drafted = gr.Textbox(visible="hidden", elem_id="drafted")
        self.job_id = gr.State("")
        self.timer = gr.Timer(TICK_S)
        self.played_s = gr.Number(NOT_PLAYED, visible="hidden")
        with gr.Row(elem_id="masthead"):
            gr.HTML("<h1>DualParal <span>Studio</span></h1>", apply_default_css=False, elem_id="brand")
            self.chip = gr.HTML(panels.engine_chip(self.studio), apply_default_css=False, elem_id="chip")
        with gr.Row(elem_id="workspace"):
            with gr.Column(elem_id="composer", scale=4, min_width=320):
                self.form = form.build(self.studio)
                self.restore = gr.File(
                    label="Drop a video made here to restore its settings", file_types=[".mp4"], elem_id="restore", height=72
                )
                with gr.Column(elem_id="foot"):  # always in view
                    self.estimate = gr.HTML(apply_default_css=False, elem_id="estimate")
                    with gr.Row(elem_id="go"):
                        self.takes = gr.Dropdown(
                            [(f"× {count}", count) for count in COUNTS], value=1, show_label=False, container=False,
                            filterable=False, elem_id="takes", scale=1, min_width=72,
                        )  # fmt: skip
                        self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
                        self.stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=1, min_width=76)
                        self.another = gr.Button(
                            "Stop, try another seed", elem_id="another", visible=False, scale=1, min_width=104
                        )
            with gr.Column(elem_id="stage", scale=7, min_width=320):
                own = self.studio.engine.preset
                self.video = LiveVideo(
                    streaming=True,
                    label="Live video",
                    show_label=False,
                    autoplay=True,
                    interactive=False,
                    buttons=[],
                    elem_id="video",
                    elem_classes=["square"] * (own.width < 1.3 * own.height) + ["small"] * (own.width <= 128),
                )
                with gr.Column(elem_id="idle") as self.idle:
                    gr.HTML(
                        "<p><b>Watch it grow.</b> Blocks of the video are denoised side by side and play here as soon as "
                        "each is ready.</p><p>Try one:</p>", apply_default_css=False,
                    )  # fmt: skip
                    prompts = own.examples[:4] or DEFAULT_EXAMPLES
                    self.examples = [(gr.Button(f"▸ {prompt}", elem_classes="example"), prompt) for prompt in prompts]
                self.wall.build(BUTTONS_JS)
                self.board = gr.HTML(apply_default_css=False, elem_id="board", js_on_load=BOARD_JS)
                self.steering.build()
                self.result = gr.HTML(apply_default_css=False, elem_id="result", js_on_load=BUTTONS_JS)
                self.queue = gr.HTML(apply_default_css=False, elem_id="queue", js_on_load=BUTTONS_JS)
        self.side_by_side.build()
        self.shelf.build()
        self.exports.build()

    # -- wiring

    def _wire(self, page: gr.Blocks) -> None:
        inputs, browser = self.form.inputs, self.browser
        overview = [self.chip, self.queue]
        self.opened = page.load(
            self._open, [browser, self.hint, self.drafted], [browser, self.job_id, self.estimate, self.shelf.html, *overview],
            js=OPEN_JS, **QUIET,
        )  # fmt: skip
        draft.keep(page, self.form, self.studio.engine.preset.name, **QUIET)
        self._then_follow(self.opened)
        begun = gr.on(
            [self.generate.click, self.form.prompt.submit], self._start_takes, [browser, self.takes, *inputs],
            [self.job_id, self.queue],
            trigger_mode="multiple", **QUIET,
        )  # fmt: skip
        self._then_follow(begun)
        for button, prompt in self.examples:
            filled = button.click(lambda prompt=prompt: prompt, None, self.form.prompt, **QUIET)
            self._then_follow(filled.then(self._start, [browser, *inputs], [self.job_id, self.queue], **QUIET))
        self.stop.click(self._stop, [browser, self.job_id], self.stop, queue=False, **QUIET)
        self.steering.wire(browser, self.job_id)
        again = self.another.click(
            self._try_another, [browser, self.job_id, self.form.parts["seed"]],
            [self.job_id, self.queue, self.form.parts["seed"]], **QUIET,
        )  # fmt: skip
        self._then_follow(again)
        self.form.dice.click(form.roll, None, self.form.parts["seed"], queue=False, **QUIET)
        self.form.parts["preset"].input(self._choose_preset, self.form.parts["preset"], inputs, **QUIET)
        changes = [part.change for part in inputs[2:]]
        costs = [self.estimate, self.form.film]
        gr.on(changes, self._estimate, inputs, costs, trigger_mode="always_last", **IN_ORDER, **QUIET)
        self.form.timeline.typed(self._estimate, inputs, costs, trigger_mode="always_last", **IN_ORDER, **QUIET)
        restored = self.restore.upload(self._restore, self.restore, [self.restore, *inputs], **QUIET)
        restored.failure(lambda: None, None, self.restore, **QUIET)  # a wrong file makes room for the right one
        shelf = self.shelf
        self.timer.tick(
            self._tick_all,
            [browser, self.job_id, self.played_s, shelf.seen, *shelf.query],
            [*overview, shelf.seen, *shelf.outputs, self.wall.html],
            js=PLAYED_JS,
            **QUIET,
        )
        self._then_follow(self.queue.show(self._watch_this, [browser], self.job_id, **QUIET))
        self.queue.halt(self._stop_this, [browser, self.job_id], overview, **QUIET)
        self._then_follow(self.shelf.html.show(self._watch_this, [browser], self.job_id, **QUIET), is_new=False)
        self._then_follow(self.result.resume(self._resume, [browser], self.job_id, **QUIET))
        self._then_follow(self.result.compare(self._compare, [browser], self.job_id, **QUIET))
        self.wall.wire(browser, self.job_id, self._then_follow, self._watch_this)
        self.side_by_side.wire(browser, self.shelf.html, self.wall.html)
        self.exports.wire(browser, self.result)
        self.shelf.wire(
            browser, self.job_id, [self.video, self.board, self.result, self.idle], self._reuse, inputs, self._then_follow
        )
        for shown in (self.shelf.html, self.result):
            shown.extend(self._continue, [browser], inputs, **QUIET)
        page.unload(self._close)

    def _then_follow(self, event: Any, is_new: bool = True) -> None:
        """After `event` has set the job's id: follow it to its end, then show it in the gallery if it `is_new` there."""
        outputs = [self.video, self.board, self.result, self.stop, self.another, self.idle]
        outputs += self.steering.shown
        followed = event.success(
            self._follow, [self.browser, self.job_id], outputs, concurrency_limit=None, trigger_mode="multiple", **QUIET
        )
        if is_new:
            shelf = self.shelf
            shown = followed.then(self._newest, [self.browser, self.job_id, *shelf.query], shelf.outputs, **QUIET)
            # It has learnt from this job. Not when the page opens: the visitor may be typing by the time this comes back.
            if event is not self.opened:
                shown.then(self._estimate, self.form.inputs, [self.estimate, self.form.film], **IN_ORDER, **QUIET)

    # -- what the events do

    def _open(self, token: str, hint: str, drafted: str, request: gr.Request) -> tuple[Any, ...]:
        token = token if isinstance(token, str) and token else owners.new_token()
        owner = self._owner(token, request)
        job_id = self._reattach(hint, owner)
        shown, _ = self.shelf.render(owner, 0)
        values = draft.values_of(drafted, self.studio.engine.preset.name, form.defaults(self.studio.engine.preset))
        estimate = self._estimate(*values)[0] if values else panels.estimate_line(self.studio.estimate(USUAL))
        return token, job_id, estimate, shown, *self._overview(owner, job_id)

    def _reattach(self, hint: str, owner: str) -> str:
        """The job a freshly opened tab shows: the one it showed before, else the owner's running or next one."""
        if hint:
            try:
                return self.studio.find(hint, owner).job_id
            except DualParalError:
                pass
        active = self.studio.active(owner)
        return active[0].job_id if active else ""

    def _start_takes(self, request: gr.Request, token: str, takes: int, *values: Any) -> tuple[str, str]:
        """`_start`, several times over where that is chosen."""
        if takes not in COUNTS[1:]:
            return self._start(request, token, *values)
        owner = self._owner(token, request)
        try:
            wanted = form.read(self.studio, values)
            found = self.studio.submit_takes(wanted, takes, owner=owner, address=owners.address_of(request))
        except DualParalError as error:
            raise one_sentence(error) from None
        return found[0].job_id, panels.queue(self.studio, owner, found[0].job_id)

    def _start(self, request: gr.Request, token: str, *values: Any) -> tuple[str, str]:
        owner = self._owner(token, request)
        try:
            wanted = form.read(self.studio, values)
            found = self.studio.submit(wanted, owner=owner, address=owners.address_of(request))
        except DualParalError as error:
            raise one_sentence(error) from None
        return found.job_id, panels.queue(self.studio, owner, found.job_id)

    async def _follow(self, token: str, job_id: str, request: gr.Request) -> AsyncIterator[Any]:
        if not job_id:
            return
        session, mine = str(request.session_hash), object()
        self._following[session] = mine
        try:
            async for update in watch(
                self.studio, job_id, self._owner(token, request), self.root, lambda: self._following.get(session) is mine
            ):
                yield update
        except DualParalError as error:
            raise one_sentence(error) from None

    def _stop(self, token: str, job_id: str, request: gr.Request) -> Any:
        try:
            self.studio.stop(job_id, self._owner(token, request))
        except DualParalError as error:
            raise one_sentence(error) from None
        return gr.update(value="Stopping…", interactive=False)

    def _try_another(self, token: str, job_id: str, seed: str, request: gr.Request) -> tuple[str, str, Any]:
        """Stop the job and ask for the same with another seed, which the form then shows if it showed one."""
        owner = self._owner(token, request)
        try:
            found = self.studio.try_another(job_id, owner, owners.address_of(request))
        except DualParalError as error:
            raise one_sentence(error) from None
        shown = gr.update(value=str(found.request.seed)) if seed else gr.skip()
        return found.job_id, panels.queue(self.studio, owner, found.job_id), shown

    def _stop_this(self, token: str, job_id: str, event: gr.EventData, request: gr.Request) -> tuple[str, str]:
        self._stop(token, event.id, request)
        return self._tick(token, job_id, request)

    def _watch_this(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        try:
            return self.studio.find(event.id, self._owner(token, request)).job_id
        except DualParalError as error:
            raise one_sentence(error) from None

    def _resume(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        try:
            return self.studio.resume(event.id, self._owner(token, request), owners.address_of(request)).job_id
        except DualParalError as error:
            raise one_sentence(error) from None

    def _compare(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        try:
            return self.studio.compare(event.id, self._owner(token, request), owners.address_of(request)).job_id
        except DualParalError as error:
            raise one_sentence(error) from None

    def _tick(self, token: str, job_id: str, request: gr.Request) -> tuple[str, str]:
        return self._overview(self._owner(token, request), job_id)

    def _overview(self, owner: str, watched: str) -> tuple[str, str]:
        return panels.engine_chip(self.studio), panels.queue(self.studio, owner, watched)

    def _tick_all(
        self, token: str, job_id: str, played_s: float, seen: int, page: int, search: str, wanted: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """The overview, and the gallery too when a job has ended, whoever follows it. Notes what of the film is played."""
        owner = self._owner(token, request)
        self.steering.note_played(job_id, played_s, owner)
        is_news, now = self.shelf.is_news(seen)
        shown = self.shelf.render(owner, page, search, wanted) if is_news else (gr.skip(), gr.skip())
        return *self._overview(owner, job_id), now, *shown, self.wall.render(owner, job_id)

    def _newest(self, token: str, job_id: str, page: int, search: str, wanted: str, request: gr.Request) -> tuple[Any, Any]:
        if not job_id:
            return gr.skip(), gr.skip()
        return self.shelf.render(self._owner(token, request), 0, search, wanted)

    def _reuse(self, token: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        try:
            found = self.studio.find(event.id, self._owner(token, request))
            request = found.request
            return form.fill(
                self.studio, request.as_request(), began_with_picture=request.start_image is not None,
                began_with_video=(request.continue_from or "").startswith(CLIP),
            )  # fmt: skip
        except DualParalError as error:
            raise one_sentence(error) from None

    def _continue(self, token: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        try:
            found = self.studio.find(event.id, self._owner(token, request))
            return form.fill(self.studio, found.request.as_request(), continue_from=found.job_id)
        except DualParalError as error:
            raise one_sentence(error) from None

    def _restore(self, path: str | None) -> list[Any]:
        try:
            if path is None:
                raise RequestError("no file arrived; drop an mp4 made here")
            return [None, *form.fill(self.studio, read_settings(Path(path)))]
        except DualParalError as error:
            raise one_sentence(error) from None

    def _choose_preset(self, name: str) -> list[Any]:
        try:
            return form.choose_preset(self.studio, name)
        except DualParalError as error:
            raise one_sentence(error) from None

    def _estimate(self, *values: Any) -> tuple[str, str]:
        values = (values[0] or "-", *values[1:])  # of the prompt the cost depends on the shots alone
        try:
            settings = form.read(self.studio, values)
            return panels.estimate_line(self.studio.estimate(settings)), timeline.preview(settings)
        except DualParalError as error:
            return panels.estimate_problem(str(error)), ""

    def _close(self, request: gr.Request) -> None:
        self._following.pop(str(request.session_hash), None)

    def _owner(self, token: object, request: gr.Request | None) -> str:
        return self.studio.owner_of(token, getattr(request, "username", None))


def theme() -> gr.themes.Base:
    """System fonts (nothing is fetched), a neutral ground, one accent."""
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="stone",
        font=["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )  # fmt: skip
