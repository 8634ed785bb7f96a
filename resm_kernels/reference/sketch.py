"""Definition of `sketch`."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.reference.random_matrix import random_matrix


def delta_fp32(base: Tensor | None, expert: Tensor) -> Tensor:
    """Δ as products take it: formed in fp32, or in float64 and then rounded to fp32."""
    if base is None:
        return expert.float()
    dtype = compute_dtype(base, expert)
    return (expert.to(dtype) - base.to(dtype)).float()


def sketch(base: Tensor | None, expert: Tensor, columns: int, seed: int, first_column: int) -> Tensor:
    """See `resm_kernels.ops.sketch`: the product in float64, rounded once."""
    omega = random_matrix(expert.shape[1], columns, seed, first_column, expert.device).double()
    return (delta_fp32(base, expert).double() @ omega).float()
