"""Definition of `delta_stats`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.reference._delta import deltas

HISTOGRAM_BINS = 256
_EXPONENT_BIAS = 127


def delta_stats(
    bases: list[Tensor], experts: list[Tensor], eps: float, eps_rel: float, kappa: float | None, histogram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats`; `experts` holds tensor 0's experts, then tensor 1's, and so on.

    Returns moments (L, T, 5) float64, counts (L, T, 5) int64, and the histogram's counts and sums (L, T, bins).
    """
    n_tensors = len(bases)
    n_experts = len(experts) // n_tensors if n_tensors else 0
    rows = [_one(delta, eps, eps_rel, kappa, histogram) for delta in deltas(bases, experts)]
    bins = HISTOGRAM_BINS if histogram else 0
    moments, counts, bin_counts, bin_sums = zip(*rows, strict=True) if rows else ((), (), (), ())
    device = bases[0].device if bases else torch.device("cpu")
    return (
        _stack(moments, (n_tensors, n_experts, 5), torch.float64, device),
        _stack(counts, (n_tensors, n_experts, 5), torch.int64, device),
        _stack(bin_counts, (n_tensors, n_experts, bins), torch.int64, device),
        _stack(bin_sums, (n_tensors, n_experts, bins), torch.float64, device),
    )


def _stack(rows: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack(rows).reshape(shape) if rows else torch.zeros(shape, dtype=dtype, device=device)


def _one(
    delta: Tensor, eps: float, eps_rel: float, kappa: float | None, histogram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = delta.double()
    size = d.abs()
    n = d.numel()
    zero = d.new_zeros(())
    total, total_sq, total_abs = d.sum(), (d * d).sum(), size.sum()
    largest = size.max() if n else zero
    small = eps + zero if eps_rel == 0 else torch.clamp(eps_rel * (total_sq / max(n, 1)).sqrt(), min=eps)
    if kappa is None:
        outlier = torch.zeros_like(d, dtype=torch.bool)
    else:
        mean = total / max(n, 1)
        spread = kappa * torch.clamp(total_sq / max(n, 1) - mean * mean, min=0.0).sqrt()
        outlier = (d > mean + spread) | (d < mean - spread)
    moments = torch.stack([total, total_sq, total_abs, largest, torch.where(outlier, size, 0.0).sum()])
    n_nonfinite = n - torch.isfinite(d).sum()
    counts = torch.stack([(d == 0).sum(), (size <= small).sum(), outlier.sum(), n_nonfinite, n_nonfinite * 0 + n])
    bin_counts, bin_sums = _histogram(size, histogram)
    return moments, counts, bin_counts, bin_sums


def _histogram(size: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    bins = HISTOGRAM_BINS if wanted else 0
    counts, sums = size.new_zeros(bins, dtype=torch.int64), size.new_zeros(bins)
    if not wanted:
        return counts, sums
    # frexp gives m·2^e with 1/2 ≤ m < 1, so ⌊log₂|δ|⌋ = e − 1.
    exponent = torch.frexp(size).exponent.long() - 1 + _EXPONENT_BIAS
    index = torch.where(size == 0, 0, exponent.clamp(0, HISTOGRAM_BINS - 2))
    index = torch.where(torch.isfinite(size), index, HISTOGRAM_BINS - 1)
    return counts.scatter_add(0, index, torch.ones_like(index)), sums.scatter_add(0, index, size)


def histogram_edges() -> list[float]:
    """Lower edges of the bins: 0, then 2^(i−127) for bin i; the last bin holds infinities and NaN."""
    return [0.0] + [math.ldexp(1.0, i - _EXPONENT_BIAS) for i in range(1, HISTOGRAM_BINS - 1)] + [math.inf]
