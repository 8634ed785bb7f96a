"""Definition of `kept_moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.reference.aggregate import kept_deltas


def kept_moments(
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor | None,
    upper_thresholds: Tensor | None,
    masks: list[Tensor] | None,
) -> Tensor:
    """See `resm_kernels.ops.kept_moments`."""
    every = [d.double().abs() for d in kept_deltas(base, experts, None, None, None)]
    kept = [d.double().abs() for d in kept_deltas(base, experts, thresholds, upper_thresholds, masks)]
    rows = [torch.stack([d.sum(), k.sum(), k.square().sum()]) for d, k in zip(every, kept, strict=True)]
    return torch.stack(rows)
