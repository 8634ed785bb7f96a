"""Measures, tolerances and a matrix with a gap, shared by the tests of decompositions and of subspaces.

Tolerances. `ROUNDING` is a hundred times the rounding of float64 products of this size, and `SINGLE` is 32 units of
fp32. A Gram matrix gives σ_i with an error of about 1e-16·σ_1²/σ_i, here bounded by `GRAM`·σ_1²/σ_i. Its left vectors
deviate from orthogonality by `GRAM`·(σ_1/σ_k)²; where (σ_1/σ_k)² exceeds `REPAIRED`, they are orthonormalised. A
certificate is the square root of a difference of squares: in float64 its error is at most sqrt(ROUNDING) where the true
error is small, which `CERTIFICATE` bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from inputs import orthonormal
from torch import Tensor

from resm_kernels.linalg import Subspace, subspaces

ROUNDING = 1e-13
SINGLE = 32 * 2.0**-24
GRAM = 1e-14
REPAIRED = 1e-10 / 2.0**-52
CERTIFICATE = 1e-6


def subspace(matrix: Tensor, rank: Any, **options: Any) -> Subspace:
    """The dominant subspaces of one matrix."""
    return subspaces([matrix], [rank], **options)[0]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def product(s: Subspace) -> Tensor:
    return s.left.double() @ s.core.double() @ s.right.double().mT


def projector(q: Tensor) -> Tensor:
    return q.double() @ q.double().mT


def check(matrix: Tensor, s: Subspace, k: int) -> None:
    """Check the properties that every truncation to k directions has in float64, whatever the spectrum."""
    matrix = matrix.double()
    size = float(matrix.norm())
    values = torch.linalg.svdvals(matrix)
    assert s.left.shape == (matrix.shape[0], k) and s.right.shape == (matrix.shape[1], k) and s.core.shape == (k, k)
    condition = float(values[0] / values[k - 1]) if k else 1.0
    skew = GRAM * condition if s.method == "gram" and condition**2 <= REPAIRED else 0.0
    assert distance(s.left.mT @ s.left, torch.eye(k)) <= ROUNDING + skew * condition
    assert distance(s.right.mT @ s.right, torch.eye(k)) <= ROUNDING + skew * condition
    assert distance(s.core, s.left.mT @ matrix @ s.right) <= (ROUNDING + skew) * size
    true_error = float((matrix - product(s)).norm())
    assert abs(s.error * size - true_error) <= CERTIFICATE * size
    # No matrix of rank k is nearer (Eckart, Young).
    assert true_error <= float(values[k:].norm()) * (1 + 1e-9) + CERTIFICATE * size


def stepped(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with repeated singular values and a gap from 1 to 0.1 after the sixth, and its first six vectors."""
    k, r = 6, min(m, n)
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0]), torch.full((r - k,), 0.1)]).double()
    left, right = orthonormal(m, r, 5), orthonormal(n, r, 6)
    return (left * spectrum) @ right.mT, left[:, :k], right[:, :k]
