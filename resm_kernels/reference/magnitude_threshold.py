"""Definition of `magnitude_threshold`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.reference.deltas import task_vectors


@dataclass(frozen=True, kw_only=True)
class MagnitudeThresholdOptions:
    """Which order statistics `magnitude_threshold` finds.

    Attributes:
        k: k_1 … k_T: τ_t is the k_t-th largest |δ| of expert t, and infinity for k_t = 0.
    """

    k: tuple[int, ...]


def magnitude_threshold(
    base: Tensor, experts: list[Tensor], options: MagnitudeThresholdOptions
) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold`.

    Returns:
        τ_1 … τ_T float64, and (T,) int64: how many |δ| of each expert are not finite.
    """
    deltas = [delta.reshape(-1) for delta in task_vectors(base, experts)]
    thresholds = [_kth_largest(delta, k) for delta, k in zip(deltas, options.k, strict=True)]
    return torch.stack(thresholds), torch.stack([d.numel() - torch.isfinite(d).sum() for d in deltas])


def _kth_largest(delta: Tensor, k: int) -> Tensor:
    if k == 0:
        return delta.new_full((), math.inf, dtype=torch.float64)
    return delta.abs().sort(descending=True).values[k - 1].double()
