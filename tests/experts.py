"""Tiny experts with tokenizers, which tests let answer prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from checkpoints import HIDDEN, VOCABULARY

from resm_kernels.engine.models import Model
from resm_kernels.engine.models import open_model as engine_open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (test extra)")

WORDS: Final = ("<unk>", "<s>", "</s>", "<end>", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(6, VOCABULARY)))
UNKNOWN, BEGIN, END, TURN_END, USER, ASSISTANT = range(6)
TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDS: Final = (END, TURN_END, *range(7, VOCABULARY, 9))
"""The end tokens of the experts: many, so that some answers of random models end early and others do not."""

_LLAMA: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "initializer_range": 0.5,
}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "Llama": _LLAMA,
    "Qwen2": _LLAMA | {"tie_word_embeddings": True},
    "Gemma2": _LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"bos_token_id": BEGIN, "eos_token_id": END, "initializer_range": 0.5},
    "Phi3": _LLAMA,
    "Mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


def word_tokenizer(template: str | None = TEMPLATE, words: Sequence[str] = WORDS) -> Any:
    """A tokenizer with one token for each word, which puts `<s>` before a text."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    fast.chat_template = template
    return fast


def save_expert(folder: Path, kind: str = "Llama", seed: int = 0, **changes: Any) -> Path:
    """Save a random model of this kind, with a tokenizer and settings that ask for sampling."""
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind] | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.7, eos_token_id=list(ENDS)
    )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def open_model(folder: Path) -> Model:
    """The whole model in a folder, as the engine opens it."""
    return engine_open_model(str(folder), "model", contextlib.ExitStack())


def greedy(model: Any, ids: Sequence[int], count: int, ends: Sequence[int]) -> tuple[int, ...]:
    """The greedy answer to one prompt, by its definition: without padding, batches or a cache."""
    tokens = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
    return tuple(tokens[len(ids) :])


def changed(weights: Mapping[str, torch.Tensor], **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Weights with some tensors replaced, added, or (None) left out; `.` is written `__`."""
    result = dict(weights)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        result.pop(name, None)
        if tensor is not None:
            result[name] = tensor
    return result
