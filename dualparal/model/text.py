"""Text encoder: a prompt to UMT5 embeddings, exactly as `WanPipeline` cleans, pads and cuts them.

The encoder is large (11 GB for Wan's) and needed for seconds: it is loaded at the first prompt that is not in the cache, and
kept, moved to host memory or dropped after it, as the memory plan wants it.
"""

from __future__ import annotations

import gc
import html
from typing import TYPE_CHECKING

import torch

from dualparal.errors import CheckpointError
from dualparal.model.fingerprint import fingerprint
from dualparal.model.layout import Checkpoint
from dualparal.model.text_cache import EmbeddingCache, cache_key
from dualparal.model.weights import load_text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

MAX_TOKENS = 512
MAX_WORD = 30  # characters of a word that is told


def prompt_clean(prompt: str) -> str:
    """`prompt` as `WanPipeline` hands it to the tokenizer: characters mended, HTML's entities resolved, blanks made one."""
    import ftfy  # for the codec alone

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class TextEncoder:
    """UMT5 with its tokenizer. One copy per engine, in the codec process."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        dtype: torch.dtype,
        place: str = "keep",
        cache: EmbeddingCache | None = None,
    ) -> None:
        """`place` of the model after encoding: keep (on `device`), cpu (in host memory), free (loaded anew when needed)."""
        self._checkpoint, self._device, self._dtype = checkpoint, torch.device(device), dtype
        self._place, self._cache = place, cache
        self._model: UMT5EncoderModel | None = None
        folders = [checkpoint.folder / name for name in ("text_encoder", "tokenizer")]
        self._identity = "" if cache is None else fingerprint(*folders)

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory now."""
        return self._model is not None

    def encode(self, prompt: str) -> torch.Tensor:
        """Embeddings of one prompt, [1, 512, text dim] on the CPU; positions after the last token are zero.

        Raises `CheckpointError` when the text encoder or tokenizer cannot be loaded.
        """
        clean = prompt_clean(prompt)
        key = cache_key(self._identity, str(self._dtype), self._device.type, str(MAX_TOKENS), clean)
        hidden = self._cache.load(key) if self._cache else None
        if hidden is None:
            hidden = self._encode(clean)
            if self._cache:
                self._cache.store(key, hidden)
        padded = hidden.new_zeros(1, MAX_TOKENS, hidden.shape[-1])
        padded[:, : hidden.shape[1]] = hidden
        return padded

    def first_lost(self, prompt: str, embeddings: torch.Tensor) -> str | None:
        """The first word of `prompt` that did not wholly fit into its `embeddings`, None when all did.

        Costs a tokenizer only where the embeddings are full. Raises `CheckpointError` when it cannot be loaded.
        """
        if not embeddings[0, -1].any():
            return None
        clean, tokenizer = prompt_clean(prompt), self._tokenizer()
        spans = tokenizer(clean, return_offsets_mapping=True, verbose=False).offset_mapping
        if len(spans) <= MAX_TOKENS:
            return None
        cut = spans[MAX_TOKENS - tokenizer.num_special_tokens_to_add()][0]
        begun = "" if clean[cut] == " " else clean[:cut].rpartition(" ")[2]
        words = (begun if len(begun) <= MAX_WORD else "") + clean[cut:]  # some languages put no spaces between words
        word = words.split()[0]
        return word if len(word) <= MAX_WORD else f"{word[:MAX_WORD]}…"

    def rest(self) -> None:
        """Prompts are encoded for now: put the model where it is to wait."""
        if self._model is None or self._place == "keep":
            return
        if self._place == "cpu":
            self._model.to("cpu")
        else:
            self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _encode(self, clean: str) -> torch.Tensor:
        """[1, tokens, text dim] on the CPU, in the model's dtype."""
        if self._model is None:
            self._model = load_text_encoder(self._checkpoint, self._dtype)
        model = self._model.to(self._device)
        tokens = self._tokenizer()(
            [clean], padding="max_length", max_length=MAX_TOKENS, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask
        hidden = model(tokens.input_ids.to(self._device), mask.to(self._device)).last_hidden_state
        found: torch.Tensor = hidden[:, : int(mask.gt(0).sum())].cpu()
        return found

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer  # takes seconds, and few prompts need it

        folder = self._checkpoint.folder / "tokenizer"
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes of the library
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"{folder} cannot be loaded ({type(error).__name__}: {first}); download it again") from error
