"""What is typed survives a reload, going back and a restart of the server: the tab's session storage keeps the form's values.

The browser does it by itself, without asking the server. Files are not kept, nor what a form that was filled in does not show.
A film that is to be continued is, with the fields that are shown only then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from dualparal.ui.form import NAMES, Form

KEY = "dualparal-form"
NOT_KEPT = ("start_image", "continue_video", "stored")
CONTINUED = ("continue_from", "join")
KEPT = tuple(name for name in NAMES if name not in NOT_KEPT)
# Values go by name, so that a draft of an older page is not taken for something else; and one of another model is left.
KEEP_JS = """(...values) => {
  const names = %(names)s;
  const named = Object.fromEntries(names.map((name, at) => [name, values[at]]));
  sessionStorage.setItem('%(key)s', JSON.stringify({of: %(of)s, values: named}));
}"""
SHOW_JS = """() => {
  const names = %(names)s, same = {__type__: 'update'};
  let draft = null;
  try { draft = JSON.parse(sessionStorage.getItem('%(key)s') || 'null'); } catch {}
  const values = draft?.of === %(of)s ? draft.values : {};
  const continued = values.continue_from ? {__type__: 'update', visible: true} : null;
  return names.map((name) => !(name in values) ? same
    : continued && %(continued)s.includes(name) ? {...continued, value: values[name]} : values[name]);
}"""


def keep(page: gr.Blocks, form: Form, own: str, **quiet: Any) -> None:
    """Keep the form's values as they change and show them when the page opens; `own` is the engine's preset."""
    parts = [form.parts[name] for name in KEPT]
    about = {"names": json.dumps(KEPT), "key": KEY, "of": json.dumps(own), "continued": json.dumps(CONTINUED)}
    page.load(None, None, parts, js=SHOW_JS % about, **quiet)
    gr.on([part.change for part in parts], None, parts, None, js=KEEP_JS % about, trigger_mode="multiple", **quiet)


def values_of(draft: object, own: str, defaults: dict[str, Any]) -> Sequence[Any] | None:
    """The form's values, in its order, as the browser shows them from `draft` (its JSON); None without one."""
    try:
        found = json.loads(draft) if isinstance(draft, str) and draft else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("of") != own or not isinstance(found.get("values"), dict):
        return None
    return [found["values"].get(name, defaults.get(name)) if name in KEPT else None for name in NAMES]
