"""Definition of `symmetric_eigen`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SymmetricEigenOptions:
    """How much of the spectrum `symmetric_eigen` computes.

    Attributes:
        k: How many eigenvalues, the largest ones first.
    """

    k: int


def symmetric_eigen(a: Tensor, options: SymmetricEigenOptions) -> tuple[Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.symmetric_eigen`: LAPACK's (or cuSOLVER's) eigenvectors of the whole matrix, in float64.

    Returns:
        Values (k,) and vectors (n, k), rounded to a's dtype, and the status: 0, or 2 where the upper triangle is not
        finite.
    """
    k, upper = options.k, a.triu().double()
    finite = torch.isfinite(upper).all()
    values, vectors = torch.linalg.eigh(torch.where(finite, upper, torch.zeros_like(upper)), UPLO="U")
    values, vectors = values.flip(0)[:k].to(a.dtype), vectors.flip(1)[:, :k].to(a.dtype)
    return values.contiguous(), vectors.contiguous(), torch.where(finite, 0, 2)
