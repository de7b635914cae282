"""The codec process: text encoder, streaming VAE decode, H.264. Off the pipeline's path, so that none of it stalls a stage.

Prompts to encode overtake blocks to decode, so that the next job's first step does not wait for the last one's video.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualparal.errors import OutputError
from dualparal.events import BlockReady
from dualparal.media.writer import VideoWriter
from dualparal.model.checkpoint import DTYPES
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.text_cache import EmbeddingCache
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.runtime.logs import working_on
from dualparal.runtime.messages import (
    CloseVideo,
    DecodeBlock,
    Embeddings,
    EncodeText,
    JobError,
    OpenVideo,
    Ready,
    RunJob,
    Shutdown,
    Span,
    Spans,
    VideoClosed,
    WorkerOptions,
)
from dualparal.runtime.worker import Uplink, call_hook, describe_error, quiet_libraries, run_worker, working_at

log = logging.getLogger(__name__)


def codec_main(connection: Connection, options: WorkerOptions, inbox: Queue[Any], outbox: Queue[Any]) -> None:
    """Entry point of the codec's process: messages from rank 0 in `inbox`, embeddings back in `outbox`."""

    def serve(uplink: Uplink) -> None:
        quiet_libraries()
        started_s = time.monotonic()
        torch.set_num_threads(options.threads)
        checkpoint = Checkpoint(Path(options.folder))
        cache = EmbeddingCache(Path(options.text_cache)) if options.text_cache else None
        text = TextEncoder(
            checkpoint, device=options.codec_device, dtype=DTYPES[options.dtype], place=options.text_encoder, cache=cache
        )
        decoder = StreamingDecoder.load(checkpoint, device=options.codec_device, dtype=DTYPES[options.vae_dtype])
        parts = call_hook(options, rank=None, text=text, decoder=decoder, uplink=uplink)
        uplink.send(Ready(uplink.name, {"pid": os.getpid(), "load_s": time.monotonic() - started_s}))
        Codec(parts["text"], parts["decoder"], uplink, inbox, outbox).serve()

    run_worker("codec", connection, options, serve)


class Codec:
    """Serves rank 0's messages in order, prompts first."""

    def __init__(
        self, text: TextEncoder, decoder: StreamingDecoder, uplink: Uplink, inbox: Queue[Any], outbox: Queue[Any]
    ) -> None:
        self._text, self._decoder, self._uplink = text, decoder, uplink
        self._inbox, self._outbox = inbox, outbox
        self._waiting: deque[Any] = deque()
        self._video: OpenedVideo | None = None
        self._failed_job = ""  # what still comes for it is dropped

    def serve(self) -> None:
        """Until Shutdown."""
        while True:
            self._waiting.append(self._inbox.get()) if not self._waiting else None
            self._take_prompts()
            if not self._waiting:
                continue
            message = self._waiting.popleft()
            match message:
                case EncodeText():
                    self._encode(message)
                case OpenVideo() | DecodeBlock() | CloseVideo():
                    self._serve_video(message)
                case Shutdown():
                    return

    def _take_prompts(self) -> None:
        """Move what has arrived to the waiting line, encoding prompts at once."""
        for message in [m for m in self._waiting if isinstance(m, EncodeText)]:
            self._waiting.remove(message)
            self._encode(message)
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, EncodeText):
                self._encode(message)
            else:
                self._waiting.append(message)

    def _encode(self, message: EncodeText) -> None:
        working_at("encoding a prompt")
        started_s = time.monotonic()
        arrays = tuple(self._text.encode(text).float().numpy() for text in message.texts)
        self._text.rest()
        ended_s = time.monotonic()
        working_at(None)
        self._uplink.send(Spans(message.job_id, (Span("text", started_s, ended_s, 0, 0),)))
        self._outbox.put(Embeddings(message.job_id, arrays, ended_s - started_s))

    def _serve_video(self, message: OpenVideo | DecodeBlock | CloseVideo) -> None:
        job_id = message.job.job_id if isinstance(message, OpenVideo) else message.job_id
        if isinstance(message, OpenVideo):  # perhaps of a job that failed here and was resumed
            self._failed_job = ""
            working_on(job_id)
        if job_id == self._failed_job:
            return
        try:
            if isinstance(message, OpenVideo):
                self._video = OpenedVideo(message, self._decoder, self._uplink)
                return
            video = self._video
            assert video is not None and video.job.job_id == job_id, "a block of a video that is not open"
            if isinstance(message, DecodeBlock):
                video.add(message)
            else:
                working_at("joining the video")
                self._uplink.send(video.close(message))
                self._video = None
                if torch.cuda.is_initialized():  # a rank may share this card
                    torch.cuda.empty_cache()
        except (OSError, ValueError) as error:
            # The job is lost, the codec is not: a full disk concerns this video only.
            self._video, self._failed_job = None, job_id
            kind, sentence = describe_error("the video writer", error)
            kind = "OutputError" if isinstance(error, OSError) and not isinstance(error, OutputError) else kind
            is_known = isinstance(error, OutputError)  # a full disk needs no traceback
            log.error("video of job %s failed: %s", job_id, sentence, exc_info=not is_known)
            self._uplink.send(JobError(job_id, kind, sentence))
        finally:
            working_at(None)


class OpenedVideo:
    """The video being decoded and written."""

    def __init__(self, message: OpenVideo, decoder: StreamingDecoder, uplink: Uplink) -> None:
        self.job: RunJob = message.job
        request = message.job.request
        assert request.fps
        if not Path(message.job.folder).is_dir():
            raise OutputError(f"{message.job.folder} is gone: the job was deleted while it waited")
        self._decoder, self._uplink = decoder, uplink
        self._writer = VideoWriter(
            Path(message.job.folder), width=message.width, height=message.height, fps=request.fps,
            export_images=message.job.export_images,
        )  # fmt: skip
        self._latents: list[np.ndarray] = []
        self._num_frames = 0
        self._decode_s = self._encode_s = 0.0
        decoder.begin()

    def add(self, message: DecodeBlock) -> None:
        """Decode one block, write its segment, tell the front end.

        After a resume, a block whose segment is there already is decoded for the VAE's feature cache only.
        """
        self._decoder.on_frame = lambda: working_at(f"decoding block {message.block}")
        started_s = time.monotonic()
        frames = to_uint8(self._decoder.decode(torch.from_numpy(message.latents))).numpy()
        decoded_s = time.monotonic()
        working_at(f"writing block {message.block}")
        is_known = self.job.is_resumed and self._writer.adopt_block(len(frames)) is not None
        segment = self._writer.segments[-1] if is_known else self._writer.add_block(frames)
        encoded_s = time.monotonic()
        self._decode_s += decoded_s - started_s
        self._encode_s += encoded_s - decoded_s
        self._num_frames += segment.num_frames
        if self.job.return_latents:
            self._latents.append(message.latents)
        spans = (
            Span("decode", started_s, decoded_s, message.block, 0),
            Span("encode", decoded_s, encoded_s, message.block, 0),
        )
        self._uplink.send(Spans(self.job.job_id, spans))
        # Told again even if the run before has told it: that run may have died between the disk and the message.
        self._uplink.send(
            BlockReady(
                job_id=self.job.job_id, block=message.block, path=str(segment.path), first_frame=segment.first_frame,
                num_frames=segment.num_frames, duration_s=segment.duration_s,
            )
        )  # fmt: skip

    def close(self, message: CloseVideo) -> VideoClosed:
        """Join the segments; the answer ends the job."""
        started_s = time.monotonic()
        path = self._writer.finish(self.job.request.to_json())
        self._encode_s += time.monotonic() - started_s
        return VideoClosed(
            job_id=self.job.job_id,
            is_cancelled=message.is_cancelled,
            path=str(path) if path else None,
            num_frames=self._num_frames,
            timings={**message.timings, "decode_s": self._decode_s, "encode_s": self._encode_s},
            latents=np.concatenate(self._latents, axis=2) if self._latents else None,
        )
