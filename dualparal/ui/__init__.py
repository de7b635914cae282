"""The page and the Gradio API; never imports torch."""

from dualparal.ui.http.surroundings import set_aside

with set_aside():
    # Makes clients of its own, and ends where it cannot read what proxies and port are named.
    import gradio.http_server  # noqa: F401
