"""The orthonormal polar factor."""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values at most this times the largest count as zero.

Task vectors come out of fp32 subtractions: what is smaller than about 1e-6 of the largest direction is rounding, and
spectral merges, which give every kept direction the same length, would blow it up.
"""


def polar(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to x: x·(xᵀx)^(−1/2).

    Where x has not full column rank no such matrix is unique. The result then is the partial isometry of x's own
    range, x·((xᵀx)^+)^(1/2): it adds no arbitrary directions, so that T copies of one orthonormal basis Q give
    [Q … Q]/√T.

    Args:
        x: (m, c), c ≤ m, finite.

    Returns:
        (m, c) in float64. The inverse root comes from an eigendecomposition of xᵀx in float64, whose error is about
        1e-16·cond(x)²; singular values up to `RANK_TOLERANCE` times the largest count as zero, so that is 1e-4 at
        worst and 1e-8 at cond(x) = 10⁴. An fp32 SVD, which peers use, has 1e-7·cond(x).

    Determinism: the same bits for the same input and number of threads.
    """
    if x.ndim != 2:
        raise ValueError(f"x: got {x.ndim} dimensions, need 2")
    x = x.double()
    if x.shape[1] == 0:
        return x
    values, vectors = torch.linalg.eigh(x.mT @ x)
    kept = values > values[-1].clamp(min=0) * RANK_TOLERANCE**2
    scale = torch.where(kept, values, 1.0).rsqrt() * kept
    return x @ ((vectors * scale) @ vectors.mT)
