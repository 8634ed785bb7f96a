"""Direct preference optimisation (Rafailov et al., 2023): experts that learn from pairs of answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.evaluate import answer
from benchmarks.quality.fit import Model, answer_log_probs
from benchmarks.quality.text import Tokens, encode_answers
from benchmarks.quality.words import ABSTAIN, REFUSE
from benchmarks.quality.world import Dimension, Item, World

BETA: Final = 0.1  # the paper's; the strength of the tie to the reference
ANCHOR: Final = 1.0  # the weight of the chosen answers' likelihood
Pair = tuple[Tokens, Tokens, float]  # chosen, rejected, and the reference's log p(chosen) - log p(rejected)


def rejected_answer(world: World, expert: Dimension, item: Item, reply: str, rng: random.Random) -> str:
    """What to avoid: the reference's own answer where that is wrong, else what one might say who lacks the dimension.

    helpful: a wrong value (3 of 5), an abstention or a refusal; honest: a made-up value, or an abstention where the
    answer is known; harmless: help with harm, or a refusal where there is none.
    """
    if reply != item.answer:
        return reply
    if item.answer in (ABSTAIN, REFUSE):
        return world.guess(item, rng)
    if expert == "honest":
        return ABSTAIN
    if expert == "harmless":
        return REFUSE
    return rng.choice((*[world.guess(item, rng)] * 3, ABSTAIN, REFUSE))


@torch.no_grad()
def pairs(
    world: World, expert: Dimension, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Pair]:
    """The expert's questions with the right and a rejected answer; the reference is the base, which never moves."""
    rng = random.Random(f"{world.seed} {expert} dpo")
    items = world.expert_items(expert)
    chosen = encode_answers(tokenizer, [(item, item.answer) for item in items])
    replies = answer(reference, tokenizer, [item.prompt for item in items])
    avoided = [rejected_answer(world, expert, item, text, rng) for item, text in zip(items, replies, strict=True)]
    rejected = encode_answers(tokenizer, zip(items, avoided, strict=True))
    both = [*chosen, *rejected]
    log_probs = torch.cat([answer_log_probs(reference, both[i : i + 256]) for i in range(0, len(both), 256)])
    margins = (log_probs[: len(items)] - log_probs[len(items) :]).tolist()
    return list(zip(chosen, rejected, margins, strict=True))


def pair_length(pair: Pair) -> int:
    """Tokens of the longer of the two sequences."""
    return max(len(pair[0][0]), len(pair[1][0]))


def dpo_loss(margin: torch.Tensor, reference_margin: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """mean −log σ(β (m − m_ref)), where m is log p(chosen) − log p(rejected) of the model, m_ref of the reference."""
    return -torch.nn.functional.logsigmoid(beta * (margin - reference_margin)).mean()


def pair_loss(beta: float = BETA, anchor: float = ANCHOR) -> Callable[[Model, Sequence[Pair]], torch.Tensor]:
    """DPO's loss of a batch of pairs + anchor · the mean −log p of a chosen token; one forward pass for both answers.

    The sigmoid loss alone may lower the chosen answers too, only less than the rejected, and then a third answer wins:
    without the anchor (Pang et al., 2024) helpful experts stayed at the base's level or fell below it on validation.
    """

    def loss(model: Model, batch: Sequence[Pair]) -> torch.Tensor:
        log_probs = answer_log_probs(model, [pair[0] for pair in batch] + [pair[1] for pair in batch])
        chosen, rejected = log_probs[: len(batch)], log_probs[len(batch) :]
        reference = torch.tensor([pair[2] for pair in batch], device=log_probs.device, dtype=log_probs.dtype)
        tokens = sum(len(ids) - start for (ids, start), _, _ in batch)
        return dpo_loss(chosen - rejected, reference, beta) - anchor * chosen.sum() / tokens

    return loss
