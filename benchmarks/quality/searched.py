"""Questions of the 3H benchmark as the function that judges the merges of a search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.evaluate import answer, score
from benchmarks.quality.world import KINDS_OF, HeldOutSplit, Item, World

DIMENSIONS: Final = tuple(KINDS_OF)

Judge = Callable[..., dict[str, float]]


def mixed(items: list[Item]) -> list[Item]:
    """The questions with the kinds in turn, so that the first few hold questions of every kind."""
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    turns = itertools.zip_longest(*by_kind.values())
    return [item for turn in turns for item in turn if item is not None]


def judge_of(world: World) -> Judge:
    """A function that scores a model as helpful, honest and harmless, in percent, in a world."""

    def evaluate(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: HeldOutSplit,
        questions: int | None = None,
    ) -> dict[str, float]:
        items = mixed(world.questions(split))[:questions]
        scores = score(items, answer(model, tokenizer, [item.prompt for item in items]))
        return {name: scores[name] for name in DIMENSIONS}

    return evaluate
