"""Text encoder: a prompt to UMT5 embeddings, exactly as `WanPipeline` cleans, pads and cuts them."""

from __future__ import annotations

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint

MAX_TOKENS = 512


class TextEncoder:
    """UMT5 with its tokenizer. One copy per engine, in the codec process."""

    def __init__(self, checkpoint: Checkpoint, *, device: str, dtype: torch.dtype) -> None:
        folder = checkpoint.folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        model, info = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        # The hub's file may hold one of the two names of the shared embedding table.
        if lost := sorted(set(info["missing_keys"]) - {"encoder.embed_tokens.weight", "shared.weight"}):
            raise CheckpointError(f"{folder}/text_encoder lacks {lost[0]}; download it again")
        self.model = model.to(device).requires_grad_(False).eval()

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        """Embeddings of one prompt, [1, 512, text dim] on the CPU; positions after the last token are zero."""
        tokens = self.tokenizer(
            [prompt_clean(prompt)], padding="max_length", max_length=MAX_TOKENS, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask
        hidden = self.model(tokens.input_ids.to(self.model.device), mask.to(self.model.device)).last_hidden_state
        length = int(mask.gt(0).sum())
        padded = hidden.new_zeros(1, MAX_TOKENS, hidden.shape[-1])
        padded[:, :length] = hidden[:, :length]
        return padded.cpu()
