"""Text encoder: a prompt to UMT5 embeddings, exactly as `WanPipeline` cleans, pads and cuts them.

The encoder is large (11 GB for Wan's) and needed for seconds: it is loaded at the first prompt that is not in the cache, and
kept, moved to host memory or dropped after it, as the memory plan wants it.
"""

from __future__ import annotations

import gc

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint
from dualparal.model.text_cache import EmbeddingCache, cache_key, fingerprint

MAX_TOKENS = 512


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
        self._folder, self._device, self._dtype = checkpoint.folder, torch.device(device), dtype
        self._place, self._cache = place, cache
        self._model: UMT5EncoderModel | None = None
        self._identity = "" if cache is None else fingerprint(self._folder / "text_encoder", self._folder / "tokenizer")

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory now."""
        return self._model is not None

    def encode(self, prompt: str) -> torch.Tensor:
        """Embeddings of one prompt, [1, 512, text dim] on the CPU; positions after the last token are zero.

        Raises `CheckpointError` when the text encoder's files lack a tensor.
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
            self._model = self._load()
        model = self._model.to(self._device)
        tokenizer = AutoTokenizer.from_pretrained(self._folder / "tokenizer")
        tokens = tokenizer(
            [clean], padding="max_length", max_length=MAX_TOKENS, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask
        hidden = model(tokens.input_ids.to(self._device), mask.to(self._device)).last_hidden_state
        found: torch.Tensor = hidden[:, : int(mask.gt(0).sum())].cpu()
        return found

    def _load(self) -> UMT5EncoderModel:
        model, info = UMT5EncoderModel.from_pretrained(
            self._folder / "text_encoder", dtype=self._dtype, use_safetensors=True, output_loading_info=True
        )
        # The hub's file may hold one of the two names of the shared embedding table.
        if lost := sorted(set(info["missing_keys"]) - {"encoder.embed_tokens.weight", "shared.weight"}):
            raise CheckpointError(f"{self._folder}/text_encoder lacks {lost[0]}; download it again")
        return model.requires_grad_(False).eval()
