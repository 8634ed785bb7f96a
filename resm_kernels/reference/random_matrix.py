"""Definition of `random_matrix`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.philox import SKETCH_STREAM, philox

_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class RandomMatrixOptions:
    """The part of a random matrix that `random_matrix` draws, and its device.

    Attributes:
        n: How many rows.
        columns: How many columns.
        seed: The key of the random numbers; every seed has another matrix.
        first_column: The index of the first column.
        device: The result's device.
    """

    n: int
    columns: int
    seed: int
    first_column: int
    device: torch.device


def random_matrix(options: RandomMatrixOptions) -> Tensor:
    """See `resm_kernels.ops.random_matrix`. Exact: all values are multiples of 1/4."""
    first, columns, device = options.first_column, options.columns, options.device
    rows = torch.arange(options.n, device=device)[:, None]
    pairs = torch.arange(first // 2, (first + columns + 1) // 2, device=device)[None]
    bits = philox((rows & _WORD, rows >> 32, pairs, torch.full_like(pairs, SKETCH_STREAM)), options.seed)
    ones = [_popcount(word) for word in bits]
    entries = torch.stack([ones[0] + ones[1], ones[2] + ones[3]], dim=-1).flatten(1)
    return (entries[:, first % 2 : first % 2 + columns] - 32).float() / 4


def _popcount(word: Tensor) -> Tensor:
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF
