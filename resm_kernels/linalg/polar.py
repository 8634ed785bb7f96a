"""The orthonormal polar factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg._products import eigh_list, frobenius_norm, gram, gram_list, matmul, matmul_list
from resm_kernels.ops._library import NonFiniteError

RANK_TOLERANCE = 1e-6
"""Singular values at most this times the largest count as zero.

Task vectors come out of fp32 subtractions: what is smaller than about 1e-6 of the largest direction is rounding, and
spectral merges, which give every kept direction the same length, would blow it up.
"""
POLAR_METHODS = ("auto", "gram", "polar_express")


class PolarFactors(NamedTuple):
    """polar(x) = basis · rotationᵀ: basis (m, c) orthonormal (columns of x's null space are 0), rotation (c, c)."""

    basis: Tensor
    rotation: Tensor


def polar(x: Tensor, method: str = "auto") -> Tensor:
    """The matrix with orthonormal columns that is nearest to x: x·(xᵀx)^(−1/2).

    Where x has not full column rank no such matrix is unique. The result then is the partial isometry of x's own
    range, x·((xᵀx)^+)^(1/2): it adds no arbitrary directions, so that T copies of one orthonormal basis Q give
    [Q … Q]/√T.

    Args:
        x: (m, c), finite.
        method: "gram": the inverse root from an eigendecomposition of xᵀx in float64, whose error is about
            1e-16·cond(x)²; singular values up to `RANK_TOLERANCE` times the largest count as zero, so that is 1e-4 at
            worst and 1e-8 at cond(x) = 10⁴. An fp32 SVD, which peers use, has 1e-7·cond(x).
            "polar_express": odd quintic iterations with minimax coefficients (Amsel, Persson, Musco, Gower 2025,
            arXiv 2505.16932) in float64, matrix products alone, error about 1e-15·cond(x); singular values between 0
            and `RANK_TOLERANCE` times the largest come out between 0 and 1.
            "auto" (default): "gram" on the CPU, where an eigenproblem costs as much as a dozen products;
            "polar_express" elsewhere, where products are all that is fast.

    Returns:
        (m, c) in float64.

    Raises:
        ValueError: x is not a matrix, or an unknown method.
        NonFiniteError: NaN or infinite values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    if x.ndim != 2:
        raise ValueError(f"x: got {x.ndim} dimensions, need 2")
    if method not in POLAR_METHODS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(POLAR_METHODS)}")
    if method == "auto":
        method = "gram" if x.device.type == "cpu" else "polar_express"
    if x.numel() == 0:
        return x.double()
    if not math.isfinite(frobenius_norm(x)):
        raise NonFiniteError("x", None, x.numel() - int(torch.isfinite(x).sum()))
    if method == "polar_express":
        return _polar_express(x.double())
    factors = polar_factors([x.double()])[0]
    return matmul(factors.basis, factors.rotation.mT)


def polar_factors(matrices: Sequence[Tensor], accuracy: float = 0.0) -> list[PolarFactors]:
    """The polar factors of several matrices as products, their eigenproblems side by side.

    Args:
        matrices: (m, c) each, c ≥ 1, float64 or fp32.
        accuracy: 0 takes float64 throughout. Otherwise fp32 matrices are tried in fp32 first; that is kept where the
            smallest eigenvalue of xᵀx that counts is so large that rounding moves no direction by more than `accuracy`.

    Returns:
        Basis and rotation of each, in float64, or in fp32 where that was accurate enough.
    """
    found: list[PolarFactors | None] = [None] * len(matrices)
    if accuracy > 0:
        quick = [i for i, x in enumerate(matrices) if x.dtype == torch.float32]
        grams = gram_list([matrices[i] for i in quick], dtype=None)
        for i, g, (values, vectors) in zip(quick, grams, eigh_list(grams), strict=True):
            # Rounding errors of a Gram matrix of c columns lie near √c·u times the largest column's square; a
            # direction of eigenvalue v moves by that over v.
            noise = 4 * len(values) ** 0.5 * torch.finfo(torch.float32).eps * float(g.diagonal().amax())
            if float(values[0]) * accuracy > noise:
                basis = matmul(matrices[i], vectors * values.rsqrt())
                found[i] = PolarFactors(basis, vectors)
    rest = [i for i, f in enumerate(found) if f is None]
    solved = eigh_list(gram_list([matrices[i] for i in rest]))
    scaled = []
    for values, vectors in solved:
        kept = values > values[-1].clamp(min=0) * RANK_TOLERANCE**2
        scaled.append(vectors * (torch.where(kept, values, 1.0).rsqrt() * kept))
    bases = matmul_list([(matrices[i], s) for i, s in zip(rest, scaled, strict=True)], torch.float64)
    for i, basis, (_, vectors) in zip(rest, bases, solved, strict=True):
        found[i] = PolarFactors(basis, vectors)
    return [f for f in found if f is not None]


def _polar_express(x: Tensor) -> Tensor:
    """Xₛ₊₁ = Xₛ·Pₛ, Pₛ = a·I + b·G + c·G², G = XₛᵀXₛ, from X₀ = x/‖x‖ bound.

    Two steps at a time are taken in the Gram matrix alone, G ← PGP, as in Gram Newton–Schulz; then G is formed anew
    from X, which keeps the errors that the Gram form amplifies at the level of the direct iteration.
    """
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    g = gram(x)
    # ‖G‖_F^(1/2) bounds the largest singular value from above, and is at most c^(1/4) of it away.
    size = math.sqrt(frobenius_norm(g))
    if not size > 0:
        return x
    x = x / size
    steps = quintics(RANK_TOLERANCE / x.shape[1] ** 0.25)
    for first in range(0, len(steps), 2):
        g = gram(x)
        whole = identity
        for a, b, c in steps[first : first + 2]:
            p = a * identity + b * g + c * matmul(g, g)
            whole = matmul(whole, p)
            g = matmul(matmul(p, g), p)
        x = matmul(x, whole)
    return x


def quintics(lowest: float) -> list[tuple[float, float, float]]:
    """Coefficients (a, b, c) of steps σ ← aσ + bσ³ + cσ⁵ that take [lowest, 1] to 1, each the best for its interval.

    Every step is the minimax approximation of 1 by an odd quintic on the interval that the step before leaves, found
    by Remez exchange of its two inner extrema; the last ones, on an interval next to 1, are Newton–Schulz's.
    """
    steps, low, high = [], lowest, 1.0
    while True:
        a, b, c = _minimax_quintic(low, high)
        steps.append((a, b, c))
        if 1 - low / high < 1e-7:
            return steps
        low = a * low + b * low**3 + c * low**5
        high = 2 - low


def _minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    if 1 - low / high < 1e-4:  # the exchange below would divide rounding errors, 1e-16/(1 − low/high)³ in size
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error, before = math.inf, math.nan
    while not abs(before - error) <= 1e-15:
        before = error
        points = [low, *inner, high]
        rows = [[p, p**3, p**5, (-1.0) ** i] for i, p in enumerate(points)]
        solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        a, b, c, error = solution.tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c
