"""Rank 0 asks the codec for all of a job's texts at once, fills them up, and says which was cut."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
import torch

from dualparal.errors import JobCancelled, RequestError, WorkerDied
from dualparal.messages import Embeddings, EncodeText, RunJob
from dualparal.method.rules import plan_of
from dualparal.method.timeline import text_plan
from dualparal.ring.encoding import Encoding
from tests.settings import settings

DIM = 4


class Codec:
    """Answers when it is asked; text number n of a message has n + 2 tokens, all n + 1."""

    def __init__(self, lost: tuple[str | None, ...] = ()) -> None:
        self.asked: list[EncodeText] = []
        self.answers: queue.Queue[Any] = queue.Queue()
        self._lost = lost

    def put(self, message: EncodeText) -> None:
        self.asked.append(message)
        count = len(message.texts)
        arrays = tuple(np.full((1, n + 2, DIM), n + 1, np.float32) for n in range(count))
        lost = self._lost or (None,) * count
        self.answers.put(Embeddings("of a stopped job", arrays, lost, 0.0, message.texts))
        self.answers.put(Embeddings(message.job_id, arrays, lost, 1.5, message.texts))


def texts_of(codec: Codec, timeout_s: float = 60.0, check_stop: Any = lambda: None, **values: Any) -> Any:
    given = {name: values.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds") if name in values}
    request = settings(negative_prompt="grey", num_per_block=2, num_cat=1, **values)
    job, timings = RunJob("abcdef", request, "", **given), {}
    encoding = Encoding(codec, codec.answers, DIM, timeout_s)  # type: ignore[arg-type]
    return *encoding.texts(job, text_plan(request, plan_of(request)), timings, check_stop), timings


def test_all_texts_of_a_film_at_once() -> None:
    codec = Codec()
    texts, uncond, notice, timings = texts_of(codec, prompt="a cat\n[1s] sits\n[1s blend] runs\n[1s] sits")
    assert [message.texts for message in codec.asked] == [("a cat sits", "a cat runs", "grey")]
    assert (notice, timings) == ("", {"text_s": 1.5})
    assert texts[0].shape == texts[1].shape == uncond[0].shape == (1, 512, DIM)
    assert [float(text[0, 0, 0]) for text in (texts[0], texts[1], *uncond)] == [1, 2, 3]
    assert not texts[0][:, 2:].any() and not texts[1][:, 3:].any(), "zeros behind the last token"
    assert torch.equal(texts[2], (1 - 0.5 / 3) * texts[0] + 0.5 / 3 * texts[1])


def test_supplied_embeddings_keep_their_length() -> None:
    codec = Codec()
    own = np.ones((1, 7, DIM), np.float32)
    texts, uncond, _, _ = texts_of(codec, prompt="x", prompt_embeds=own)
    assert [message.texts for message in codec.asked] == [("grey",)]
    assert texts[0].shape == (1, 7, DIM) and uncond[0].shape == (1, 512, DIM)
    texts, uncond, _, _ = texts_of(codec, prompt="x", negative_prompt_embeds=own)
    assert texts[0].shape == (1, 512, DIM) and uncond[0].shape == (1, 7, DIM)
    texts, uncond, _, timings = texts_of(codec, prompt="x", prompt_embeds=own, guidance_scale=1.0)
    assert (texts[0].shape, uncond, timings) == ((1, 7, DIM), [], {})
    with pytest.raises(RequestError, match=r"prompt_embeds have shape \[1, 7, 3\]; they must be \[1, tokens, 4\]"):
        texts_of(codec, prompt="x", prompt_embeds=own[:, :, :3])


def test_what_was_cut_is_named() -> None:
    said = "is longer than the model's 512 tokens: “{}” and what follows it are left out"
    notice = texts_of(Codec((None, "dog", "mist")), prompt="[1s] a\n[1s] b")[2]
    assert notice == f"the text of shot 2 {said.format('dog')}; the negative prompt {said.format('mist')}"
    assert texts_of(Codec(("cat", None)), prompt="a")[2] == f"the prompt {said.format('cat')}"


def test_a_stop_and_a_codec_that_is_silent() -> None:
    def stopped() -> None:
        raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        texts_of(Codec(), prompt="x", check_stop=stopped)
    silent = Codec()
    silent.put = silent.asked.append  # type: ignore[method-assign]
    with pytest.raises(WorkerDied, match="the codec did not encode the prompt within 0 s"):
        texts_of(silent, timeout_s=0.1, prompt="x")
