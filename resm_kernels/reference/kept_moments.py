"""Definition of `kept_moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.reference.deltas import SparsityOptions, sparse_task_vectors, task_vectors


def kept_moments(base: Tensor, experts: list[Tensor], options: SparsityOptions) -> Tensor:
    """See `resm_kernels.ops.kept_moments`; (T, 3) float64, the fields of KeptMoments as columns."""
    every = [d.double().abs() for d in task_vectors(base, experts)]
    kept = [d.double().abs() for d in sparse_task_vectors(base, experts, options)]
    rows = [torch.stack([d.sum(), k.sum(), k.square().sum()]) for d, k in zip(every, kept, strict=True)]
    return torch.stack(rows)
