"""Definition of `magnitude_threshold`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.reference._delta import deltas


def magnitude_threshold(bases: list[Tensor], experts: list[Tensor], k: list[int]) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold`; `experts` and `k` run over experts fastest.

    Returns thresholds (L, T) float64, and how many |δ| are not finite (L, T) int64.
    """
    shape = (len(bases), len(experts) // len(bases) if bases else 0)
    device = bases[0].device if bases else torch.device("cpu")
    if not experts:
        return (
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )
    found = deltas(bases, experts)
    thresholds = torch.stack([_kth_largest(d, k[i]) for i, d in enumerate(found)])
    nonfinite = torch.stack([d.numel() - torch.isfinite(d).sum() for d in found])
    return thresholds.reshape(shape), nonfinite.reshape(shape)


def _kth_largest(delta: Tensor, k: int) -> Tensor:
    if k == 0:
        return delta.new_full((), math.inf, dtype=torch.float64)
    return delta.abs().sort(descending=True).values[k - 1].double()
