"""All singular values of a matrix, and from them its dominant subspaces of any rank.

A spectral merge needs Δ ≈ Q·C·Pᵀ with orthonormal Q and P; that C is diagonal (a singular value decomposition) is
not needed, because polar([Q_1·R_1 … Q_T·R_T]) = polar([Q_1 … Q_T])·diag(R_1 … R_T) for orthogonal R_t.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg.dominant import dominant_list
from resm_kernels.linalg.orthonormalize import orthonormalize
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, frobenius_norm, gram_list, matmul
from resm_kernels.linalg.routes import FullDecompositionMethod
from resm_kernels.linalg.threads import run


@dataclass(frozen=True)
class Subspace:
    """Δ ≈ left · core · rightᵀ.

    Attributes:
        left: Q, (m, k), orthonormal columns.
        core: C = QᵀΔP, (k, k).
        right: P, (n, k), orthonormal columns.
        error: The certificate: ‖Δ − QCPᵀ‖_F / ‖Δ‖_F is at most this, and not much less; 0 for Δ = 0.
        method: The route that computed it: "gram", "exact", "randomized" or "projector".
        reason: Why that route was taken, in words.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    error: float
    method: str
    reason: str = "asked for"


class Decomposition:
    """All singular values of a matrix, and its dominant subspaces of any rank; see `decompose`."""

    def __init__(
        self,
        matrix: Tensor,
        singular_values: Tensor,
        left: Tensor | None,
        right: Tensor,
        energy: float | None = None,
        image: Tensor | None = None,
    ):
        """`energy` is ‖Δ‖_F², needed if some `singular_values` are missing; `image` is Δ·right, if formed."""
        self._matrix, self._left, self._right, self._image = matrix, left, right, image
        self._energy = float(singular_values.square().sum()) if energy is None else energy
        self.singular_values = singular_values
        """σ_1 ≥ … ≥ σ_r ≥ 0, float64."""

    @property
    def rank(self) -> int:
        """The numerical rank: how many σ_i exceed `RANK_TOLERANCE`·σ_1."""
        if not self.singular_values.numel():
            return 0
        return int((self.singular_values > RANK_TOLERANCE * self.singular_values[0]).sum())

    def truncate(self, k: int) -> Subspace:
        """The subspaces of the k largest singular values; if the numerical rank is less than k, of that many."""
        k = min(k, self.rank)
        values, right = self.singular_values[:k], self._right[:, :k]
        if self._left is not None:
            left, core = self._left[:, :k], values.diag()
        else:
            image = matmul(self._matrix, right, torch.float64) if self._image is None else self._image[:, :k]
            left, core = _left_of(image, values)
        method = "gram" if self._left is None else "exact"
        return Subspace(left, core, right, self._error(core), method)

    def _error(self, core: Tensor) -> float:
        total = self._energy
        if total == 0:
            return 0.0
        # Rounding of the sums and of the Gram matrix's eigenvalues, each below √r·u·σ_1 in the units of σ².
        slack = 8 * self._matrix.shape[1] * torch.finfo(torch.float64).eps * total
        lost = total - frobenius_norm(core) ** 2
        return math.pow((max(lost, 0.0) + slack) / total, 0.5)


def _left_of(product: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Q and C with Q·C = ΔP, where the columns of ΔP are orthogonal but for rounding; `values` are their lengths."""
    if values.numel() == 0:
        return product, product.new_zeros(0, 0)
    # Columns i, j of ΔP/σ deviate from orthogonality by u·σ_1²/(σ_i·σ_j). Up to 1e-12 scaling them suffices.
    if float(values[-1] / values[0]) ** 2 > 1e12 * torch.finfo(torch.float64).eps:
        return product / values, values.diag()
    # At the numerical rank the deviation is at most 1e-4, whose square one pass leaves: less than float64's rounding.
    orthonormal = orthonormalize(product / values, passes=1)
    return orthonormal.q, orthonormal.r * values


def decompose(matrix: Tensor, method: str = "gram") -> Decomposition:
    """Decompose a matrix in float64.

    Args:
        matrix: (m, n), finite; fp32 is converted to float64 piece by piece.
        method: "gram" (default) takes the eigenvectors of the smaller Gram matrix: products and one symmetric
            eigenproblem, several times faster than an SVD; σ_i is right to about 1e-16·σ_1²/σ_i. "exact" is
            LAPACK's SVD, the yardstick.

    Returns:
        Decomposition with r = min(m, n) singular values.

    Raises:
        ValueError: `matrix` is not a matrix, or the method is unknown.
        NonFiniteError: NaN or infinite values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    return _checked({"matrix": matrix}, method)[0]


def decompose_list(matrices: Sequence[Tensor], method: str = "gram") -> list[Decomposition]:
    """`decompose` of several matrices side by side: they fill the threads that a single eigenproblem leaves idle."""
    return _checked({f"matrices[{i}]": matrix for i, matrix in enumerate(matrices)}, method)


def _checked(matrices: dict[str, Tensor], method: str) -> list[Decomposition]:
    """The decompositions of matrices with the names that errors use."""
    for i, (name, matrix) in enumerate(matrices.items()):
        if matrix.ndim != 2:
            raise ValueError(f"{name}: got {matrix.ndim} dimensions, need 2")
        finite_norm(matrix, name, i)
    return decompose_counted(list(matrices.values()), method)


def decompose_counted(
    matrices: Sequence[Tensor], method: str, counts: Sequence[int] | None = None
) -> list[Decomposition]:
    """`decompose_list` without its checks; with `counts`, "gram" computes only that many of the largest values."""
    if method == "exact":
        return run([functools.partial(_exact, m) for m in matrices], matrices[0].device) if matrices else []
    if method != "gram":
        raise ValueError(f"method: got {method!r}, need one of {', '.join(get_args(FullDecompositionMethod))}")
    tall = [m if m.shape[0] >= m.shape[1] else m.mT for m in matrices]
    kinds = [Decomposition if a is matrix else _Transposed for a, matrix in zip(tall, matrices, strict=True)]
    if counts is not None:
        solved = dominant_list(tall, counts, torch.float64)
        return [
            kind(a, d.values.clamp(min=0).sqrt(), None, d.vectors, d.energy, d.image)
            for kind, a, d in zip(kinds, tall, solved, strict=True)
        ]
    grams = gram_list(tall)
    return [
        kind(a, values.clamp(min=0).sqrt(), None, vectors, float(g.diagonal().sum()))
        for kind, a, g, (values, vectors) in zip(kinds, tall, grams, eigen_list(grams), strict=True)
    ]


def _exact(matrix: Tensor) -> Decomposition:
    left, values, right_t = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Decomposition(matrix, values, left, right_t.mT)


class _Transposed(Decomposition):
    """The decomposition of a wide matrix, through its transpose's."""

    def truncate(self, k: int) -> Subspace:
        return transposed(super().truncate(k))


def transposed(s: Subspace) -> Subspace:
    """The subspace of the matrix's transpose."""
    return replace(s, left=s.right, core=s.core.mT, right=s.left)


def finite_norm(matrix: Tensor, name: str, i: int) -> float:
    """‖matrix‖_F; if it is not finite, an error that names the matrix.

    Raises:
        NonFiniteError: The matrix has NaN or infinite values; `i` is the index that the error carries.
        ValueError: The norm's square overflows float64.
    """
    norm = frobenius_norm(matrix)
    if not math.isfinite(norm):
        count = matrix.numel() - int(torch.isfinite(matrix).sum())
        if count:
            raise NonFiniteError(name, i, count)
        raise ValueError(f"{name}: values so large that their squares overflow float64")
    return norm
