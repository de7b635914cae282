"""A job's texts as embeddings, and its picture as latents, on rank 0: from the caller, or from the codec, which is asked for
all texts at once."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dualparal.errors import OutputError, RequestError, WorkerDied
from dualparal.messages import Embeddings, EncodeClip, EncodedPicture, EncodePicture, EncodeText, RunJob
from dualparal.method.plan import SETTLING_LATENTS
from dualparal.method.timeline import TextPlan
from dualparal.model.text import MAX_TOKENS
from dualparal.prompts import text_of_shot
from dualparal.request import Settings
from dualparal.ring.arrays import tensor_of
from dualparal.ring.texts import Embedded

T = TypeVar("T", Embeddings, EncodedPicture)
CUT = "the {} is longer than the model's {} tokens: “{}” and what follows it are left out"
CLIP_STEPS = 4  # a clip may take so many times as long as a text
LOOK_INTERVAL_S = 0.2  # for a stop, while the codec encodes


class Encoding:
    """Rank 0's way to the text encoder."""

    def __init__(self, to_codec: Queue[Any], from_codec: Queue[Any], text_dim: int, timeout_s: float) -> None:
        """`timeout_s`: how long the codec may take for a text."""
        self._to_codec, self._from_codec = to_codec, from_codec
        self._text_dim, self._timeout_s = text_dim, timeout_s
        self._known: dict[str, torch.Tensor] = {}  # texts of the present job that were encoded here

    def texts(
        self, job: RunJob, to_hear: TextPlan, timings: dict[str, float], check_stop: Callable[[], None]
    ) -> tuple[Embedded, list[torch.Tensor], str]:
        """Embeddings of the texts, and of the negative prompt where there is guidance, and what to tell of them. `check_stop`
        is called often and may raise."""
        request = job.request
        texts = [*to_hear.encoded, *[request.negative_prompt] * (request.guidance_scale > 1)]
        given = [job.prompt_embeds, *[None] * (len(to_hear.encoded) - 1), job.negative_prompt_embeds][: len(texts)]
        found = {i: tensor_of(array) for i, array in enumerate(given) if array is not None}
        missing, notices = [i for i in range(len(texts)) if i not in found], []
        if missing:
            self._to_codec.put(EncodeText(job.job_id, tuple(texts[i] for i in missing)))
            asked = tuple(texts[i] for i in missing)
            answer = self._await(job.job_id, Embeddings, self._timeout_s * len(missing), check_stop, asked)
            timings["text_s"] = answer.seconds
            for i, array, word in zip(missing, answer.arrays, answer.lost_words, strict=True):
                found[i] = tensor_of(array)
                if word is not None:
                    notices.append(CUT.format(_name_of_text(request, to_hear, i), MAX_TOKENS, word))
        self._known = {texts[i].strip(): found[i] for i in missing}
        for text in found.values():
            if text.ndim != 3 or text.shape[0] != 1 or text.shape[2] != self._text_dim:
                raise RequestError(
                    f"prompt_embeds have shape {list(text.shape)}; they must be [1, tokens, {self._text_dim}]", "prompt_embeds"
                )
        check_stop()
        # Supplied embeddings keep their own length.
        lengths = [MAX_TOKENS if i in missing else None for i in range(len(texts))]
        conds = Embedded([found[i] for i in range(len(to_hear.encoded))], to_hear.mixtures, length=lengths[0])
        uncond = [Embedded([found[i]], length=lengths[i])[0] for i in range(len(to_hear.encoded), len(texts))]
        return conds, uncond, "; ".join(notices)

    def ask(self, job_id: str, text: str) -> None:
        """Have one more text of the present job encoded, while other things are done."""
        self._to_codec.put(EncodeText(job_id, (text,)))

    def has(self, job_id: str, text: str) -> tuple[bool, str]:
        """Whether the text that was asked for is there, and what to tell of it. Never waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._from_codec.get_nowait()
                if isinstance(answer, Embeddings) and (answer.job_id, answer.texts) == (job_id, (text,)):
                    self._known[text.strip()] = tensor_of(answer.arrays[0])
                    word = answer.lost_words[0]
                    return True, "" if word is None else CUT.format("text", MAX_TOKENS, word)
        return False, ""

    def known(self, to_hear: TextPlan) -> Embedded:
        """The embeddings of a timeline whose texts have all been encoded here."""
        return Embedded([self._known[text.strip()] for text in to_hear.encoded], to_hear.mixtures, length=MAX_TOKENS)

    def picture(
        self, job: RunJob, picture: np.ndarray, timings: dict[str, float], check_stop: Callable[[], None]
    ) -> torch.Tensor:
        """The latent frame [1, C, 1, h, w] float32 of a `picture`, uint8 [H, W, 3]."""
        self._to_codec.put(EncodePicture(job.job_id, picture))
        answer = self._await(job.job_id, EncodedPicture, self._timeout_s, check_stop)
        timings["picture_s"] = answer.seconds
        return tensor_of(answer.latent)

    def clip(self, job: RunJob, file: Path, timings: dict[str, float], check_stop: Callable[[], None]) -> torch.Tensor:
        """The latent frames [1, C, F, h, w] float32 of the clip in `file`. Raises `OutputError` for one that cannot be read."""
        request = job.request
        most = request.ghost + SETTLING_LATENTS
        self._to_codec.put(EncodeClip(job.job_id, str(file), request.width, request.height, most))
        answer = self._await(job.job_id, EncodedPicture, CLIP_STEPS * self._timeout_s, check_stop)
        timings["picture_s"] = answer.seconds
        if not answer.latent.size:
            raise OutputError(f"{file} cannot be read; submit the job again")
        return tensor_of(answer.latent)

    def _await(
        self, job_id: str, kind: type[T], timeout_s: float, check_stop: Callable[[], None], texts: tuple[str, ...] = ()
    ) -> T:
        """The codec's answer to this job; it may still be busy with one that has been stopped."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            check_stop()
            try:
                answer = self._from_codec.get(timeout=LOOK_INTERVAL_S)
            except queue.Empty:
                continue
            is_ours = isinstance(answer, kind) and answer.job_id == job_id
            if is_ours and (not isinstance(answer, Embeddings) or answer.texts == texts):
                return answer
        what = "prompt" if kind is Embeddings else "picture"
        raise WorkerDied(f"the codec did not encode the {what} within {timeout_s:.0f} s")


def _name_of_text(request: Settings, to_hear: TextPlan, number: int) -> str:
    """What people call it."""
    if number >= len(to_hear.encoded):
        return "negative prompt"
    whole = [text_of_shot(request.prompt, shot) for shot in request.shots or ()]
    return f"text of shot {whole.index(to_hear.encoded[number]) + 1}" if whole else "prompt"
