"""Data mixing, what merging is compared with: one model trained on all three dimensions with the experts' budget.

A mix sees as many examples as the three SFT experts see together. Each dimension gets its share of them, drawn from
that expert's own training questions in shuffled passes, so every question of a dimension is seen equally often, to one.

* mix-uniform: a third of the examples from each dimension;
* mix-weighted: shares by hand, half helpful, a quarter each of the others: helpfulness has five skills to learn;
* mix-filtered: shares of a third, but a dimension keeps only questions of middling difficulty: of its questions ordered
  by the base model's loss (mean over the right answer's tokens) the easiest fifth and the hardest tenth are left out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

import torch
from transformers import PreTrainedModel

from benchmarks.quality.fit import answer_log_probs
from benchmarks.quality.text import Tokens
from benchmarks.quality.world import KINDS_OF, Dimension

THIRDS: Final[dict[Dimension, float]] = {dimension: 1 / 3 for dimension in KINDS_OF}
SHARES: Final[dict[str, dict[Dimension, float]]] = {
    "mix-uniform": THIRDS,
    "mix-weighted": {"helpful": 0.5, "honest": 0.25, "harmless": 0.25},
    "mix-filtered": THIRDS,
}
MIDDLING: Final = (0.2, 0.9)  # the ranks of loss between which mix-filtered keeps a question
T = TypeVar("T")


def draw(
    data: Mapping[Dimension, Sequence[T]], shares: Mapping[Dimension, float], budget: int, epochs: int, seed: int
) -> list[list[T]]:
    """`budget` examples in `epochs` equal parts (to one), each of which has the shares (to one)."""
    rng = random.Random(f"{seed} mix")
    result: list[list[T]] = []
    passes: dict[Dimension, list[T]] = {dimension: [] for dimension in data}
    seen: dict[Dimension, int] = dict.fromkeys(data, 0)
    for epoch in range(1, epochs + 1):
        result.append([])
        targets = apportion(budget * epoch // epochs, shares)
        for dimension, examples in data.items():
            while seen[dimension] < targets[dimension]:
                if not passes[dimension]:
                    passes[dimension] = rng.sample(examples, len(examples))
                result[-1].append(passes[dimension].pop())
                seen[dimension] += 1
        rng.shuffle(result[-1])
    return result


def apportion(total: int, shares: Mapping[Dimension, float]) -> dict[Dimension, int]:
    """Whole numbers that add up to the total, in these shares; the last dimension takes what rounding leaves."""
    *first, last = shares
    counts = {dimension: int(total * shares[dimension]) for dimension in first}
    return counts | {last: total - sum(counts.values())}


@torch.no_grad()
def keep_middling(base: PreTrainedModel, examples: Sequence[Tokens]) -> list[Tokens]:
    """The examples whose loss under the base ranks between `MIDDLING`, in their order."""
    log_probs = torch.cat([answer_log_probs(base, examples[i : i + 256]) for i in range(0, len(examples), 256)])
    losses = [-value / (len(ids) - start) for value, (ids, start) in zip(log_probs.tolist(), examples, strict=True)]
    order = sorted(range(len(examples)), key=losses.__getitem__)
    low, high = (int(share * len(examples)) for share in MIDDLING)
    return [examples[i] for i in sorted(order[low:high])]
