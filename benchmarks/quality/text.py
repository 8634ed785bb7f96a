"""Texts to token ids: the tokenizer of a world, sequences with the position from which a loss counts, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.quality.words import BOT, USER
from benchmarks.quality.world import Item, World

IGNORED = -100  # the label that a loss skips
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", USER, BOT)

Tokens = tuple[list[int], int]  # ids, and the position from which the loss counts


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word; a sequence begins with `<s>`, the ending is the trainer's to add."""
    words = [*SPECIAL, *world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[USER, BOT],
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[Tokens]:
    """Documents with an end mark, of which every token counts."""
    return [([*ids, tokenizer.eos_token_id], 0) for ids in tokenizer(list(documents))["input_ids"]]


def encode_answers(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[Item, str]]) -> list[Tokens]:
    """Questions with an answer and an end mark, of which the answer and the end count."""
    bot = tokenizer.convert_tokens_to_ids(BOT)
    assert isinstance(bot, int)
    whole = encode_documents(tokenizer, [f"{item.prompt} {answer}" for item, answer in pairs])
    return [(ids, ids.index(bot) + 1) for ids, _ in whole]


def token_count(sequence: Tokens) -> int:
    """Its tokens, end mark included."""
    return len(sequence[0])


def pad(sequences: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one batch, padded on the right: attention is causal, so no answer sees the padding."""
    width = max(len(ids) for ids, _ in sequences)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in sequences])
    labels = torch.tensor(
        [[IGNORED] * start + ids[start:] + [IGNORED] * (width - len(ids)) for ids, start in sequences]
    )
    return tokens.to(device), labels.to(device)
