"""The routes below `/v1` as an OpenAPI 3.1 document, made from their table and from the request's fields."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from dualparal import __version__
from dualparal.prompts import TRANSITIONS
from dualparal.request import GenerationRequest
from dualparal.ui.api import FILES
from dualparal.ui.words import safe

MEDIA = {
    "video": ("video/mp4", "video/mp2t", "image/jpeg", "image/webp"), "segment": ("video/mp2t",), "picture": ("image/jpeg",),
    "playlist": ("application/vnd.apple.mpegurl",), "page": ("text/html",), "events": ("text/event-stream",),
}  # fmt: skip
TEXT, WHOLE, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
MAYBE_TEXT, MAYBE_WHOLE = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
REFUSALS = {
    "400": "a value is not usable; `param` names it", "401": "no key, or an unknown one", "403": "another site's request",
    "404": "no such video of the caller's, or nothing of it yet", "413": "too large a body",
    "429": "the queue is full, or the caller has as many videos in it as may be", "503": "cannot be done now; `Retry-After`",
}  # fmt: skip


class Described(Protocol):
    """What is needed of a route."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def gives(self) -> str: ...
    @property
    def query(self) -> Any: ...
    @property
    def about(self) -> str: ...
    @property
    def takes(self) -> str: ...
    @property
    def is_open(self) -> bool: ...


def described(doors: Iterable[Described]) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, Any] = {}
    for door in doors:
        paths.setdefault(f"/v1{door.path}", {})[door.method.lower()] = _operation(door)
    return {
        "openapi": "3.1.0",
        "info": {"title": "DualParal Studio", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}, "schemas": _schemas()},
    }


def page(doors: Iterable[Described]) -> str:
    """The same for people, as HTML that needs nothing from elsewhere."""
    document = described(doors)
    routes = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{safe(path)}</code></td><td>{safe(operation['description'])}"
        + "".join(
            f"<br><code>?{p['name']}</code> {safe(p['description'])}" for p in operation["parameters"] if p["in"] == "query"
        )
        + "</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    fields = "".join(
        f"<tr><td><code>{safe(name)}</code></td><td>{safe(about.get('description', ''))}</td></tr>"
        for name, about in document["components"]["schemas"]["CreateVideo"]["properties"].items()
    )
    refusals = "".join(f"<tr><td>{status}</td><td>{safe(about)}</td></tr>" for status, about in REFUSALS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>DualParal Studio: /v1</title>'
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}td{padding:.3rem .8rem .3rem 0;"
        "vertical-align:top}</style><h1>/v1</h1><p>The form that OpenAI's client speaks. For programs: "
        f'<a href="openapi.json">openapi.json</a>.</p><h2>Routes</h2><table>{routes}</table><h2>Fields of a video</h2>'
        f"<table>{fields}</table><h2>Refusals</h2><table>{refusals}</table>"
    )


def _operation(door: Described) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": TEXT} for name in re.findall(r"\{(\w+)\}", door.path)
    ] + [{"name": name, "in": "query", "description": about, "schema": TEXT} for name, about in door.query.items()]
    kinds = MEDIA.get(door.gives)
    answer = {kind: {} for kind in kinds} if kinds else {"application/json": {"schema": _ref(door.gives)}}
    refusals = {
        status: {"description": about, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, about in REFUSALS.items()
    }
    found: dict[str, Any] = {
        "summary": door.about.partition(".")[0] + ".",
        "description": door.about,
        "operationId": f"{door.method.lower()}{re.sub('[^a-z]+', '_', door.path)}".rstrip("_"),
        "parameters": parameters,
        "responses": {"200": {"description": "done", "content": answer}, **refusals},
        "security": [] if door.is_open else [{"key": []}, {}],
    }
    if door.takes:
        kinds = ("application/json", "multipart/form-data")[: 2 if door.takes == "CreateVideo" else 1]
        found["requestBody"] = {"required": True, "content": {kind: {"schema": _ref(door.takes)} for kind in kinds}}
    return found


def _ref(name: str) -> dict[str, Any]:
    return dict(OBJECT) if name == "OpenAPI" else {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> dict[str, Any]:
    asked = GenerationRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: schema for name, schema in asked["properties"].items() if name not in FILES}
    own = {
        "model": {**TEXT, "description": "one of /v1/models; the server's own if left out"},
        "preset": {**TEXT, "description": "the same by its other name"},
        "size": {**TEXT, "description": "width x height in pixels, such as 832x480"},
        "input_reference": {
            "description": "a picture to begin with, or a video to go on from: in a form its file, in JSON a picture alone, as "
            "{image_url: 'data:image/...;base64,...'}"
        },
    }
    video = {
        "id": TEXT, "object": {"const": "video"}, "model": TEXT,
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {**WHOLE, "description": "percent"}, "created_at": WHOLE, "completed_at": MAYBE_WHOLE,
        "expires_at": MAYBE_WHOLE, "prompt": TEXT, "size": TEXT, "seconds": TEXT, "remixed_from_video_id": MAYBE_TEXT,
        "error": {"anyOf": [{"type": "object", "properties": {"code": TEXT, "message": TEXT}}, {"type": "null"}]},
        "content_url": TEXT, "events_url": TEXT, "live_url": TEXT, "continue_from": MAYBE_TEXT,
        "take": {**MAYBE_WHOLE, "description": "which of several it is, from 1 on"},
    }  # fmt: skip
    error = {"message": TEXT, "type": TEXT, "code": TEXT, "param": MAYBE_TEXT}
    listed = {"object": {"const": "list"}, "has_more": {"type": "boolean"}, "first_id": MAYBE_TEXT, "last_id": MAYBE_TEXT}
    return {
        **asked.get("$defs", {}),
        "CreateVideo": _object({**fields, **own}, required=["prompt"]),
        "Steer": _object({"prompt": TEXT, "transition": {"enum": list(TRANSITIONS)}}, required=["prompt"]),
        "Video": {**_object(video, required=list(video)), "additionalProperties": True},
        "VideoList": _object({**listed, "data": {"type": "array", "items": _ref("Video")}}),
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": OBJECT}}),
        "Deleted": _object({"id": TEXT, "object": {"const": "video.deleted"}, "deleted": {"type": "boolean"}}),
        "Error": _object({"error": _object(error, required=list(error))}, required=["error"]),
    }


def _object(properties: dict[str, Any], required: Iterable[str] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}
