"""Pocket Wan's text side: a tokenizer that knows the words of the world, and a tiny `UMT5EncoderModel`.

Words the world does not have become `<unk>`. Ids 0 and 1 are padding and end of text, as in UMT5.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dualparal.pocket.world import all_prompts

TEXT_DIM = 64
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case, punctuation dropped, `</s>` at the end."""
    words = sorted({word for prompt in all_prompts() for word in prompt.caption.split()})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("gray", "grey")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Two layers of 64 channels, no dropout."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


class TextAttention:
    """The cross-attention processor used while training.

    At inference a prompt is padded with zero vectors to 512 tokens and nothing is masked. The 512 - n padded keys are all
    alike, so one such key whose score is raised by log(512 - n) gives the same softmax at a fiftieth of the cost. `bias`
    [batch, 1, 1, keys] is set before each forward; key 0 is the zero vector.
    """

    bias: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, heads).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, heads).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def with_zero_key(embedded: torch.Tensor, mask: torch.Tensor, *, padded_to: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [batch, 1 + n, dim] with the zero key first, and `TextAttention`'s bias, from embeddings and mask [batch,
    n]."""
    zero = embedded.new_zeros(embedded.shape[0], 1, embedded.shape[2])
    num_padded = (padded_to - mask.sum(dim=1, keepdim=True)).float()
    bias = torch.where(mask.bool(), 0.0, float("-inf"))
    return torch.cat([zero, embedded], dim=1), torch.cat([num_padded.log(), bias], dim=1)[:, None, None]
