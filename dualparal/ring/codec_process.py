"""The codec process: text encoder, streaming VAE decode, H.264. Off the pipeline's path, so that none of it stalls a stage.

Prompts and pictures to encode overtake blocks to decode, so that the next job's first step does not wait for the last one's
video.
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
from dualparal.logs import working_on
from dualparal.media.film import last_frames
from dualparal.media.writer import VideoWriter
from dualparal.messages import (
    CloseVideo,
    DecodeBlock,
    Embeddings,
    EncodeClip,
    EncodedPicture,
    EncodePicture,
    EncodeText,
    JobError,
    OpenVideo,
    Ready,
    RunJob,
    Shutdown,
    Span,
    Spans,
    TurnVideo,
    VideoClosed,
    WorkerOptions,
)
from dualparal.method.rules import plan_of
from dualparal.model.checkpoint import DTYPES
from dualparal.model.latent_rgb import CACHE
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.text_cache import EmbeddingCache
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.planning.calibration import cache_folder
from dualparal.ring.arrays import tensor_of
from dualparal.ring.codec_looks import MapFitting, finished_look
from dualparal.ring.film_end import FilmEnd
from dualparal.ring.worker import Uplink, call_hook, describe_error, quiet_libraries, run_worker, working_at

log = logging.getLogger(__name__)
IDLE_S = 1.0
MOST_LOOKED_AT = 8  # messages taken ahead, to find prompts among them


def codec_main(connection: Connection, options: WorkerOptions, inbox: Queue[Any], outbox: Queue[Any]) -> None:
    """Entry point of the codec's process: messages from rank 0 in `inbox`, embeddings back in `outbox`."""

    def serve(uplink: Uplink) -> None:
        quiet_libraries()
        started_s = time.monotonic()
        torch.set_num_threads(options.engine.threads or 1)
        if torch.device(options.codec_device).type == "cuda":
            torch.cuda.set_device(options.codec_device)  # else what names no device goes to the first card
        checkpoint = Checkpoint(Path(options.folder))
        cache = EmbeddingCache(Path(options.text_cache)) if options.text_cache else None
        text = TextEncoder(
            checkpoint,
            device=options.codec_device,
            dtype=DTYPES[str(options.engine.dtype)],
            place=options.engine.text_encoder,
            cache=cache,
        )
        decoder = StreamingDecoder.load(checkpoint, device=options.codec_device, dtype=DTYPES[str(options.engine.vae_dtype)])
        parts = call_hook(options, rank=None, text=text, decoder=decoder, uplink=uplink)
        uplink.send(Ready(uplink.name, {"pid": os.getpid(), "load_s": time.monotonic() - started_s}))
        fitting = MapFitting(checkpoint, cache_folder() / CACHE)
        Codec(parts["text"], parts["decoder"], uplink, inbox, outbox, fitting).serve()

    run_worker("codec", connection, options, serve)


class Codec:
    """Serves rank 0's messages in order, prompts first."""

    def __init__(
        self, text: TextEncoder, decoder: StreamingDecoder, uplink: Uplink, inbox: Queue[Any], outbox: Queue[Any],
        fitting: MapFitting | None = None,
    ) -> None:  # fmt: skip
        self._fitting = fitting
        self._text, self._decoder, self._uplink = text, decoder, uplink
        self._inbox, self._outbox = inbox, outbox
        self._waiting: deque[Any] = deque()
        self._video: OpenedVideo | None = None
        self._failed_job = ""  # what still comes for it is dropped

    def serve(self) -> None:
        """Until Shutdown."""
        while True:
            if not self._waiting:
                self._waiting.append(self._next())
            self._take_prompts()
            if not self._waiting:
                continue
            message = self._waiting.popleft()
            match message:
                case EncodeText() | EncodePicture() | EncodeClip():
                    self._encode(message)
                case OpenVideo() | TurnVideo() | DecodeBlock() | CloseVideo():
                    self._serve_video(message)
                case Shutdown():
                    return

    def _next(self) -> Any:
        """The next message. With nothing to do for a while, and nothing of a video in the decoder, time for the map of early
        looks."""
        if self._fitting is not None and (self._video is None or not self._video.has_begun):
            try:
                return self._inbox.get(timeout=IDLE_S)
            except queue.Empty:
                self._fitting.fit(self._decoder)
                self._fitting = None
        return self._inbox.get()

    def _take_prompts(self) -> None:
        """Move what has arrived to the waiting line, so far as it has room, encoding prompts at once."""
        for message in [m for m in self._waiting if isinstance(m, EncodeText | EncodePicture | EncodeClip)]:
            self._waiting.remove(message)
            self._encode(message)
        while len(self._waiting) < MOST_LOOKED_AT:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, EncodeText | EncodePicture | EncodeClip):
                self._encode(message)
            else:
                self._waiting.append(message)

    def _encode(self, message: EncodeText | EncodePicture | EncodeClip) -> None:
        started_s = time.monotonic()
        if isinstance(message, EncodeClip):
            self._encode_clip(message, started_s)
            return
        if isinstance(message, EncodePicture):
            working_at("encoding a picture")
            latent = self._decoder.encode_picture(tensor_of(message.picture)).numpy()
            working_at(None)
            self._outbox.put(EncodedPicture(message.job_id, latent, time.monotonic() - started_s))
            return
        found = []
        for text in message.texts:
            working_at("encoding a prompt")
            found.append(self._text.encode(text))
        lost = tuple(self._text.first_lost(text, embeddings) for text, embeddings in zip(message.texts, found, strict=True))
        self._text.rest()
        ended_s = time.monotonic()
        working_at(None)
        self._uplink.send(Spans(message.job_id, (Span("text", started_s, ended_s, 0, 0),)))
        arrays = tuple(_without_zeros(embeddings).float().numpy() for embeddings in found)
        self._outbox.put(Embeddings(message.job_id, arrays, lost, ended_s - started_s, message.texts))

    def _encode_clip(self, message: EncodeClip, started_s: float) -> None:
        working_at("encoding a clip")
        self._decoder.on_frame = lambda: working_at("encoding a clip")
        try:
            frames = last_frames(Path(message.file), message.width, message.height, message.most_latents)
            latents = self._decoder.encode_clip(tensor_of(frames)).numpy()
        except OutputError as error:
            log.warning("%s", error)
            latents = np.empty((1, 0, 0, 0, 0), np.float32)
        working_at(None)
        self._outbox.put(EncodedPicture(message.job_id, latents, time.monotonic() - started_s))

    def _serve_video(self, message: OpenVideo | TurnVideo | DecodeBlock | CloseVideo) -> None:
        job_id = message.job.job_id if isinstance(message, OpenVideo | TurnVideo) else message.job_id
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
            if isinstance(message, TurnVideo):
                video.turn(message.job)
            elif isinstance(message, DecodeBlock):
                video.add(message)
                if torch.cuda.is_initialized():  # a rank may share this card
                    torch.cuda.empty_cache()
            else:
                working_at("joining the video")
                self._uplink.send(video.close(message))
                self._video = None
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


def _without_zeros(embeddings: torch.Tensor) -> torch.Tensor:
    """[1, tokens, text dim] up to the last that is not all zero: a film may have hundreds of texts."""
    used = embeddings[0].any(dim=1).nonzero()
    return embeddings[:, : int(used[-1]) + 1 if len(used) else 1]


class OpenedVideo:
    """The video being decoded and written."""

    def __init__(self, message: OpenVideo, decoder: StreamingDecoder, uplink: Uplink) -> None:
        self.job: RunJob = message.job
        request = message.job.request
        if not Path(message.job.folder).is_dir():
            raise OutputError(f"{message.job.folder} is gone: the job was deleted while it waited")
        self._decoder, self._uplink = decoder, uplink
        self._writer = VideoWriter(
            Path(message.job.folder), width=message.width, height=message.height, fps=request.fps,
            export_images=message.job.export_images, num_frames_before=request.num_frames_before,
        )  # fmt: skip
        self._latents: list[np.ndarray] = []
        self.num_frames = 0
        self._decode_s = self._encode_s = 0.0
        self._plan = plan_of(request)
        before = None if message.before is None else tensor_of(message.before)
        self._end = FilmEnd(before, request.num_cat)
        decoder.begin()
        self.has_begun = before is not None  # the decoder has something of it
        if before is not None:
            working_at("decoding the film's beginning")
            decoder.decode(before)

    def turn(self, job: RunJob) -> None:
        """Go on by another timeline, which agrees with the present one in all blocks that were added."""
        self.job, self._plan = job, plan_of(job.request)

    def add(self, message: DecodeBlock) -> None:
        """Decode one block, write its segment, tell the front end. A scene is decoded as a video of its own.

        After a resume, a block whose segment is there already is decoded for the VAE's feature cache only.
        """
        self.has_begun = True
        self._decoder.on_frame = lambda: working_at(f"decoding block {message.block}")
        started_s = time.monotonic()
        if message.block in self._plan.cuts:
            self._decoder.begin()
            self._end.begin_scene()
        latents = tensor_of(message.latents)
        self._end.add(latents)
        frames = to_uint8(self._decoder.decode(latents)).numpy()
        decoded_s = time.monotonic()
        working_at(f"writing block {message.block}")
        is_known = self.job.is_resumed and self._writer.adopt_block(frames) is not None
        segment = self._writer.segments[-1] if is_known else self._writer.add_block(frames)
        encoded_s = time.monotonic()
        self._decode_s += decoded_s - started_s
        self._encode_s += encoded_s - decoded_s
        self.num_frames += segment.num_frames
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
                num_frames=segment.num_frames, duration_s=segment.duration_s, checksum=segment.checksum,
            )
        )  # fmt: skip
        self._uplink.send(finished_look(self.job, message.block, frames))

    def close(self, message: CloseVideo) -> VideoClosed:
        """Join the segments; the answer ends the job."""
        started_s = time.monotonic()
        if self.num_frames:
            self._end.keep(Path(self.job.folder), self.num_frames)
        path = self._writer.finish(self.job.request.to_json())
        self._encode_s += time.monotonic() - started_s
        return VideoClosed(
            job_id=self.job.job_id,
            is_cancelled=message.is_cancelled,
            path=str(path) if path else None,
            num_frames=self.num_frames,
            timings={**message.timings, "decode_s": self._decode_s, "encode_s": self._encode_s},
            latents=np.concatenate(self._latents, axis=2) if self._latents else None,
        )
