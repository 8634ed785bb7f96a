"""Dominant subspaces from a Gram matrix in fp32, where its rounding is small enough for the accuracy asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from resm_kernels.linalg._deflation import Deflated, deflate, join
from resm_kernels.linalg._dominant import Dominant, dominant_list
from resm_kernels.linalg._products import frobenius_norm, gram, matmul
from resm_kernels.linalg._randomized import Pair
from resm_kernels.linalg._threads import run
from resm_kernels.linalg.orthonormalize import orthonormalize, solve_triangular
from resm_kernels.linalg.polar import RANK_TOLERANCE

_ROUNDING = 2.0**-25
"""‖Ep‖/‖ΔᵀΔ‖₂ of the errors E of ΔᵀΔ and of its eigenvectors p, all in fp32: measured 0.1 to 0.8 units."""
_FLOOR = 8 * _ROUNDING
"""(σ_k/σ_1)² up to which the last directions are rounding, or hardly more."""
_NEARLY = 2e-2
"""‖QᵀQ − I‖_F whose third power, times 5/16, is less than 3e-6."""
_NEGLIGIBLE = 1e-3
"""Share of ‖Δ‖ that a core may leave out: half of it, squared, is less than 3e-7 of the certificate's slack."""
_FAINT = 2e-2
"""The same as a share of what is left out anyway, whose square half of it adds to: 1e-4."""
SLACK = 16 * torch.finfo(torch.float32).eps
"""What fp32's rounding may add to sums of squares, and to a difference of matrices, as a share."""


def single_gram_list(
    matrices: Sequence[Tensor], ranks: Sequence[int], norms: Sequence[float], accuracy: float
) -> list[Pair | None]:
    """Dominant pairs of tall fp32 matrices (m ≥ n), k ≥ 1; None for one whose rounding is too much for `accuracy`.

    Gram matrix, its eigenvectors P and ΔP are fp32; of steep matrices without the largest directions (`_deflation`).
    """
    heads = [deflate(a, k) for a, k in zip(matrices, ranks, strict=True)]
    rests = [a if head is None else head.rest for a, head in zip(matrices, heads, strict=True)]
    counts = [k if head is None else k - head.vectors.shape[1] for k, head in zip(ranks, heads, strict=True)]
    dominants = dominant_list(rests, counts, torch.float32)
    tasks = [partial(_pair, *one) for one in zip(dominants, heads, norms, strict=True)]
    # Several side by side, each on one thread, as their many small steps are not worth sharing out.
    pairs = run(tasks, matrices[0].device) if len(tasks) > 1 else [task() for task in tasks]
    return [pair if pair is not None and pair.residual <= accuracy else None for pair in pairs]


def _pair(dominant: Dominant, head: Deflated | None, norm: float) -> Pair | None:
    """Q, C and P with Q·C ≈ ΔP; None where the last directions are rounding.

    With the columns of ΔP scaled to length 1 and F = QᵀQ − I, C·F·C is what errors E of the eigenproblem leave between
    the directions kept, off the diagonal of Pᵀ(ΔᵀΔ)P. E is about alike in all directions, so that ‖F·C‖_F·√(n/k)/‖Δ‖_F
    is the residual ‖Δᵀq − σp‖ = ‖Ep‖/σ of all of them. Few directions say little about E: it counts as what it is as a
    rule, at least. Measured for σ_i ~ i^−0.3 to i^−1.5, n = 256 to 1024 and k ≥ n/12: 2 to 5 times the true residual;
    for k of 1 to 3 within 4e-7, what the products round themselves.

    Q is made orthonormal by the series of (I + F)^(−1/2), I − F/2 + 3F²/8. C stays diagonal: QᵀΔP is (I + F/2)·C.
    """
    values, vectors, image, energy = dominant
    if float(values[-1]) <= _FLOOR * float(values[0]):
        return None
    first, outside, left_out = 0, None, None
    if head is not None:
        joined = join(head, values, vectors, image)
        if joined is None or float(values[-1]) <= (RANK_TOLERANCE * frobenius_norm(head.image)) ** 2:
            return None
        left_out = _left_out(energy, frobenius_norm(image) ** 2)
        vectors, image, outside = joined
        first = outside.shape[1]
    n, k = vectors.shape
    f = gram(image, None)
    lengths = f.diagonal().sqrt()
    f = f.div_(lengths).div_(lengths[:, None])
    f.diagonal().zero_()
    beside = f * lengths
    inside = frobenius_norm(beside[first:, first:]) / norm
    usual = _ROUNDING * float(values[0]) * math.sqrt(float((1 / values).sum())) / norm
    residual = max(inside * math.sqrt(n / k), usual)
    omitted = frobenius_norm(beside) / norm
    negligible = _NEGLIGIBLE if left_out is None else min(_NEGLIGIBLE, _FAINT * left_out / norm)
    if frobenius_norm(f) > _NEARLY or omitted > negligible:
        left = orthonormalize(image / lengths, passes=1)
        if outside is not None:
            residual = math.hypot(residual, _norm_of_solved(left.r, outside) / norm)
        return Pair(left.q, left.r * lengths, vectors, residual, left_out)
    series = matmul(f, f).mul_(0.375).sub_(f, alpha=0.5)
    series.diagonal().add_(1.0)
    if outside is not None:
        residual = math.hypot(residual, frobenius_norm(outside) / norm, omitted / 2)
    return Pair(matmul(image, series.div_(lengths[:, None])), lengths.diag(), vectors, residual, left_out)


def _norm_of_solved(r: Tensor, x: Tensor) -> float:
    """‖[x, 0]·r⁻¹‖_F of an upper triangular r."""
    factor = run([lambda: torch.linalg.qr(x, mode="r").R], x.device)[0]
    padded = torch.nn.functional.pad(factor, (0, r.shape[1] - x.shape[1]))
    return frobenius_norm(solve_triangular(r.mT, padded.mT, upper=False))


def _left_out(energy: float, kept: float) -> float | None:
    """At least the square root of what is left of a squared norm; None where fp32's rounding would be felt in it."""
    left, slack = energy - kept, SLACK * energy
    return math.sqrt(left + slack) if left > 10 * slack else None
