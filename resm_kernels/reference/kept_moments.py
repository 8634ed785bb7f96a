"""Definition of `kept_moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.reference.deltas import SparsityOptions, sparse_task_vectors, task_vectors


def kept_moments(base: Tensor, experts: list[Tensor], options: SparsityOptions) -> Tensor:
    """See `resm_kernels.ops.kept_moments`; (T, 3) float64, the fields of KeptMoments as columns."""
    dense = [d.double().abs() for d in task_vectors(base, experts)]
    sparse = [d.double().abs() for d in sparse_task_vectors(base, experts, options)]
    return torch.stack([torch.stack([d.sum(), s.sum(), s.square().sum()]) for d, s in zip(dense, sparse, strict=True)])
