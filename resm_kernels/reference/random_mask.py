"""Definition of `random_mask`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import RUN, packed
from resm_kernels.philox import MASK_STREAM, philox

_WORD: Final = 0xFFFFFFFF
FRACTION: Final = 62
"""Bits after the point of the fixed-point probabilities; the 30 lowest are dropped before the comparison."""

RANKED_AT_ONCE: Final = 1 << 24
"""How many elements `ranks_of` ranks at a time, unless one row has more."""


@dataclass(frozen=True, kw_only=True)
class RandomMaskOptions:
    """The probabilities with which `random_mask` keeps elements; `resm_kernels.ops.random_mask` says more about each.

    Attributes:
        density: p of each expert.
        epsilon: ε of each expert.
        seed: The key of the random numbers.
        first: The index, a multiple of 128, of the first element in the tensor for which random numbers are drawn.
    """

    density: tuple[float, ...]
    epsilon: tuple[float, ...]
    seed: int
    first: int = 0

    def laws(self, columns: int) -> list[tuple[int, int]]:
        """The `probability_law` of each expert in rows of so many elements."""
        return [probability_law(p, e, columns) for p, e in zip(self.density, self.epsilon, strict=True)]


def random_mask(base: Tensor, experts: list[Tensor], options: RandomMaskOptions) -> list[Tensor]:
    """See `resm_kernels.ops.random_mask`."""
    masks = []
    for t, (expert, (lowest, step)) in enumerate(zip(experts, options.laws(row_length(base)), strict=True)):
        ranks = doubled_ranks(base, experts, t) if step else torch.zeros_like(expert, dtype=torch.int64)
        words = random_words(expert.numel(), t, options.seed, expert.device, options.first)
        masks.append(packed(words < ((lowest + ranks.reshape(-1) * step) >> 30)))
    return masks


def probability_law(density: float, epsilon: float, columns: int) -> tuple[int, int]:
    """A and S of the probability (A + S·m)/2^62 with which an element of doubled rank m is kept."""
    if density >= 1 or density <= 0:
        return (1 << FRACTION) if density >= 1 else 0, 0
    if columns < 2 or epsilon == 0:
        return int(density * 2.0**FRACTION), 0
    return int((density - epsilon) * 2.0**FRACTION), int(epsilon * 2.0**FRACTION) // (columns - 1)


def row_length(tensor: Tensor) -> int:
    """Elements that are ranked together: those of the last dimension."""
    return tensor.shape[-1] if tensor.dim() else 1


def doubled_ranks(base: Tensor, experts: Sequence[Tensor], t: int) -> Tensor:
    """m = 2·#{|δ| less} + #{|δ| equal} − 1 of every element of Δ_t within its row: twice its mean rank, from 0."""
    dtype = compute_dtype(base, *experts)
    size = (experts[t].to(dtype) - base.to(dtype)).abs()
    rows = size.reshape(-1, row_length(size))
    ordered = rows.sort(dim=-1).values
    below = torch.searchsorted(ordered, rows)
    return (below + torch.searchsorted(ordered, rows, right=True) - 1).reshape(size.shape)


def ranks_of(base: Tensor, experts: Sequence[Tensor], t: int) -> Tensor:
    """The doubled ranks of Δ_t for kernels, as int32 where they fit.

    Some rows are ranked at a time, which bounds the memory that sorts take.
    """
    columns = row_length(base)
    dtype = torch.int32 if 2 * columns < 2**31 else torch.int64
    ranks = torch.empty(base.shape, dtype=dtype, device=base.device).view(-1, columns)
    at_once = max(1, RANKED_AT_ONCE // columns)
    tensors = [tensor.reshape(-1, columns) for tensor in (base, *experts)]
    for start in range(0, ranks.shape[0], at_once):
        base_rows, *expert_rows = (tensor[start : start + at_once] for tensor in tensors)
        ranks[start : start + at_once] = doubled_ranks(base_rows, expert_rows, t)
    return ranks


def random_words(numel: int, expert: int, seed: int, device: torch.device, first: int = 0) -> Tensor:
    """32 random bits for each element from `first` on: word ⌊i/32⌋ mod 4 of counter 32·⌊i/128⌋ + i mod 32."""
    counters = torch.arange(first // RUN * 32, (first // RUN + -(-numel // RUN)) * 32, device=device)
    fixed = torch.zeros_like(counters)
    words = philox((counters & _WORD, counters >> 32, fixed + expert, fixed + MASK_STREAM), seed)
    return torch.stack(words).reshape(4, -1, 32).transpose(0, 1).reshape(-1)[:numel]
