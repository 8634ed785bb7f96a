"""Definition of `variance_mask`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.masks import packed
from resm_kernels.reference.deltas import task_vectors


@dataclass(frozen=True, kw_only=True)
class VarianceMaskOptions:
    """How many elements `variance_mask` keeps.

    Attributes:
        density: The share to keep of those elements whose variance is not 0.
    """

    density: float


def variance_mask(base: Tensor, experts: list[Tensor], options: VarianceMaskOptions) -> Tensor:
    """See `resm_kernels.ops.variance_mask`."""
    variances = variance(task_vectors(base, experts))
    return packed(variances >= variance_threshold(variances, options.density))


def variance(deltas: list[Tensor]) -> Tensor:
    """Σ_t (δ_t − mean)²/T, by Welford's updates in float64 in the order of the experts, rounded to Δ's dtype.

    Where all δ are the same every update is exact, so that their variance is exactly 0.
    """
    mean = deltas[0].double()
    squares = torch.zeros_like(mean)
    for t, delta in enumerate(deltas[1:], start=1):
        change = delta.double() - mean
        mean = mean + change / (t + 1)
        squares = squares + change * (delta.double() - mean)
    return (squares / len(deltas)).to(deltas[0].dtype)


def variance_threshold(variances: Tensor, density: float) -> Tensor:
    """The k-th largest variance, k = ⌊density·(how many are not 0)⌋; infinity where k is 0."""
    if not variances.numel():
        return variances.new_full((), torch.inf)
    k = (torch.count_nonzero(variances).double() * density).long()
    kth = variances.reshape(-1).sort(descending=True).values.index_select(0, (k - 1).clamp(min=0).reshape(1))
    return torch.where(k > 0, kth.reshape(()), torch.inf)
