"""Definition of `variance_mask`."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.masks import packed
from resm_kernels.reference.aggregate import kept_deltas


def variance_mask(base: Tensor, experts: list[Tensor], density: float) -> Tensor:
    """See `resm_kernels.ops.variance_mask`."""
    spread = variance(kept_deltas(base, experts, None, None, None))
    return packed(spread >= threshold_of(spread, density))


def variance(deltas: list[Tensor]) -> Tensor:
    """Σ_t (δ_t − mean)²/T, by Welford's updates in float64 in the order of the experts, rounded to Δ's dtype.

    Where all δ are the same every update is exact, so that their variance is 0 itself.
    """
    mean = deltas[0].double()
    squares = torch.zeros_like(mean)
    for t, delta in enumerate(deltas[1:], start=1):
        change = delta.double() - mean
        mean = mean + change / (t + 1)
        squares = squares + change * (delta.double() - mean)
    return (squares / len(deltas)).to(deltas[0].dtype)


def threshold_of(spread: Tensor, density: float) -> Tensor:
    """The k-th largest variance, k = ⌊density·(how many are not 0)⌋; infinity where k is 0."""
    if not spread.numel():
        return spread.new_full((), torch.inf)
    k = (torch.count_nonzero(spread).double() * density).long()
    kth = spread.reshape(-1).sort(descending=True).values.index_select(0, (k - 1).clamp(min=0).reshape(1))
    return torch.where(k > 0, kth.reshape(()), torch.inf)
