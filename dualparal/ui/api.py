"""The API that "Use via API" shows and `gradio_client` calls: /generate /submit /status /cancel /resume /steer /finish /delete
/result /look /presets.

Values arrive unchecked on purpose: `GenerationRequest` is the one place that checks them, and its sentence is what the caller
gets. The parameters of /generate and /submit are made from its fields, so they cannot drift apart.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, get_args, get_origin

import gradio as gr
from gradio.data_classes import FileData

from dualparal.errors import DualParalError, RequestError, error_from_wire
from dualparal.events import Failed
from dualparal.request import GenerationRequest
from dualparal.ui import throttle
from dualparal.ui.http.mcp import bearer_of
from dualparal.ui.owners import address_of
from dualparal.ui.panels import headline
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.uploads import uploaded
from dualparal.ui.watch import look
from dualparal.ui.words import without_paths

log = logging.getLogger(__name__)

DAMAGED = "its record was damaged; what was left of it is deleted"
LOOK_EVERY_S = 0.2
TELL_EVERY_S = 1.0
MAX_THREADS = 4  # of one endpoint: more would only keep the page's loop from its turn
OWNER = "a secret of your own choice; a job made with one is shown only to callers who give the same"
FILES = ("start_image",)  # of the fields those that a caller uploads
VIDEO = "continue_video"  # a file in the place of `continue_from`'s job
MEANINGS = {
    **{name: info.description or name for name, info in GenerationRequest.model_fields.items()},
    "continue_from": "a film to go on from: the job_id of one of your own that has ended",
    VIDEO: "a video to go on from in its place: an uploaded mp4, mov or webm",
    "preset": "a preset's name from /presets; the server's own one if left out",
    "transition": "how the new shot begins: switch (at once, the default), blend (over some blocks) or cut (a new scene)",
    "job_id": "what /submit returned",
    "owner": OWNER,
}


def add_endpoints(studio: Studio) -> None:
    """Register the endpoints in the current Blocks context."""
    calls = Calls(studio)
    block = gr.context.Context.root_block
    assert block is not None
    for name, function in calls.endpoints().items():
        about = inspect.getdoc(function)
        gr.api(_one_sentence(function), api_name=name, api_description=about, concurrency_limit=_limit(function))
        made = list(block.fns.values())[-1]
        for component, parameter in zip(made.inputs, _parameters(function), strict=True):
            component.label = MEANINGS[parameter.name]  # instead of Gradio's "1st", "2nd"
            component._api_info["additional_description"] = MEANINGS[parameter.name]
        for component, label in zip(reversed(made.outputs), ("where the job stands", "the video"), strict=False):
            component.label = {"presets": "all presets", "look": label.replace("video", "film so far")}.get(name, label)


class Calls:
    """One method per endpoint; their docstrings are the API's documentation."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def endpoints(self) -> dict[str, Callable[..., Any]]:
        """Endpoint name → function."""
        return {
            "generate": _takes_request(self.generate), "submit": _takes_request(self.submit), "status": self.status,
            "cancel": self.cancel, "resume": self.resume, "steer": self.steer, "finish": self.finish,
            "delete": self.delete, "result": self.result, "look": self.look, "presets": self.presets,
        }  # fmt: skip

    async def generate(self, http: gr.Request, preset: Any, owner: Any, **fields: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Make a video and wait for it. Yields (null, status) about once a second while it runs and at last (mp4, status).

        If you hang up, the job goes on; its id is in every status.
        """
        name = self._owner(owner, http)
        found = await asyncio.to_thread(self._submit, preset, name, address_of(http), fields)
        waited_s = TELL_EVERY_S
        with throttle.follower() as pause_s:
            while not found.is_ended:
                if waited_s >= max(TELL_EVERY_S, pause_s()):
                    waited_s = 0.0
                    yield None, await asyncio.to_thread(self._status, found)
                await asyncio.sleep(LOOK_EVERY_S)
                waited_s += LOOK_EVERY_S
                found = await look(self.studio, found.job_id, name)
        yield await asyncio.to_thread(lambda: (self._video(found), self._status(found)))

    def submit(self, http: gr.Request, preset: Any, owner: Any, **fields: Any) -> dict:
        """Queue a video and return at once. The status that comes back holds the `job_id` that the other endpoints want.

        With `takes` it is the first one's, and `takes` in it lists the job_id of each: they rest at their first look (/look),
        and /resume goes on with one.
        """
        takes = fields.get("takes")
        if not isinstance(takes, int) or isinstance(takes, bool) or takes < 2:
            return self._status(self._submit(preset, self._owner(owner, http), address_of(http), fields))
        request, name = self._request(fields), self._owner(owner, http)
        found = self.studio.submit_takes(request, takes, preset, owner=name, address=address_of(http))
        return {**self._status(found[0]), "takes": [take.job_id for take in found]}

    def status(self, http: gr.Request, job_id: str, owner: str | None = None) -> dict:
        """Where a job stands: state, place in line, progress, finished blocks, timings."""
        return self._status(self.studio.find(job_id, self._owner(owner, http)))

    def cancel(self, http: gr.Request, job_id: str, owner: str | None = None) -> dict:
        """Stop a queued or running job. Its finished blocks are joined into a video that /result returns."""
        name = self._owner(owner, http)
        self.studio.cancel(job_id, name)
        return self._status(self.studio.find(job_id, name))

    def resume(self, http: gr.Request, job_id: str, owner: str | None = None) -> dict:
        """Go on with a job that was stopped, failed, was cut off, or is a take that rests; to the same bits."""
        return self._status(self.studio.resume(job_id, self._owner(owner, http), address_of(http)))

    def steer(
        self, http: gr.Request, job_id: str, prompt: str, transition: str | None = None, owner: str | None = None
    ) -> dict:
        """Show another prompt from here on, in place of all that was to come in a running job: with the first block that has
        not entered the pipeline yet. Answers with that `block`, the second `from_s` of the film that it begins at, and the
        job's status."""
        name = self._owner(owner, http)
        told = self.studio.steer(job_id, prompt, transition, name)
        return {
            **self._status(self.studio.find(job_id, name)),
            "block": told.block,
            "from_s": told.from_s,
            "notice": told.notice,
        }

    def finish(self, http: gr.Request, job_id: str, owner: str | None = None) -> dict:
        """Wrap up a running film that was submitted with `is_endless`: the blocks under way are completed, and the film ends
        there. Answers with the job's status, whose `num_frames` are now those of the whole film."""
        name = self._owner(owner, http)
        self.studio.finish(job_id, name)
        return self._status(self.studio.find(job_id, name))

    def delete(self, http: gr.Request, job_id: str, owner: str | None = None) -> dict:
        """Remove a job that has ended, with its video. The operator's key, as `owner`, stops and removes anybody's."""
        found = self.studio.delete(job_id, self._owner(owner, http))
        return self._status(found) if found else {"job_id": job_id, "state": "damaged", "message": DAMAGED}

    def result(self, http: gr.Request, job_id: str, owner: str | None = None) -> tuple[FileData | None, dict]:
        """The mp4 of a job that has ended, and its last status. A stopped or failed job has what was finished, or null."""
        found = self.studio.find(job_id, self._owner(owner, http))
        if not found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; ask /status until it has ended", "job_id")
        return self._video(found, must=False), self._status(found)

    def look(self, http: gr.Request, job_id: str, owner: str | None = None) -> tuple[FileData | None, dict]:
        """How the film looks so far, from the first steps on: a small animated WebP, rough where blocks are still being
        denoised; null before the first look. And the job's status."""
        found = self.studio.find(job_id, self._owner(owner, http))
        path = self.studio.look(found)
        look = path and FileData(path=str(path), orig_name=f"dualparal-{found.job_id}.webp", mime_type="image/webp")
        return look, self._status(found)

    def presets(self) -> list[dict]:
        """Every preset with its values and limits; `usable` says which ones this server can run now."""
        usable = {preset.name for preset in self.studio.usable_presets()}
        own = self.studio.engine.preset.name
        found = sorted(self.studio.presets.values(), key=lambda preset: (preset.name != own, preset.name))
        return [{**preset.model_dump(), "usable": preset.name in usable, "default": preset.name == own} for preset in found]

    def _owner(self, token: Any, http: gr.Request | None) -> str:
        return self.studio.owner_of(token or bearer_of(http), getattr(http, "username", None))

    def _submit(self, preset: Any, owner: str, address: str, fields: dict[str, Any]) -> Snapshot:
        return self.studio.submit(self._request(fields), preset, owner=owner, address=address)

    def _request(self, fields: dict[str, Any]) -> GenerationRequest:
        if not isinstance(fields.get("prompt"), str) and (fields.get("prompt") is not None or not fields.get("shots")):
            raise RequestError("prompt is missing or not a text; give prompt='what the video shows'", "prompt")
        fields |= {name: uploaded(fields.get(name), name) for name in FILES}
        if (video := uploaded(fields.pop(VIDEO, None), VIDEO)) is not None:
            if fields.get("continue_from") is not None:
                raise RequestError(f"continue_from and {VIDEO} both say what the film goes on from; give one of them", VIDEO)
            fields["continue_from"] = video
        return GenerationRequest(**{name: value for name, value in fields.items() if name != "prompt" or value is not None})

    def _video(self, found: Snapshot, must: bool = True) -> FileData | None:
        if must and isinstance(found.final, Failed):
            raise error_from_wire(found.final.kind, found.final.message)
        if found.video is None:
            return None
        return FileData(path=str(found.video), orig_name=f"dualparal-{found.job_id}.mp4", mime_type="video/mp4")

    def _status(self, found: Snapshot) -> dict[str, Any]:
        progress, final = found.progress, found.final
        head, detail = headline(found, self.studio)
        return {
            "job_id": found.job_id,
            "state": found.state,
            "message": f"{head}: {detail}",
            "position": found.position or 0,
            "starts_in_s": self.studio.starts_in_s(found.job_id) if found.state == "queued" else None,
            "progress": 1.0 if found.state == "finished" else progress.items_done / progress.num_items if progress else 0.0,
            "eta_s": progress.eta_s if progress and found.state == "running" else None,
            "block_steps": list(progress.block_steps) if progress else [],
            "busy": list(progress.busy) if progress and found.state == "running" else [],
            "num_steps": found.request.num_inference_steps,
            "num_frames": found.request.num_frames,
            "num_frames_ready": found.num_frames,
            "blocks": [
                {"block": b.block, "first_frame": b.first_frame, "num_frames": b.num_frames, "duration_s": b.duration_s}
                for b in found.blocks
            ],
            "timings": found.timings,
            "is_resting": found.is_resting,
            "error": without_paths(final.message) if isinstance(final, Failed) else None,
            "settings": self.studio.settings(found),
        }


def _limit(function: Callable[..., Any]) -> int | None:
    """Calls at once: a few of those that work in a thread, as many as there are of those that only wait."""
    return None if inspect.isasyncgenfunction(function) else MAX_THREADS


def _takes_request(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(http, preset, owner, **fields)` with the fields of `GenerationRequest` spelt out as optional parameters."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("http", kind, annotation=gr.Request)]
    parameters += [inspect.Parameter("prompt", kind, annotation=str)]
    for name, annotation in [("preset", str | None), *_field_types(), (VIDEO, FileData | None), ("owner", str | None)]:
        parameters.append(inspect.Parameter(name, kind, default=None, annotation=annotation))
    names = [parameter.name for parameter in parameters]
    returns: Any = dict

    if inspect.isasyncgenfunction(method):
        returns = tuple[FileData | None, dict]

        async def call(*values: Any) -> AsyncIterator[Any]:
            async for update in method(**dict(zip(names, values, strict=True))):
                yield update
    else:

        def call(*values: Any) -> Any:  # type: ignore[misc]
            return method(**dict(zip(names, values, strict=True)))

    call.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    call.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": returns}
    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


def _field_types() -> list[tuple[str, Any]]:
    """The optional fields of a request with plain types (limits are checked by the request, not by Gradio)."""
    first = ("seconds", "seed", "negative_prompt")
    fields = GenerationRequest.model_fields
    order = [*first, *(name for name in fields if name not in (*first, "prompt"))]
    return [(name, FileData | None if name in FILES else _plain(fields[name].annotation)) for name in order]


def _plain(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    parts = [get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(annotation)]
    parts = [list if get_origin(part) is tuple else part for part in parts]
    return parts[0] | parts[1] if len(parts) == 2 and type(None) in parts else annotation


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.annotation is not gr.Request]


def _one_sentence(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose errors reach the caller as one sentence: ours as they are, any other without its details."""
    if inspect.isasyncgenfunction(function):

        async def call(*values: Any) -> AsyncIterator[Any]:
            try:
                async for update in function(*values):
                    yield update
            except Exception as error:
                raise _as_gradio_error(error) from None
    else:

        def call(*values: Any) -> Any:  # type: ignore[misc]
            try:
                return function(*values)
            except Exception as error:
                raise _as_gradio_error(error) from None

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    call.__annotations__ = dict(getattr(function, "__annotations__", {}))
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


def _as_gradio_error(error: Exception) -> gr.Error:
    if isinstance(error, DualParalError):
        return gr.Error(without_paths(error), print_exception=False)
    log.error("an API call failed", exc_info=error)
    return gr.Error("something went wrong inside the server; its log has the details", print_exception=False)
