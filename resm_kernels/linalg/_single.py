"""Dominant subspaces from a Gram matrix in fp32, where its rounding is small enough for the accuracy asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from resm_kernels.linalg._products import eigen_list, gram_list, matmul_list
from resm_kernels.linalg._randomized import Pair
from resm_kernels.linalg.orthonormalize import orthonormalize

_ROUNDING = 4 * 2.0**-24
"""‖E‖_F / ‖Δ‖_F² of the rounding errors E of ΔᵀΔ in fp32: measured 0.1 to 3 units for m up to 32000."""


def single_gram_list(
    matrices: Sequence[Tensor], ranks: Sequence[int], norms: Sequence[float], accuracy: float
) -> list[Pair | None]:
    """Dominant pairs of tall fp32 matrices (m ≥ n); None for one whose rounding is too much for `accuracy`.

    An eigenvector p of ΔᵀΔ + E has (ΔᵀΔ)p = λp − Ep, so that with q = Δp/σ the residual Δᵀq − σp is −Ep/σ. E is about
    alike in all directions, ‖Ep‖ ≈ ‖E‖_F/√n, which gives a relative residual of ‖E‖_F/√n·(Σ_{i≤k} 1/λ_i)^½/‖Δ‖_F.
    """
    solved = eigen_list([g.double() for g in gram_list(matrices, dtype=None)], ranks)
    found: list[Pair | None] = [None] * len(matrices)
    good: dict[int, tuple[Tensor, Tensor, float]] = {}
    for i, (a, (values, vectors), norm) in enumerate(zip(matrices, solved, norms, strict=True)):
        shift = _ROUNDING * norm**2 / math.sqrt(a.shape[1])
        if float(values[-1]) <= 100 * shift:
            continue  # the last directions are rounding, or hardly more
        residual = shift * math.sqrt(float((1 / values).sum())) / norm
        if residual <= accuracy:
            good[i] = (values.sqrt(), vectors, residual)
    images = matmul_list([(matrices[i], vectors / values) for i, (values, vectors, _) in good.items()])
    for (i, (values, vectors, residual)), image in zip(good.items(), images, strict=True):
        # Its columns are orthogonal but for the rounding of ΔᵀΔ, so that they are conditioned like 1.
        left = orthonormalize(image, passes=1)
        found[i] = Pair(left.q, (left.r.double() * values).to(image.dtype), vectors.to(image.dtype), residual)
    return found
