"""Definition of `gram_product`."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.reference.deltas import task_matrix_fp32


def gram_product(base: Tensor | None, expert: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.gram_product`: products and sum in float64; y is rounded once and z, of that y, once."""
    delta = task_matrix_fp32(base, expert).double()
    y = (delta @ x.double()).float()
    return y.contiguous(), (delta.mT @ y.double()).float().contiguous(), delta.square().sum()
