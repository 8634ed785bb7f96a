"""Definition of `random_matrix`."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.philox import SKETCH_STREAM, philox

_WORD = 0xFFFFFFFF


def random_matrix(n: int, columns: int, seed: int, first_column: int = 0, device: torch.device | None = None) -> Tensor:
    """See `resm_kernels.ops.random_matrix`; device None is the default one. Exact: all values are multiples of 1/4."""
    rows = torch.arange(n, device=device)[:, None]
    pairs = torch.arange(first_column // 2, (first_column + columns + 1) // 2, device=device)[None]
    bits = philox((rows & _WORD, rows >> 32, pairs, torch.full_like(pairs, SKETCH_STREAM)), seed)
    ones = [_popcount(word) for word in bits]
    entries = torch.stack([ones[0] + ones[1], ones[2] + ones[3]], dim=-1).flatten(1)
    return (entries[:, first_column % 2 : first_column % 2 + columns] - 32).float() / 4


def _popcount(word: Tensor) -> Tensor:
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF
