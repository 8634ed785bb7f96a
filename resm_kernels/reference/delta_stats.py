"""Definition of `delta_stats`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.reference.deltas import task_vectors, vector_layout

HISTOGRAM_BINS: Final = 256
_EXPONENT_BIAS: Final = 127


@dataclass(frozen=True, kw_only=True)
class DeltaStatsOptions:
    """Which statistics `delta_stats` takes; `resm_kernels.ops.delta_stats` says more about each.

    Attributes:
        eps: ε, absolute.
        eps_rel: ε as a multiple of rms(Δ_t).
        kappa: κ of the outlier rule; None for no outliers.
        histogram: Whether |δ| is counted in bins.
        rows: Whether each row along the last dimension has statistics, instead of the whole tensor.
    """

    eps: float = 0.0
    eps_rel: float = 0.0
    kappa: float | None = None
    histogram: bool = False
    rows: bool = False

    @property
    def bins(self) -> int:
        """The length of the histograms that an op returns."""
        return HISTOGRAM_BINS if self.histogram else 0

    def vectors_shape(self, base: Tensor) -> tuple[int, ...]:
        """The shape of one number for each vector that has statistics."""
        return tuple(base.shape[:-1]) if self.rows else ()


def delta_stats(
    base: Tensor, experts: list[Tensor], options: DeltaStatsOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats`.

    Returns:
        For each expert, and each row of it where `rows` asks for them (T, or T and the base's leading dimensions): five
        moments float64 (Σδ, Σδ², Σ|δ|, max|δ|, outliers' Σ|δ|), five counts int64 (zero, small, outliers, not finite,
        all), and the histogram's counts int64 and sums float64, `options.bins` long. The last bin counts the values
        that are not finite; where one of these is NaN, a backend may give the bin's sum as NaN or as ∞.
    """
    count, length = vector_layout(base.shape, options.rows)
    vectors = [v for delta in task_vectors(base, experts) for v in delta.reshape(count, length).unbind(0)]
    shape = (len(experts), *options.vectors_shape(base))
    if not vectors:
        return (
            base.new_zeros((*shape, 5), dtype=torch.float64),
            base.new_zeros((*shape, 5), dtype=torch.int64),
            base.new_zeros((*shape, options.bins), dtype=torch.int64),
            base.new_zeros((*shape, options.bins), dtype=torch.float64),
        )
    moments, counts, bin_counts, bin_sums = (
        torch.stack(parts).reshape(*shape, parts[0].numel())
        for parts in zip(*(_vector_stats(v, options) for v in vectors), strict=True)
    )
    return moments, counts, bin_counts, bin_sums


def _vector_stats(delta: Tensor, options: DeltaStatsOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = delta.double()
    size = d.abs()
    n = d.numel()
    zero = d.new_zeros(())
    total, total_sq, total_abs = d.sum(), (d * d).sum(), size.sum()
    largest = size.max() if n else zero
    eps, eps_rel = options.eps, options.eps_rel
    small = eps + zero if eps_rel == 0 else torch.clamp(eps_rel * (total_sq / max(n, 1)).sqrt(), min=eps)
    if options.kappa is None:
        outlier = torch.zeros_like(d, dtype=torch.bool)
    else:
        mean = total / max(n, 1)
        spread = options.kappa * torch.clamp(total_sq / max(n, 1) - mean * mean, min=0.0).sqrt()
        outlier = (d > mean + spread) | (d < mean - spread)
    moments = torch.stack([total, total_sq, total_abs, largest, torch.where(outlier, size, 0.0).sum()])
    n_nonfinite = n - torch.isfinite(d).sum()
    counts = torch.stack([(d == 0).sum(), (size <= small).sum(), outlier.sum(), n_nonfinite, n_nonfinite * 0 + n])
    return moments, counts, *_histogram(size, options.bins)


def _histogram(size: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    counts, sums = size.new_zeros(bins, dtype=torch.int64), size.new_zeros(bins)
    if not bins:
        return counts, sums
    # frexp gives m·2^e with 1/2 ≤ m < 1, so ⌊log₂|δ|⌋ = e − 1.
    exponent = torch.frexp(size).exponent.long() - 1 + _EXPONENT_BIAS
    index = torch.where(size == 0, 0, exponent.clamp(0, HISTOGRAM_BINS - 2))
    index = torch.where(torch.isfinite(size), index, HISTOGRAM_BINS - 1)
    return counts.scatter_add(0, index, torch.ones_like(index)), sums.scatter_add(0, index, size)


def histogram_edges() -> list[float]:
    """Lower edges of the bins: 0, then 2^(i−127) for bin i; the last bin holds infinities and NaN."""
    return [0.0] + [math.ldexp(1.0, i - _EXPONENT_BIAS) for i in range(1, HISTOGRAM_BINS - 1)] + [math.inf]
