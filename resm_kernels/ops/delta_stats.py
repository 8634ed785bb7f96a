"""Statistics of task vectors Δ_t = θ_t − θ₀ in one read of base and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_number, raise_nonfinite
from resm_kernels.ops._library import declare
from resm_kernels.reference.delta_stats import HISTOGRAM_BINS, DeltaStatsOptions, histogram_edges
from resm_kernels.reference.delta_stats import delta_stats as _reference
from resm_kernels.stages import kept


@dataclass(frozen=True)
class DeltaStats:
    """Statistics of δ = θ_t − θ₀. Every field has the shape (T,), or (T, *shape[:-1]) for statistics of rows.

    Attributes:
        numel: N, the number of parameters.
        sum, sum_sq, sum_abs, max_abs: Σδ, Σδ², Σ|δ| and max|δ|, float64.
        n_zero: How many δ are exactly zero.
        n_small: How many |δ| ≤ max(eps, eps_rel·rms(Δ_t)).
        n_outlier, outlier_sum_abs: How many |δ − μ| > κσ, and their Σ|δ|; zero if `kappa` was None.
        n_nonfinite: How many δ are NaN or infinite (only with `check_finite=False`).
        histogram_counts, histogram_sum_abs: Number and Σ|δ| of the values in each bin of log₂|δ| (last dimension,
            256 bins: bin i from 1 to 254 holds 2^(i−127) ≤ |δ| < 2^(i−126), bin 0 smaller values, zeros included,
            and bin 254 larger values too); None unless `histogram` asks for them.
    """

    numel: Tensor
    sum: Tensor
    sum_sq: Tensor
    sum_abs: Tensor
    max_abs: Tensor
    n_zero: Tensor
    n_small: Tensor
    n_outlier: Tensor
    outlier_sum_abs: Tensor
    n_nonfinite: Tensor
    histogram_counts: Tensor | None = None
    histogram_sum_abs: Tensor | None = None

    def mean(self) -> Tensor:
        """μ = Σδ / N; 0 for an empty tensor."""
        return self.sum / self.numel.clamp(min=1)

    def std(self) -> Tensor:
        """σ = sqrt(Σδ²/N − μ²), the population's standard deviation."""
        return (self.sum_sq / self.numel.clamp(min=1) - self.mean() ** 2).clamp(min=0).sqrt()

    def rms(self) -> Tensor:
        """sqrt(Σδ² / N)."""
        return (self.sum_sq / self.numel.clamp(min=1)).sqrt()

    def sparsity(self) -> Tensor:
        """s_t, the share of |δ| ≤ ε; 0 for an empty tensor."""
        return self.n_small.double() / self.numel.clamp(min=1)

    def outlier_mass(self) -> Tensor:
        """a_t = (1/N)·Σ over outliers of |δ|."""
        return self.outlier_sum_abs / self.numel.clamp(min=1)

    def quantile(self, q: float) -> Tensor:
        """The q-quantile of |δ|, interpolated linearly within its bin of the histogram.

        The bin is the right one, so that the result is right to a factor of two. `magnitude_threshold` finds exact
        order statistics.

        Raises:
            ValueError: If q is outside [0, 1] or the histogram was not asked for.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q: got {q!r}, need a number from 0 to 1")
        if self.histogram_counts is None:
            raise ValueError("quantile needs the histogram: call delta_stats with histogram=True")
        edges = torch.tensor(histogram_edges(), dtype=torch.float64, device=self.histogram_counts.device)
        cumulative = self.histogram_counts.cumsum(-1).double()
        # Rank 0 belongs to the smallest value's bin, not to the empty ones below it.
        rank = (q * cumulative[..., -1:]).clamp(min=torch.finfo(torch.float64).tiny).contiguous()
        bins = torch.searchsorted(cumulative, rank).clamp(max=HISTOGRAM_BINS - 2)
        inside = self.histogram_counts.gather(-1, bins).clamp(min=1)
        before = cumulative.gather(-1, bins) - inside
        low, high = edges[bins], edges[bins + 1].clamp(max=math.ldexp(1.0, 128))
        return (low + (high - low) * ((rank - before) / inside).clamp(0, 1)).squeeze(-1).minimum(self.max_abs)


def delta_stats(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    eps: float = 0.0,
    eps_rel: float = 0.0,
    kappa: float | None = 3.0,
    histogram: bool = False,
    rows: bool = False,
    check_finite: bool = True,
) -> DeltaStats:
    """Sparsity, moments, outliers and histogram of the task vectors of T experts (RESM, arXiv 2502.06876).

    Δ is formed in fp32 (float64 if base or any expert is float64) and never stored. Base and experts are read once, or
    twice if outliers (κ) or a relative ε are asked for, because those need the moments first.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        eps: ε of `n_small`, absolute. The default 0 counts exact zeros, the natural sparsity of bf16 checkpoints.
        eps_rel: ε as a multiple of rms(Δ_t). The larger one of `eps` and this product is used.
        kappa: κ of the outlier rule |δ − μ| > κσ; 3 is the usual choice for heavy-tailed deltas. None skips it.
        histogram: Also count |δ| in 256 bins of log₂|δ|.
        rows: Compute statistics of each row, a vector along the last dimension, instead of the whole tensor.
        check_finite: Refuse NaN and infinity (the default); if False they are counted in `n_nonfinite`, and the
            moments of that expert are not finite.

    Returns:
        DeltaStats with fields of shape (T,), or with `rows` (T, *shape[:-1]).

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Precision: Σ|δ|, Σδ² and the outliers' Σ|δ| have relative errors of at most 7e-7 (1e-9 is usual) against exact sums
    of the fp32 Δ. The error of Σδ is at most 1e-12·Σ|δ|, or 2e-7·Σ|δ| if both inputs are half precision, where Σδ is
    mostly exact. Counts and the histogram's sums are exact; for float64 inputs the sums take 24 bits of each value.

    Determinism: the CPU adds in a fixed tree, in fp32 within 512 values where that is accurate enough and in float64
    above, so that the result has the same bits for any number of threads and any instruction set. A GPU adds chunks of
    16384 values in float64, in their order: the bits are the same on one kind of GPU, and closer to the exact sums.
    """
    check_group(base, experts)
    options = DeltaStatsOptions(
        eps=check_number("eps", eps, minimum=0),
        eps_rel=check_number("eps_rel", eps_rel, minimum=0),
        kappa=None if kappa is None else check_number("kappa", kappa, minimum=0),
        histogram=bool(histogram),
        rows=bool(rows),
    )
    moments, counts, bin_counts, bin_sums = kept(
        ("delta_stats", options), (base, *experts), lambda: _delta_stats(base, list(experts), options)
    )
    stats = DeltaStats(
        numel=counts[..., 4],
        sum=moments[..., 0],
        sum_sq=moments[..., 1],
        sum_abs=moments[..., 2],
        max_abs=moments[..., 3],
        n_zero=counts[..., 0],
        n_small=counts[..., 1],
        n_outlier=counts[..., 2],
        outlier_sum_abs=moments[..., 4],
        n_nonfinite=counts[..., 3],
        histogram_counts=bin_counts if histogram else None,
        histogram_sum_abs=bin_sums if histogram else None,
    )
    if check_finite and bool(stats.n_nonfinite.any()):
        raise_nonfinite(base, experts)
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors")
    return stats


def _native(base: Tensor, experts: list[Tensor], options: DeltaStatsOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (len(experts), *options.vectors_shape(base))
    moments, counts = torch.empty((*shape, 5), dtype=torch.float64), torch.empty((*shape, 5), dtype=torch.int64)
    bin_counts = torch.empty((*shape, options.bins), dtype=torch.int64)
    bin_sums = torch.empty((*shape, options.bins), dtype=torch.float64)
    threads = torch.get_num_threads()
    _extension.native.delta_stats(base, experts, options, moments, counts, bin_counts, bin_sums, threads)
    return moments, counts, bin_counts, bin_sums


_delta_stats = declare(_reference, cpu=_native, gpu=("triton", "cuda"))  # not measured against each other yet
