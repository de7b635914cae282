"""The routes below `/v1`, one table of them. `openapi` describes the same table.

Every route asks `Access` first; what may be asked for, how much and how often, is decided by the studio and the engine, as for
the page.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount

from dualparal.ui.v1.calls import Calls
from dualparal.ui.v1.door import Answers, Door
from dualparal.ui.v1.keys import Access
from dualparal.ui.v1.making import MAX_LISTED, Making
from dualparal.ui.v1.openapi import described, page
from dualparal.ui.v1.watching import Watching

LINK = {"link": "in place of a key: what the addresses in a video object carry"}
PAGE = {
    "after": "id of the last video of the page before", "limit": f"1 to {MAX_LISTED}, 20 if left out",
    "order": "desc (newest first) or asc",
}  # fmt: skip
CONTENT = {
    "variant": "video, thumbnail (JPEG) or look (the rough film so far, animated WebP)",
    "format": "mp4 or ts; left out: the mp4 if there is one, else the finished blocks as MPEG-TS", **LINK,
}  # fmt: skip
EVENTS = {"last_event_id": "in place of the header Last-Event-ID", **LINK}


def doors(calls: Calls) -> list[Door]:
    """All routes."""
    make, watch = Making(calls), Watching(calls)
    one = "/videos/{video_id}"
    return [
        Door(method="POST", path="/videos", call=make.create, gives="Video", takes="CreateVideo"),
        Door(method="GET", path="/videos", call=make.listed, gives="VideoList", query=PAGE),
        Door(method="GET", path=one, call=make.retrieve, gives="Video"),
        Door(method="DELETE", path=one, call=make.delete, gives="Deleted"),
        Door(method="POST", path=f"{one}/cancel", call=make.cancel, gives="Video"),
        Door(method="POST", path=f"{one}/resume", call=make.resume, gives="Video"),
        Door(method="POST", path=f"{one}/steer", call=make.steer, gives="Video", takes="Steer"),
        Door(method="POST", path=f"{one}/finish", call=make.finish, gives="Video"),
        Door(method="GET", path=f"{one}/takes", call=make.takes, gives="VideoList"),
        Door(method="GET", path=f"{one}/content", call=watch.content, gives="video", query=CONTENT),
        Door(method="GET", path=f"{one}/segments/{{block}}.ts", call=watch.segment, gives="segment", query=LINK),
        Door(method="GET", path=f"{one}/looks/{{block}}.jpg", call=watch.look, gives="picture", query=LINK),
        Door(method="GET", path=f"{one}/events", call=watch.events, gives="events", query=EVENTS),
        Door(method="GET", path=f"{one}/live.m3u8", call=watch.live, gives="playlist", query=LINK),
        Door(method="GET", path="/models", call=make.models, gives="ModelList"),
    ]


def with_description(found: list[Door]) -> list[Door]:
    """The routes, and beside them those that describe all of them."""

    async def openapi(_: Request) -> Response:
        """This description."""
        return JSONResponse(described(table))

    async def docs(_: Request) -> Response:
        """This page."""
        return HTMLResponse(page(table))

    table = [
        *found,
        Door(method="GET", path="/openapi.json", call=openapi, gives="OpenAPI", is_open=True),
        Door(method="GET", path="/docs", call=docs, gives="page", is_open=True),
    ]
    return table


def mount(access: Access, root: str = "") -> Mount:
    """All of it as one route of the server, whose path behind a proxy is `root`."""
    return Mount("/v1", app=Answers(with_description(doors(Calls(access, root)))))
