"""Dominant subspaces from a Gram matrix in fp32, where its rounding is small enough for the accuracy asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from resm_kernels.linalg._dominant import Dominant, dominant_list
from resm_kernels.linalg._products import frobenius_norm, gram, matmul
from resm_kernels.linalg._randomized import Pair
from resm_kernels.linalg._threads import run
from resm_kernels.linalg.orthonormalize import orthonormalize

_ROUNDING = 2.0**-25
"""‖Ep‖/‖ΔᵀΔ‖₂ of the errors E of ΔᵀΔ and of its eigenvectors p, all in fp32: measured 0.1 to 0.8 units."""
_FLOOR = 8 * _ROUNDING
"""(σ_k/σ_1)² up to which the last directions are rounding, or hardly more."""
_NEARLY = 2e-2
"""‖QᵀQ − I‖_F whose third power, times 5/16, is less than 3e-6."""
_NEGLIGIBLE = 1e-3
"""Share of ‖Δ‖ that a core may leave out: half of it, squared, is less than 3e-7 of the certificate's slack."""


def single_gram_list(
    matrices: Sequence[Tensor], ranks: Sequence[int], norms: Sequence[float], accuracy: float
) -> list[Pair | None]:
    """Dominant pairs of tall fp32 matrices (m ≥ n), k ≥ 1; None for one whose rounding is too much for `accuracy`.

    Gram matrix, its eigenvectors P and ΔP are fp32.
    """
    dominants = dominant_list(matrices, ranks, torch.float32)
    tasks = [partial(_pair, dominant, norm) for dominant, norm in zip(dominants, norms, strict=True)]
    # Several side by side, each on one thread, as their many small steps are not worth sharing out.
    pairs = run(tasks, matrices[0].device) if len(tasks) > 1 else [task() for task in tasks]
    return [pair if pair is not None and pair.residual <= accuracy else None for pair in pairs]


def _pair(dominant: Dominant, norm: float) -> Pair | None:
    """Q, C and P with Q·C ≈ ΔP; None where the last directions are rounding.

    With the columns of ΔP scaled to length 1 and F = QᵀQ − I, C·F·C is what errors E of the eigenproblem leave between
    the directions kept, off the diagonal of Pᵀ(ΔᵀΔ)P. E is about alike in all directions, so that ‖F·C‖_F·√(n/k)/‖Δ‖_F
    is the residual ‖Δᵀq − σp‖ = ‖Ep‖/σ of all of them. Few directions say little about E: it counts as what it is as a
    rule, at least. Measured for σ_i ~ i^−0.3 to i^−1.5, n = 256 to 1024 and k ≥ n/12: 2 to 5 times the true residual;
    for k of 1 to 3 within 4e-7, what the products round themselves.

    Q is made orthonormal by the series of (I + F)^(−1/2), I − F/2 + 3F²/8. C stays diagonal: QᵀΔP is (I + F/2)·C.
    """
    values, vectors, image, _ = dominant
    if float(values[-1]) <= _FLOOR * float(values[0]):
        return None
    n, k = vectors.shape
    f = gram(image, None)
    lengths = f.diagonal().sqrt()
    f = f.div_(lengths).div_(lengths[:, None])
    f.diagonal().zero_()
    inside = frobenius_norm(f * lengths) / norm
    usual = _ROUNDING * float(values[0]) * math.sqrt(float((1 / values).sum())) / norm
    residual = max(inside * math.sqrt(n / k), usual)
    if frobenius_norm(f) > _NEARLY or inside > _NEGLIGIBLE:
        left = orthonormalize(image / lengths, passes=1)
        return Pair(left.q, left.r * lengths, vectors, residual)
    series = matmul(f, f).mul_(0.375).sub_(f, alpha=0.5)
    series.diagonal().add_(1.0)
    return Pair(matmul(image, series.div_(lengths[:, None])), lengths.diag(), vectors, residual)
