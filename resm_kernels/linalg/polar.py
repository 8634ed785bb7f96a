"""The orthonormal polar factor."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import _products
from resm_kernels.linalg._products import (
    eigen_list,
    frobenius_norm,
    gram,
    gram_list,
    matmul,
    matmul_list,
    single_matmul,
    square_of,
)

RANK_TOLERANCE = 1e-6
"""Singular values at most this times the largest count as zero.

Task vectors come out of fp32 subtractions: what is smaller than about 1e-6 of the largest direction is rounding, and
spectral merges, which give every kept direction the same length, would blow it up.
"""
POLAR_METHODS = ("auto", "gram", "polar_express")
_QUICK = 0.04
"""Eigenvalues above which `polar_factors` may multiply in fp32."""
_SINGLE = 16 * 2.0**-24
"""Errors of a Gram matrix of fp32 blocks and of its eigenpairs, all in fp32, where its own blocks count as I."""


class PolarFactors(NamedTuple):
    """polar(x) = basis · rotationᵀ, both (·, c).

    With `accuracy` 0 basis and rotation are orthonormal, but for columns of x's null space, which are 0 in the basis.
    Where an `accuracy` allowed fp32, they are x itself and (xᵀx)^(−1/2), or polar(x) and the identity.
    """

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
    x = x.double()
    values, vectors = eigen_list([gram(x)])[0]
    root = matmul(vectors * _inverse_root(values), vectors.mT)
    return matmul(x, root)


def polar_factors(
    matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype = torch.float64, accuracy: float = 0.0
) -> list[PolarFactors]:
    """The polar factors of matrices [Q_1 … Q_T] as products, their eigenproblems side by side.

    Args:
        matrices: For each its blocks Q_t, (m, k_t) with orthonormal columns, fp32 or float64, of at least one column
            in all. Of float64 blocks only the products with each other are formed, as their own are identities.
        dtype: Of the result. For fp32 the basis columns of eigenvalues above `_QUICK` are formed in fp32, the others
            in float64 and rounded: fp32 rounds [Q_1 … Q_T]·w by about 4e-7 of the length of w, and the division by
            its own length, the root of the eigenvalue, makes that 2e-6 at most. Gram matrix and eigenvectors are
            float64's, unless an accuracy allows fp32.
        accuracy: Errors ‖polar(x) − basis·rotationᵀ‖₂ that may be made for speed, in fp32 of fp32 blocks. An error E
            of the Gram matrix moves the factor's direction of eigenvalue λ by ‖E‖/2λ; where the smallest λ makes that
            too much, everything is done as for 0 (default). On a GPU polar(x) then comes from matrix products alone,
            and the host waits once, for how far it is from orthonormal.

    Returns:
        Basis and rotation of each.
    """
    found: dict[int, PolarFactors] = {}
    if accuracy > 0 and dtype == torch.float32:
        single = [i for i, blocks in enumerate(matrices) if all(block.dtype == torch.float32 for block in blocks)]
        alone = _products.only_products(matrices[0][0].device)
        factors = (_iterated_factors if alone else _single_factors)([matrices[i] for i in single], accuracy)
        found = {i: own for i, own in zip(single, factors, strict=True) if own is not None}
    rest = [i for i in range(len(matrices)) if i not in found]
    found |= dict(zip(rest, _exact_factors([matrices[i] for i in rest], dtype), strict=True))
    return [found[i] for i in range(len(matrices))]


def _single_factors(matrices: Sequence[Sequence[Tensor]], accuracy: float) -> list[PolarFactors | None]:
    """x and (xᵀx)^(−1/2) in fp32; None where small eigenvalues would make their errors more than `accuracy`."""
    found: list[PolarFactors | None] = [None] * len(matrices)
    scaled: dict[int, Tensor] = {}
    for i, (values, vectors) in enumerate(eigen_list(_cross_grams(matrices, torch.float32))):
        # Not for any accuracy: the smallest eigenvalue has to be one, and not rounding.
        if 2 * min(accuracy, 0.1) * float(values[-1]) >= _SINGLE:
            scaled[i] = vectors * values.pow(-0.25)
    for i, root in zip(scaled, gram_list([x.mT for x in scaled.values()], None), strict=True):
        found[i] = PolarFactors(torch.cat(list(matrices[i]), 1), root)
    return found


def _iterated_factors(matrices: Sequence[Sequence[Tensor]], accuracy: float) -> list[PolarFactors | None]:
    """polar(x) in fp32 by `quintics`; None where that left it far from orthonormal, x being too near to dependent."""
    iterated = [_iterated(blocks, accuracy) for blocks in matrices]
    far = torch.stack([deviation for _, deviation in iterated]).tolist() if iterated else []
    near = [deviation <= min(accuracy, 0.1) for deviation in far]
    return [factors if fits else None for (factors, _), fits in zip(iterated, near, strict=True)]


def _iterated(blocks: Sequence[Tensor], accuracy: float) -> tuple[PolarFactors, Tensor]:
    """polar([Q_1 … Q_T]) of orthonormal fp32 blocks, and its deviation ‖xᵀx − I‖_F, on their device."""
    x = torch.cat(list(blocks), 1)
    # Its singular values are at most √T. Those whose errors would exceed the accuracy do not get to 1.
    size = math.sqrt(len(blocks)) * (1 + 1e-4)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    x = x / size
    for a, b, c in _quintics(min(_SINGLE / min(accuracy, 0.1) / size, 0.5)):
        g = single_matmul(x.mT, x)
        x = single_matmul(x, square_of(g).mul_(c).add_(g, alpha=b).add_(identity, alpha=a))
    return PolarFactors(x, identity), torch.linalg.matrix_norm(single_matmul(x.mT, x) - identity)


def _exact_factors(matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[PolarFactors]:
    grams = _block_grams(matrices)
    quick, exact, rotations = [], [], []
    for blocks, (values, vectors) in zip(matrices, eigen_list(grams), strict=True):
        scaled = vectors * _inverse_root(values)
        first = int((values > _QUICK).sum()) if dtype == torch.float32 else 0
        whole = torch.cat(list(blocks), 1)
        quick.append((whole, scaled[:, :first]))
        exact.append((whole, scaled[:, first:]))
        rotations.append(vectors.to(dtype))
    heads = matmul_list(quick, dtype)
    tails = matmul_list(exact, torch.float64)
    bases = [torch.cat([head, tail.to(dtype)], 1) for head, tail in zip(heads, tails, strict=True)]
    return [PolarFactors(*pair) for pair in zip(bases, rotations, strict=True)]


def _inverse_root(values: Tensor) -> Tensor:
    """λ^(−1/2) of descending eigenvalues of a Gram matrix, 0 for those that count as zero."""
    kept = values > values[0].clamp(min=0) * RANK_TOLERANCE**2
    return torch.where(kept, values, 1.0).rsqrt() * kept


def _block_grams(matrices: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """[Q_1 … Q_T]ᵀ[Q_1 … Q_T] in float64 for blocks with orthonormal columns."""
    # fp32 blocks are orthonormal to fp32 only, which small eigenvalues feel: they are those of what is really there.
    crossed = [i for i, blocks in enumerate(matrices) if all(block.dtype == torch.float64 for block in blocks)]
    whole = [i for i in range(len(matrices)) if i not in crossed]
    found = dict(zip(crossed, _cross_grams([matrices[i] for i in crossed], torch.float64), strict=True))
    found |= dict(zip(whole, gram_list([torch.cat(list(matrices[i]), 1) for i in whole]), strict=True))
    return [found[i] for i in range(len(matrices))]


def _cross_grams(matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """[Q_1 … Q_T]ᵀ[Q_1 … Q_T] of orthonormal blocks: their products with each other, and identities."""
    places, pairs = [], []
    grams = []
    for blocks in matrices:
        ends = list(itertools.accumulate(block.shape[1] for block in blocks))
        whole = torch.eye(ends[-1], dtype=dtype, device=blocks[0].device)
        grams.append(whole)
        spans = [slice(end - block.shape[1], end) for end, block in zip(ends, blocks, strict=True)]
        for s, t in itertools.combinations(range(len(blocks)), 2):
            places.append((whole, spans[s], spans[t]))
            pairs.append((blocks[s].mT, blocks[t]))
    for (whole, rows, columns), product in zip(places, matmul_list(pairs, dtype), strict=True):
        whole[rows, columns] = product
        whole[columns, rows] = product.mT
    return grams


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


_quintics = functools.cache(quintics)


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
