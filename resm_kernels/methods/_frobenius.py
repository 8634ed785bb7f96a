"""Inner products of matrices taken as vectors, cut at fixed rows: torch's own depend on the number of threads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels.linalg._threads import run

_ELEMENTS = 1 << 18


def inner_products(matrices: Sequence[Tensor]) -> Tensor:
    """The symmetric T×T matrix of ⟨A_s, A_t⟩ = Σ_ij a_ij·b_ij, in float64; every A_t (m, n), any floating dtype."""
    m, n = matrices[0].shape
    rows = max(1, _ELEMENTS // max(1, n * len(matrices)))
    parts = run(
        [functools.partial(_of_rows, matrices, i, min(i + rows, m)) for i in range(0, m, rows)], matrices[0].device
    )
    total = torch.zeros(len(matrices), len(matrices), dtype=torch.float64, device=matrices[0].device)
    for part in parts:
        total += part
    return total


def _of_rows(matrices: Sequence[Tensor], start: int, stop: int) -> Tensor:
    flat = torch.stack([a[start:stop].double().reshape(-1) for a in matrices])
    found = flat @ flat.mT
    return (found + found.mT) / 2
