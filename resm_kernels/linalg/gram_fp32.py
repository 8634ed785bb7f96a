"""Dominant subspaces from a Gram matrix in fp32, where its rounding is small enough for the accuracy asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from resm_kernels.linalg.deflation import Deflated, deflate, join
from resm_kernels.linalg.dominant import Dominant, dominant_list
from resm_kernels.linalg.orthonormalize import orthonormalize, solve_triangular
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import frobenius_norm, gram, matmul
from resm_kernels.linalg.routes import SLACK, Miss, Pair
from resm_kernels.linalg.threads import run

_EIGEN_ROUNDING = 2.0**-25
"""‖Ep‖/‖ΔᵀΔ‖₂ of the errors E of ΔᵀΔ and of its eigenvectors p, all in fp32: measured 0.1 to 0.8 units."""
_FLOOR = 8 * _EIGEN_ROUNDING
"""(σ_k/σ_1)² up to which the last directions are rounding, or hardly more."""
_SERIES_LIMIT = 2e-2
"""‖QᵀQ − I‖_F up to which the series of `_pair` suffices: its next term, 5/16 of the third power, is below 3e-6."""
_LEAST_OMITTED = 1e-3
"""Share of ‖Δ‖ that a core may leave out: half of it, squared, is less than 3e-7 of the certificate's slack."""
_OMITTED_SHARE = 2e-2
"""The same limit as a share of the norm that the truncation leaves out, to which half of it, squared, adds 1e-4."""


def gram_pairs(
    matrices: Sequence[Tensor], ranks: Sequence[int], norms: Sequence[float], accuracy: float
) -> list[Pair | Miss]:
    """Dominant pairs of tall fp32 matrices (m ≥ n), k ≥ 1; a Miss where the rounding is too large for `accuracy`.

    The Gram matrix, its eigenvectors P and ΔP are fp32. Steep matrices are decomposed without their largest directions
    (`deflation`).
    """
    heads = [deflate(a, k) for a, k in zip(matrices, ranks, strict=True)]
    rests = [a if head is None else head.rest for a, head in zip(matrices, heads, strict=True)]
    counts = [k if head is None else k - head.vectors.shape[1] for k, head in zip(ranks, heads, strict=True)]
    dominants = dominant_list(rests, counts, torch.float32)
    tasks = [partial(_pair, *one) for one in zip(dominants, heads, norms, strict=True)]
    # Several run side by side, each on one thread: their many small steps are not worth sharing out.
    pairs = run(tasks, matrices[0].device) if len(tasks) > 1 else [task() for task in tasks]
    miss = Miss(f"fp32 is not within {accuracy:g}")
    return [pair if pair is not None and pair.residual <= accuracy else miss for pair in pairs]


def _pair(dominant: Dominant, head: Deflated | None, norm: float) -> Pair | None:
    """Q, C and P with Q·C ≈ ΔP and an estimate of the residual; None where the last directions are rounding.

    Scale the columns of ΔP to length 1 and let F = QᵀQ − I. Then C·F·C is the part of the eigenproblem's error E that
    lies between the k directions, off the diagonal of Pᵀ(ΔᵀΔ)P. E is about equally large in all n directions, so that
    ‖F·C‖_F·√(n/k)/‖Δ‖_F estimates the residual ‖Δᵀq − σp‖ = ‖Ep‖/σ of all of them. Few directions show little of E:
    the estimate is therefore at least `_EIGEN_ROUNDING` in every direction. Measured for σ_i ~ i^−0.3 to i^−1.5,
    n = 256 to 1024 and k ≥ n/12, the estimate is 2 to 5 times the true residual; for k of 1 to 3 it is within 4e-7 of
    it, which is the rounding of the products themselves.

    Q is made orthonormal by the series of (I + F)^(−1/2), I − F/2 + 3F²/8. C remains diagonal: QᵀΔP is (I + F/2)·C.
    """
    values, vectors, image, energy = dominant
    if float(values[-1]) <= _FLOOR * float(values[0]):
        return None
    first, outside, left_out = 0, None, None
    if head is not None:
        joined = join(head, values, vectors, image)
        if isinstance(joined, Miss) or float(values[-1]) <= (RANK_TOLERANCE * frobenius_norm(head.image)) ** 2:
            return None
        left_out = _left_out(energy, frobenius_norm(image) ** 2)
        vectors, image, outside = joined
        first = outside.shape[1]
    n, k = vectors.shape
    f = gram(image, None)
    lengths = f.diagonal().sqrt()
    f = f.div_(lengths).div_(lengths[:, None])
    f.diagonal().zero_()
    scaled_f = f * lengths
    inside = frobenius_norm(scaled_f[first:, first:]) / norm
    usual = _EIGEN_ROUNDING * float(values[0]) * math.sqrt(float((1 / values).sum())) / norm
    residual = max(inside * math.sqrt(n / k), usual)
    omitted = frobenius_norm(scaled_f) / norm
    negligible = _LEAST_OMITTED if left_out is None else min(_LEAST_OMITTED, _OMITTED_SHARE * left_out / norm)
    if frobenius_norm(f) > _SERIES_LIMIT or omitted > negligible:
        left = orthonormalize(image / lengths, passes=1)
        if outside is not None:
            residual = math.hypot(residual, _norm_of_solved(left.r, outside) / norm)
        return Pair(left.q, left.r * lengths, vectors, norm, residual, left_out)
    series = matmul(f, f).mul_(0.375).sub_(f, alpha=0.5)
    series.diagonal().add_(1.0)
    if outside is not None:
        residual = math.hypot(residual, frobenius_norm(outside) / norm, omitted / 2)
    return Pair(matmul(image, series.div_(lengths[:, None])), lengths.diag(), vectors, norm, residual, left_out)


def _norm_of_solved(r: Tensor, x: Tensor) -> float:
    """‖[x, 0]·r⁻¹‖_F of an upper triangular r."""
    factor = run([lambda: torch.linalg.qr(x, mode="r").R], x.device)[0]
    padded = torch.nn.functional.pad(factor, (0, r.shape[1] - x.shape[1]))
    return frobenius_norm(solve_triangular(r.mT, padded.mT, upper=False))


def _left_out(energy: float, truncated_energy: float) -> float | None:
    """An upper bound on the root of a difference of squared norms; None where it is too small against the rounding."""
    difference, slack = energy - truncated_energy, SLACK * energy
    return math.sqrt(difference + slack) if difference > 10 * slack else None
