"""What Gradio keeps of its visitors, bounded: nothing grows with the number of calls, nobody's stream goes for a stranger's.

Gradio 6.31 keeps for every call without a session name a copy of the whole page's settings (164 kB), and a queue of messages
that is thrown away when 2,000 newer ones have come, whether anybody still listens or not; after every call it sums up all
calls so far. It also fetches any address that a visitor writes in place of a file.
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import Any

import gradio as gr
import gradio.processing_utils
import gradio.routes
import gradio.state_holder
from gradio.queueing import Queue
from starlette.types import ASGIApp, Receive, Scope, Send

from dualparal.errors import RequestError

MAX_STREAMS = 2000  # of sessions that wait for nothing
MAX_SESSIONS = 4000  # 11 kB each


class LightSession(gradio.state_holder.SessionState):
    """A visitor's state without the copy of the page's settings, which only deep links need; this page has none."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self.blocks_config = copy(blocks.default_config)
        self.config_values: dict[int, Any] = {}
        self.state_data: dict[int, Any] = {}
        self._state_ttl: dict[int, Any] = {}
        self.is_closed = False
        self.STATE_TTL_WHEN_CLOSED = 3600

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.config_values.clear()

    def _update_config(self, key: int) -> None:
        """Nothing is kept of it."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """Nothing is kept of it."""


class Streams(dict[str, Any]):
    """Messages by session. The oldest sessions that wait for no event go when there are too many; all others stay."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._waiting = queue.pending_event_ids_session

    def __setitem__(self, session: str, messages: Any) -> None:
        super().__setitem__(session, messages)
        if len(self) > MAX_STREAMS:
            for idle in [name for name in self if name != session and not self._waiting.get(name)][: MAX_STREAMS // 10]:
                del self[idle]

    def __delitem__(self, session: str) -> None:
        super().__delitem__(session)
        if not self._waiting.get(session):
            self._waiting.pop(session, None)


_tabs: Counter[str] = Counter()  # heartbeats by session


class TabsMiddleware:
    """Knows which sessions are tabs: they hold a heartbeat for as long as they are open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, is_heartbeat, session = scope.get("path", "").partition("/heartbeat/")
        if not is_heartbeat:
            await self._app(scope, receive, send)
            return
        _tabs[session] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            _tabs[session] -= 1
            if not _tabs[session]:
                del _tabs[session]


class Sessions(gradio.state_holder.StateHolder):
    """Forgets sessions that no tab holds before those of tabs, whatever came last."""

    def update(self, session_id: str) -> None:
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
            if len(self.session_data) > self.capacity:
                oldest = next(iter(self.session_data))
                gone = next((name for name in self.session_data if name not in _tabs), oldest)
                del self.session_data[gone]
                self.time_last_used.pop(gone, None)


def bound_memory(page: gr.Blocks) -> None:
    """Bound what Gradio keeps for `page`, after its `queue` has been set up and before it is launched."""
    gradio.state_holder.SessionState = LightSession
    gradio.routes.StateHolder = Sessions
    gradio.processing_utils.async_ssrf_protected_download = _fetch_nothing
    queue = page._queue
    queue.pending_messages_per_session = Streams(queue)
    queue.ANALYTICS_MAX_EVENTS = 0  # nothing is monitored here; /metrics has its own counts


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise RequestError("a file has to be uploaded; this server fetches no address for a visitor")
