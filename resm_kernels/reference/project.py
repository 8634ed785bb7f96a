"""Definition of `project`."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.reference.deltas import task_matrix_fp32


def project(base: Tensor | None, expert: Tensor, q: Tensor) -> Tensor:
    """See `resm_kernels.ops.project`: the product in float64, rounded once."""
    return (q.double().mT @ task_matrix_fp32(base, expert).double()).float().contiguous()
