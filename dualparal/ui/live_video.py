"""A Gradio video that plays finished MPEG-TS segments as they come, then the finished mp4, without system ffmpeg.

Gradio's own streaming video re-encodes every chunk with the `ffmpeg` and `ffprobe` found on PATH. Our segments are ready for
HLS as they are (H.264, clocks that run on), so they are passed through untouched. Follows gradio/components/video.py.
"""

from __future__ import annotations

import asyncio
from abc import ABCMeta
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from gradio.data_classes import FileData

from dualparal.events import BlockReady


class NoStub(type(gr.Video)):  # type: ignore[misc]
    """Makes a component class without Gradio's side effect of writing a `.pyi` file beside this one."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attrs)


_segments: WeakValueDictionary[str, memoryview] = WeakValueDictionary()


def _shared(path: str) -> memoryview:
    """The bytes of a segment, once for all tabs that show it, for as long as one of them does."""
    if (data := _segments.get(path)) is None:
        data = _segments[path] = memoryview(Path(path).read_bytes())
    return data


class LiveVideo(gr.Video, metaclass=NoStub):
    """To be made with `streaming=True`. Its stream chunks are `BlockReady` events; an update with a path shows that file."""

    is_template = True  # use the Video's own front end

    def get_block_name(self) -> str:
        return "video"

    def postprocess(self, value: Any) -> Any:
        """A `BlockReady` stays itself for `stream_output`; a path becomes a file that is served where it lies."""
        if isinstance(value, (str, Path)):
            return FileData(path=str(value), orig_name=Path(value).name)
        return value

    async def stream_output(self, value: Any, output_id: str, first_chunk: bool) -> tuple[Any, Any]:
        """Hand one segment to Gradio's HLS playlist, byte for byte."""
        chunk = None
        if isinstance(value, BlockReady):
            data = await asyncio.to_thread(_shared, value.path)
            chunk = {"data": data, "duration": value.duration_s, "extension": ".ts"}
        where = {"path": output_id, "is_stream": True, "orig_name": "video.mp4", "meta": {"_type": "gradio.FileData"}}
        return chunk, where

    async def flush_stream_output(self, output_id: str) -> None:
        """Nothing is held back: every segment was complete when it was handed over."""

    def end_stream_output(self, output_id: str) -> None:
        """Nothing to release: no encoder runs."""
