"""Dominant left and right subspaces of a matrix, with the core that connects them.

A spectral merge needs Δ ≈ Q·C·Pᵀ with orthonormal Q and P; that C is diagonal (a singular value decomposition) is
not needed, because polar([Q_1·R_1 … Q_T·R_T]) = polar([Q_1 … Q_T])·diag(R_1 … R_T) for orthogonal R_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.linalg.polar import RANK_TOLERANCE

DECOMPOSITIONS = ("gram", "exact")


@dataclass(frozen=True)
class Subspace:
    """Δ ≈ left · core · rightᵀ.

    Attributes:
        left: Q, (m, k), orthonormal columns.
        core: C = QᵀΔP, (k, k).
        right: P, (n, k), orthonormal columns.
        error: ‖Δ − QCPᵀ‖_F / ‖Δ‖_F, from ‖Δ‖² − ‖C‖²; 0 for Δ = 0.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    error: float


class Decomposition:
    """All singular values of a matrix, and its dominant subspaces of any rank; see `decompose`."""

    def __init__(self, matrix: Tensor, singular_values: Tensor, left: Tensor | None, right: Tensor):
        self._matrix, self._left, self._right = matrix, left, right
        self.singular_values = singular_values
        """σ_1 ≥ … ≥ σ_r ≥ 0, float64."""

    @property
    def rank(self) -> int:
        """The numerical rank: how many σ_i exceed `RANK_TOLERANCE`·σ_1."""
        if not self.singular_values.numel():
            return 0
        return int((self.singular_values > RANK_TOLERANCE * self.singular_values[0]).sum())

    def truncate(self, k: int) -> Subspace:
        """The subspaces of the largest singular values: k of them, or the numerical rank if that is smaller."""
        k = min(k, self.rank)
        right = self._right[:, :k]
        if self._left is None:
            # QR rather than ΔP/σ: orthonormal to working precision whatever the condition, and Q·R = ΔP exactly.
            left, core = torch.linalg.qr(self._matrix @ right)
        else:
            left, core = self._left[:, :k], self.singular_values[:k].diag()
        total = self.singular_values.square().sum()
        lost = (total - core.square().sum()).clamp(min=0)
        return Subspace(left, core, right, float((lost / total).sqrt()) if total > 0 else 0.0)


def decompose(matrix: Tensor, method: str = "gram") -> Decomposition:
    """Decompose a matrix in float64.

    Args:
        matrix: (m, n), finite; converted to float64.
        method: "gram" (default) takes the eigenvectors of the smaller Gram matrix: products and one symmetric
            eigenproblem, several times faster than an SVD; σ_i is right to about 1e-16·σ_1²/σ_i. "exact" is
            LAPACK's SVD, the yardstick.

    Returns:
        Decomposition with r = min(m, n) singular values.

    Determinism: the same bits for the same input and number of threads.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix: got {matrix.ndim} dimensions, need 2")
    matrix = matrix.double()
    if method == "exact":
        left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
        return Decomposition(matrix, values, left, right_t.mT)
    if method != "gram":
        raise ValueError(f"method: got {method!r}, need one of {', '.join(DECOMPOSITIONS)}")
    if matrix.shape[0] < matrix.shape[1]:
        return _Transposed(decompose(matrix.mT, method))
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return Decomposition(matrix, values.flip(0).clamp(min=0).sqrt(), None, vectors.flip(1))


class _Transposed(Decomposition):
    """The decomposition of a wide matrix, through its transpose's."""

    def __init__(self, inner: Decomposition):
        self._inner = inner
        self.singular_values = inner.singular_values

    def truncate(self, k: int) -> Subspace:
        s = self._inner.truncate(k)
        return Subspace(s.right, s.core.mT, s.left, s.error)
