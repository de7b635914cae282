"""The page and the Gradio API; never imports torch."""
