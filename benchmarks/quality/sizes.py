"""The three sizes of model: Llamas with grouped-query attention and tied embeddings.

`small` trains in minutes on one CPU core, `medium` in hours; `large` is meant for a GPU. A size changes width and
depth only; learning rates fall with the width, as the usual rule for Adam has it, and were chosen at `small`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

M = TypeVar("M", bound=torch.nn.Module)
MAX_NEW_TOKENS: Final = 8  # the longest answer, the refusal, has six words and an end


@dataclass(frozen=True)
class Size:
    """Width and depth; `width` is the hidden size, `inner` that of the MLP."""

    width: int
    inner: int
    layers: int
    heads: int

    @property
    def rate(self) -> float:
        """What the learning rates of `small` are multiplied by."""
        return SIZES["small"].width / self.width


SIZES: Final[dict[str, Size]] = {
    "small": Size(width=160, inner=480, layers=4, heads=4),
    "medium": Size(width=320, inner=1024, layers=6, heads=8),
    "large": Size(width=640, inner=1920, layers=8, heads=8),
}


def build_model(size: Size, vocabulary: int) -> LlamaForCausalLM:
    """A model of that size with random weights; the caller seeds torch."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=64,
        initializer_range=0.05 * size.rate**0.5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return model


def move(model: M, *, device: str | None = None, dtype: torch.dtype | None = None) -> M:
    """Move a model in place and return it. Type checkers misread `to` of transformers' models; this is torch's."""
    module: torch.nn.Module = model
    module.to(device=device, dtype=dtype)
    return model
